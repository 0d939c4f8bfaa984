// Only the code between the pragmas is compiled for AVX-512; see attend_avx512.cpp.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <vector>

#include "grid.hpp"
#include "memory.hpp"
#include "threads.hpp"

#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi2,avx512f,avx512bw,avx512dq,avx512vl")
#define TESSERA_LANES 16
#include "grid_backward.hpp"

void tessera::advance_avx512(const GridSteps& s) { advance_sequences(s); }
void tessera::retreat_avx512(const GridSteps& s, const GridGradients& d) { retreat_sequences(s, d); }
#pragma GCC pop_options
