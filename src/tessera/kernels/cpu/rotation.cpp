#include <cmath>

#include "attend.hpp"

namespace tessera {

// Hadamard matrix of each row of (rows, size), in place, orthonormal.
static void hadamard(float* x, int rows, int size) {
    const float norm = 1.0f / std::sqrt(float(size));
    for (int r = 0; r < rows; ++r, x += size) {
        for (int half = 1; half < size; half *= 2)
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
static void mix(float* x, int odd, int size, const float* dct, bool transpose) {
    if (odd == 1) return;
    float column[MAX_DIM];
    for (int j = 0; j < size; ++j) {
        for (int i = 0; i < odd; ++i) {
            float sum = 0;
            for (int k = 0; k < odd; ++k) sum += (transpose ? dct[k * odd + i] : dct[i * odd + k]) * x[k * size + j];
            column[i] = sum;
        }
        for (int i = 0; i < odd; ++i) x[i * size + j] = column[i];
    }
}

void Rotation::forward(float* x) const {
    if (!signs) return;
    for (int c = 0; c < dim; ++c) x[c] *= signs[c];
    hadamard(x, odd, dim / odd);
    mix(x, odd, dim / odd, dct, false);
}

void Rotation::inverse(float* x) const {
    if (!signs) return;
    mix(x, odd, dim / odd, dct, true);
    hadamard(x, odd, dim / odd);
    for (int c = 0; c < dim; ++c) x[c] *= signs[c];
}

}  // namespace tessera
