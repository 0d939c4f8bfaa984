// For 64-bit Arm, where all that is compiled may use NEON.
#include <arm_neon.h>

#include "attend.hpp"
#define TESSERA_LANES 4
#include "attend_impl.hpp"
#include "prefetch.hpp"
#include "rows.hpp"
#include "neon.hpp"

namespace {

bool few_moves(const Coder& coder) { return coder.kind == Coder::JOINT && static_cast<const Book&>(coder).few_moves; }

}  // namespace

void tessera::attend_neon(const Problem& p) {
    if (few_moves(*p.key) && few_moves(*p.value)) attend_with<NeonKeys, NeonValues>(p);
    else attend_portable(p);
}
