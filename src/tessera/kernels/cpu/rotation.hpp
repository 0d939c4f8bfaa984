// Applies the rotation of codecs/rotation.py by its factors. Included once per instruction set, see attend_impl.hpp.
#pragma once

#include <cmath>

#include "attend.hpp"
#include "lanes.hpp"

namespace {

// Replaces lanes WIDTH apart by sums and differences, then lanes half as far apart, down to neighbours.
template <int WIDTH>
inline Lanes butterflies(Lanes x) {
    Lanes other, sign;
#pragma GCC unroll 16
    for (int j = 0; j < LANES; ++j) {
        other[j] = x[j ^ WIDTH];
        sign[j] = j & WIDTH ? -1.0f : 1.0f;
    }
    x = x * sign + other;
    if constexpr (WIDTH > 1) x = butterflies<WIDTH / 2>(x);
    return x;
}

// Applies the orthonormal Hadamard matrix to each row of (rows, size), in place.
inline void hadamard(float* x, int rows, int size) {
    const float norm = 1.0f / std::sqrt(float(size));
    for (int r = 0; r < rows; ++r, x += size) {
        int half = 1;
        if (size % LANES == 0) {
            for (int i = 0; i < size; i += LANES) store(x + i, butterflies<LANES / 2>(load(x + i)));
            half = LANES;
        }
        for (; half < size; half *= 2)
            for (int i = 0; i < size; i += 2 * half)
                for (int j = i; j < i + half; ++j) {
                    const float a = x[j], b = x[j + half];
                    x[j] = a + b;
                    x[j + half] = a - b;
                }
        for (int j = 0; j < size; ++j) x[j] *= norm;
    }
}

// Applies the DCT along the other axis of (odd, size), or its transpose.
inline void mix(float* x, int odd, int size, const float* dct, bool transpose) {
    if (odd == 1) return;
    float column[tessera::MAX_DIM];
    for (int j = 0; j < size; ++j) {
        for (int i = 0; i < odd; ++i) {
            float sum = 0;
            for (int k = 0; k < odd; ++k) sum += (transpose ? dct[k * odd + i] : dct[i * odd + k]) * x[k * size + j];
            column[i] = sum;
        }
        for (int i = 0; i < odd; ++i) x[i * size + j] = column[i];
    }
}

inline void rotate(const tessera::Rotation& r, float* x) {
    if (!r.signs) return;
    for (int c = 0; c < r.dim; ++c) x[c] *= r.signs[c];
    hadamard(x, r.odd, r.dim / r.odd);
    mix(x, r.odd, r.dim / r.odd, r.dct, false);
}

inline void rotate_back(const tessera::Rotation& r, float* x) {
    if (!r.signs) return;
    mix(x, r.odd, r.dim / r.odd, r.dct, true);
    hadamard(x, r.odd, r.dim / r.odd);
    for (int c = 0; c < r.dim; ++c) x[c] *= r.signs[c];
}

}  // namespace
