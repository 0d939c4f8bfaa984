// Decodes the words of codecs/precondition.py. Included once per instruction set, see attend_impl.hpp.
#pragma once

#include <cstring>

#include "attend.hpp"
#include "half.hpp"

namespace {

// Decodes the means and factors of a group's channels. Returns whether any factor is not 1.
inline bool read_centre(const uint8_t* words, int dim, float* mean, float* factor) {
    uint16_t word[tessera::MAX_DIM];
    std::memcpy(word, words, 2 * size_t(dim));
    uint16_t exponents = 0;
    for (int c = 0; c < dim; ++c) {
        mean[c] = half_to_float(word[c] & 0xfff0);
        factor[c] = float(1 << (word[c] & 15));
        exponents |= word[c] & 15;
    }
    return exponents != 0;
}

}  // namespace
