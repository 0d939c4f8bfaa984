// Only the code between the pragmas is compiled for AVX2; see attend_avx512.cpp.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <vector>

#include "grid.hpp"
#include "memory.hpp"
#include "threads.hpp"

#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi2")
#define TESSERA_LANES 8
#include "grid_backward.hpp"

void tessera::advance_avx2(const GridSteps& s) { advance_sequences(s); }
void tessera::retreat_avx2(const GridSteps& s, const GridGradients& d) { retreat_sequences(s, d); }
#pragma GCC pop_options
