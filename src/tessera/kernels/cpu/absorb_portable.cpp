#include <vector>

#include "absorb.hpp"
#define TESSERA_LANES 4
#include "absorb_impl.hpp"

void tessera::absorb_portable(const Absorb& s) { absorb_heads(s); }
void tessera::absorb_backward_portable(const Absorb& s, const AbsorbGradients& d) { absorb_heads_backward(s, d); }
