// Only the code between the pragmas is compiled for AVX-512. The standard library's templates are not, because the linker
// may use one instance of a template for all files, also on processors without AVX-512.
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
#pragma GCC target("avx2,fma,bmi2,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")
#define TESSERA_LANES 16
#include "attend_impl.hpp"
#include "prefetch.hpp"
#include "avx512.hpp"
#include "avx512_lookup.hpp"
#include "avx512_permute.hpp"
#include "exact.hpp"
#include "paged_impl.hpp"
#include "readers.hpp"

namespace {

template <class Keys>
void attend_points(const Problem& p) {
    switch (static_cast<const Book*>(p.value)->blocks) {
        case 1: return attend_with<Keys, Avx512Values<Permute<1>>>(p);
        case 4: return attend_with<Keys, Avx512Values<Permute<4>>>(p);
        case 6: return attend_with<Keys, Avx512Values<Permute<6>>>(p);
        default: return attend_with<Keys, Avx512Values<Lookup>>(p);
    }
}

template <class Keys>
void attend_paged_points(const Paged& p) {
    switch (static_cast<const Book*>(p.value)->blocks) {
        case 1: return attend_paged_with<Keys, Avx512Values<Permute<1>>>(p);
        case 4: return attend_paged_with<Keys, Avx512Values<Permute<4>>>(p);
        case 6: return attend_paged_with<Keys, Avx512Values<Permute<6>>>(p);
        default: return attend_paged_with<Keys, Avx512Values<Lookup>>(p);
    }
}

}  // namespace

void tessera::attend_avx512(const Problem& p) {
    if (!both_joint(p)) return attend_tiles(p);
    switch (static_cast<const Book*>(p.key)->blocks) {
        case 1: return attend_points<Avx512Keys<Permute<1>>>(p);
        case 4: return attend_points<Avx512Keys<Permute<4>>>(p);
        case 6: return attend_points<Avx512Keys<Permute<6>>>(p);
        default: return attend_points<Avx512Keys<Lookup>>(p);
    }
}
void tessera::attend_exact_avx512(const Problem& p, const Exact& x) { attend_exact(p, x); }
void tessera::decode_avx512(const Vectors& p) {
    decode_tiles(p);
}
void tessera::attend_paged_avx512(const Paged& p) {
    if (!both_joint(p)) return attend_paged_tiles(p);
    switch (static_cast<const Book*>(p.key)->blocks) {
        case 1: return attend_paged_points<Avx512Keys<Permute<1>>>(p);
        case 4: return attend_paged_points<Avx512Keys<Permute<4>>>(p);
        case 6: return attend_paged_points<Avx512Keys<Permute<6>>>(p);
        default: return attend_paged_points<Avx512Keys<Lookup>>(p);
    }
}
#pragma GCC pop_options
