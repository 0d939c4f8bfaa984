#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "attend.hpp"
#include "joint_codes.hpp"
#include "packing.hpp"
#include "threads.hpp"
#define TESSERA_LANES 4
#include "nearest_impl.hpp"
#include "feedback.hpp"
#include "joint_codes_impl.hpp"

void tessera::nearest_portable(const Search& s) { search(s); }
void tessera::feedback_portable(const Feedback& s, int64_t head, int64_t begin) { code_with_feedback(s, head, begin); }
void tessera::encode_joint_portable(const JointCodes& s) { encode_joint(s); }
