// The plain loops again, for AVX2 and FMA. See attend_avx512.cpp about the pragmas.
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
#pragma GCC target("avx2,fma,bmi2")
#define TESSERA_LANES 8
#include "attend_impl.hpp"
#include "exact.hpp"
#include "portable.hpp"
#include "directions.hpp"
#include "paged_impl.hpp"

void tessera::attend_avx2(const Problem& p) {
    if (p.products) return attend_directions(p);
    attend_with<Portable>(p, *p.book);
}
void tessera::attend_exact_avx2(const Problem& p, const Exact& x) { attend_exact(p, x); }
void tessera::decode_avx2(const Vectors& p) {
    if (p.products) return decode_directions(p);
    decode_with<Points>(p, *p.book);
}
void tessera::attend_paged_avx2(const Paged& p) {
    if (p.products) return attend_paged_with<Loops<Directions>>(p, *p.products);
    attend_paged_with<Portable>(p, *p.book);
}
#pragma GCC pop_options
