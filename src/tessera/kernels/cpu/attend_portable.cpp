#include "attend.hpp"
#define TESSERA_LANES 4
#include "attend_impl.hpp"
#include "exact.hpp"
#include "portable.hpp"

void tessera::attend_portable(const Problem& p) { attend_with<Portable>(p); }
void tessera::attend_exact_portable(const Problem& p, const Exact& x) { attend_exact(p, x); }
void tessera::decode_portable(const Vectors& p) { decode_with_loops(p); }
