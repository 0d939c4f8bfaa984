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
#define TESSERA_LANES 4
#include "nearest_impl.hpp"
#include "feedback.hpp"
#include "joint_codes_impl.hpp"

void tessera::nearest_portable(const Search& s) { search(s); }
void tessera::feedback_portable(const Feedback& s, int64_t head, int64_t begin) { code_with_feedback(s, head, begin); }
bool tessera::encode_joint_portable(const JointCodes& s) { return encode_joint(s); }
