#include "attend.hpp"
#define TESSERA_LANES 4
#include "attend_impl.hpp"
#include "exact.hpp"
#include "paged_impl.hpp"
#include "readers.hpp"

void tessera::attend_portable(const Problem& p) { attend_tiles(p); }
void tessera::attend_exact_portable(const Problem& p, const Exact& x) { attend_exact(p, x); }
void tessera::decode_portable(const Vectors& p) { decode_tiles(p); }
void tessera::attend_paged_portable(const Paged& p) { attend_paged_tiles(p); }
