// Only what stands between the pragmas is compiled for AVX2; see attend_avx512.cpp.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "nearest.hpp"

#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi2")
#define TESSERA_LANES 8
#include "nearest_impl.hpp"
#include "feedback.hpp"

void tessera::nearest_avx2(const Search& s) { search(s); }
void tessera::feedback_avx2(const Feedback& s, int64_t head, int64_t begin) { code_with_feedback(s, head, begin); }
#pragma GCC pop_options
