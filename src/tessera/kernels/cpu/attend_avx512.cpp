// Only what stands between the pragmas is compiled for AVX-512; the standard library's templates are not, since the linker
// may give them to everyone.
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
#pragma GCC target("avx2,fma,bmi2,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")
#define TESSERA_LANES 16
#include "attend_impl.hpp"
#include "avx512.hpp"
#include "avx512_lookup.hpp"
#include "avx512_permute.hpp"
#include "exact.hpp"
#include "portable.hpp"
#include "directions.hpp"
#include "paged_impl.hpp"

void tessera::attend_avx512(const Problem& p) {
    if (p.products) return attend_directions(p);
    switch (p.book->blocks) {
        case 1: return attend_with<Avx512<Permute<1>>>(p, *p.book);
        case 4: return attend_with<Avx512<Permute<4>>>(p, *p.book);
        case 6: return attend_with<Avx512<Permute<6>>>(p, *p.book);
        default: return attend_with<Avx512<Lookup>>(p, *p.book);
    }
}
void tessera::attend_exact_avx512(const Problem& p, const Exact& x) { attend_exact(p, x); }
void tessera::decode_avx512(const Vectors& p) {
    if (p.products) return decode_directions(p);
    decode_with<Points>(p, *p.book);
}
void tessera::attend_paged_avx512(const Paged& p) {
    if (p.products) return attend_paged_with<Loops<Directions>>(p, *p.products);
    switch (p.book->blocks) {
        case 1: return attend_paged_with<Avx512<Permute<1>>>(p, *p.book);
        case 4: return attend_paged_with<Avx512<Permute<4>>>(p, *p.book);
        case 6: return attend_paged_with<Avx512<Permute<6>>>(p, *p.book);
        default: return attend_paged_with<Avx512<Lookup>>(p, *p.book);
    }
}
#pragma GCC pop_options
