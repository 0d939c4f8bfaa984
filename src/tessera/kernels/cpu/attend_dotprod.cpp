// Only the code between the pragmas is compiled for Arm's dot product of bytes; see attend_avx512.cpp.
#include <arm_neon.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <vector>

#include "attend.hpp"
#include "memory.hpp"
#include "threads.hpp"

#pragma GCC push_options
#pragma GCC target("arch=armv8.2-a+dotprod")
#define TESSERA_LANES 4
#include "attend_impl.hpp"
#include "prefetch.hpp"
#include "rows.hpp"
#include "neon_codewords.hpp"
#include "neon_keys.hpp"
#include "dotprod.hpp"

void tessera::attend_dotprod(const Problem& p) {
    if (both_few_moves(p)) attend_with<DotKeys, DotValues>(p);
    else attend_portable(p);
}
#pragma GCC pop_options
