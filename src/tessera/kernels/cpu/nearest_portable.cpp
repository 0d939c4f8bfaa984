#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "nearest.hpp"
#define TESSERA_LANES 4
#include "nearest_impl.hpp"
#include "feedback.hpp"

void tessera::nearest_portable(const Search& s) { search(s); }
void tessera::feedback_portable(const Feedback& s, int64_t head, int64_t begin) { code_with_feedback(s, head, begin); }
