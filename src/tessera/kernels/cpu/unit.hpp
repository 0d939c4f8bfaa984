// Finds the nearest of the 24 units in closed form; quaternion.py defines their numbers.
#pragma once

#include <cmath>

namespace tessera {

struct NearestUnit {
    bool halves;  // (±1 ± i ± j ± k) / 2
    int axis;     // otherwise the index of the nonzero component
    int number;
};

inline __attribute__((always_inline)) NearestUnit nearest_unit(float x0, float x1, float x2, float x3) {
    const float a0 = std::fabs(x0), a1 = std::fabs(x1), a2 = std::fabs(x2), a3 = std::fabs(x3);
    float most = a0;
    int axis = 0;
    axis = a1 > most ? 1 : axis, most = a1 > most ? a1 : most;
    axis = a2 > most ? 2 : axis, most = a2 > most ? a2 : most;
    axis = a3 > most ? 3 : axis, most = a3 > most ? a3 : most;
    const bool halves = (a0 + a1 + a2 + a3) * 0.5f > most;
    const int n0 = x0 < 0, n1 = x1 < 0, n2 = x2 < 0, n3 = x3 < 0;
    const int negative = axis == 0 ? n0 : axis == 1 ? n1 : axis == 2 ? n2 : n3;
    return {halves, axis, halves ? 8 + 8 * n0 + 4 * n1 + 2 * n2 + n3 : 2 * axis + negative};
}

}  // namespace tessera
