// The rotation of codecs/rotation.py by its factors. Included by one file for each instruction set, see attend_impl.hpp.
#pragma once

#include <cmath>

#include "attend.hpp"

namespace {

// Sums and differences of the numbers that lie HALF apart in groups of 2 HALF, of 16. Compilers find the shuffles for this.
template <int HALF>
inline void butterflies(float* x) {
    float other[16];
#pragma GCC unroll 16
    for (int j = 0; j < 16; ++j) other[j] = x[j ^ HALF];
#pragma GCC unroll 16
    for (int j = 0; j < 16; ++j) x[j] = (j & HALF ? -x[j] : x[j]) + other[j];
}

// Hadamard matrix of each row of (rows, size), in place, orthonormal.
inline void hadamard(float* x, int rows, int size) {
    const float norm = 1.0f / std::sqrt(float(size));
    for (int r = 0; r < rows; ++r, x += size) {
        int half = 1;
        if (size % 16 == 0) {
            for (int i = 0; i < size; i += 16) {
                butterflies<1>(x + i);
                butterflies<2>(x + i);
                butterflies<4>(x + i);
                butterflies<8>(x + i);
            }
            half = 16;
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

// The DCT along the other axis of (odd, size), or its transpose.
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
