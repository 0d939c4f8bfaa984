// Only the code between the pragmas is compiled for AVX-512; see attend_avx512.cpp.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "attend.hpp"
#include "joint_codes.hpp"
#include "memory.hpp"
#include "packing.hpp"
#include "threads.hpp"

#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi2,avx512f,avx512bw,avx512dq,avx512vl")
#define TESSERA_LANES 16
#include "nearest_impl.hpp"
#include "feedback.hpp"
#include "joint_codes_impl.hpp"

void tessera::nearest_avx512(const Search& s) { search(s); }
void tessera::feedback_avx512(const Feedback& s, int64_t head, int64_t begin) { code_with_feedback(s, head, begin); }
bool tessera::encode_joint_avx512(const JointCodes& s) { return encode_joint(s); }
#pragma GCC pop_options
