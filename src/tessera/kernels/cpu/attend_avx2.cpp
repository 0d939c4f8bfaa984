// Only the code between the pragmas is compiled for AVX2; see attend_avx512.cpp.
#include <immintrin.h>

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
#pragma GCC target("avx2,fma,bmi2,f16c")
#define TESSERA_LANES 8
#include "attend_impl.hpp"
#include "prefetch.hpp"
#include "rows.hpp"
#include "avx2.hpp"
#include "exact.hpp"
#include "paged_impl.hpp"
#include "readers.hpp"

namespace {

template <class Sum, class Keys>
void attend_points(const Problem& p) {
    if (short_codes(*static_cast<const Book*>(p.value))) attend_with<Keys, Avx2Values<true, Sum>>(p);
    else attend_with<Keys, Avx2Values<false, Sum>>(p);
}

template <class Sum>
void attend_words(const Problem& p) {
    if (!both_joint(p)) return attend_tiles(p);
    const Book &keys = *static_cast<const Book*>(p.key), &values = *static_cast<const Book*>(p.value);
    if (!keys.few_moves || !values.few_moves) attend_tiles(p);
    else if (short_codes(keys)) attend_points<Sum, Avx2Keys<true, Sum>>(p);
    else attend_points<Sum, Avx2Keys<false, Sum>>(p);
}

}  // namespace

void tessera::attend_avx2(const Problem& p) { attend_words<Multiply>(p); }
#if defined(TESSERA_AVX_VNNI)
void tessera::attend_avxvnni(const Problem& p) { attend_words<MultiplyAndAdd>(p); }
#endif
void tessera::attend_exact_avx2(const Problem& p, const Exact& x) { attend_exact(p, x); }
void tessera::decode_avx2(const Vectors& p) {
    decode_tiles(p);
}
void tessera::attend_paged_avx2(const Paged& p) { attend_paged_tiles(p); }
#pragma GCC pop_options
