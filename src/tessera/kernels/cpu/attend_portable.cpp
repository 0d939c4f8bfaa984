#include "attend.hpp"
#define TESSERA_LANES 4
#include "attend_impl.hpp"
#include "exact.hpp"
#include "portable.hpp"
#include "directions.hpp"
#include "paged_impl.hpp"

void tessera::attend_portable(const Problem& p) { attend_loops(p); }
void tessera::attend_exact_portable(const Problem& p, const Exact& x) { attend_exact(p, x); }
void tessera::decode_portable(const Vectors& p) {
    if (p.coding.products) return decode_directions(p);
    decode_with<Points>(p, *p.coding.book);
}
void tessera::attend_paged_portable(const Paged& p) { attend_paged_loops(p); }
