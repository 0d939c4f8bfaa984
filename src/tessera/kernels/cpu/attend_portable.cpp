#include "attend.hpp"
#define TESSERA_LANES 4
#include "attend_impl.hpp"
#include "exact.hpp"
#include "portable.hpp"
#include "directions.hpp"
#include "paged_impl.hpp"

void tessera::attend_portable(const Problem& p) {
    if (p.products) return attend_directions(p);
    attend_with<Portable>(p, *p.book);
}
void tessera::attend_exact_portable(const Problem& p, const Exact& x) { attend_exact(p, x); }
void tessera::decode_portable(const Vectors& p) {
    if (p.products) return decode_directions(p);
    decode_with<Points>(p, *p.book);
}
void tessera::attend_paged_portable(const Paged& p) {
    if (p.products) return attend_paged_with<Loops<Directions>>(p, *p.products);
    attend_paged_with<Portable>(p, *p.book);
}
