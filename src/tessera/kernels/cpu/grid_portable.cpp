#include <vector>

#include "grid.hpp"
#define TESSERA_LANES 4
#include "grid_backward.hpp"

void tessera::advance_portable(const GridSteps& s) { advance_sequences(s); }
void tessera::retreat_portable(const GridSteps& s, const GridGradients& d) { retreat_sequences(s, d); }
