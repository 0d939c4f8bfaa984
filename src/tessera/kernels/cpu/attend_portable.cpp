#include "attend.hpp"
#define TESSERA_LANES 4
#include "attend_impl.hpp"
#include "portable.hpp"

void tessera::attend_portable(const Problem& p) { attend_with<Portable>(p); }
void tessera::decode_portable(const Vectors& p) { decode_with_loops(p); }
