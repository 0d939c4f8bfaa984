#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "nearest.hpp"
#define TESSERA_LANES 4
#include "nearest_impl.hpp"

void tessera::nearest_portable(const Search& s) { search(s); }
