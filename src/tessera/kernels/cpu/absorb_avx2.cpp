// Only the code between the pragmas is compiled for AVX2; see attend_avx512.cpp.
#include <algorithm>
#include <cstring>
#include <functional>
#include <type_traits>
#include <utility>
#include <vector>

#include "absorb.hpp"
#include "memory.hpp"
#include "threads.hpp"

#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi2")
#define TESSERA_LANES 8
#include "absorb_impl.hpp"

void tessera::absorb_avx2(const Absorb& s) { absorb_heads(s); }
void tessera::absorb_backward_avx2(const Absorb& s, const AbsorbGradients& d) { absorb_heads_backward(s, d); }
#pragma GCC pop_options
