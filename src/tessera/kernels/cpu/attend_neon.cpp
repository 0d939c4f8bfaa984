// For 64-bit Arm. NEON belongs to the base instruction set there, so no pragmas are needed.
#include <arm_neon.h>

#include "attend.hpp"
#define TESSERA_LANES 4
#include "attend_impl.hpp"
#include "prefetch.hpp"
#include "rows.hpp"
#include "neon_codewords.hpp"
#include "neon_keys.hpp"
#include "neon.hpp"

void tessera::attend_neon(const Problem& p) {
    if (both_few_moves(p)) attend_with<NeonKeys, NeonValues>(p);
    else attend_portable(p);
}
