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

void tessera::attend_avx2(const Problem& p) { attend_loops(p); }
void tessera::attend_exact_avx2(const Problem& p, const Exact& x) { attend_exact(p, x); }
void tessera::decode_avx2(const Vectors& p) {
    if (p.coding.products) return decode_directions(p);
    decode_with<Points>(p, *p.coding.book);
}
void tessera::attend_paged_avx2(const Paged& p) { attend_paged_loops(p); }
#pragma GCC pop_options
