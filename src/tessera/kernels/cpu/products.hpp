// A codebook of directions and radii in the kernels' form, see kernels/products.py: code = direction << radius_bits | radius.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <vector>

#include "coder.hpp"

namespace tessera {

struct Products : Coder {
    int bits = 0;       // of a code
    int radius_bits = 0;
    std::vector<float> levels;  // of the radius, as a share of the vector's scale
    // `count` unit quaternions of each head, or one set for all, by role. Each set is padded with zeros, for codes that the
    // codebook lacks, as in a damaged file.
    uint32_t count = 0;
    std::vector<float> words[2];
    int64_t head_words[2] = {0, 0};  // stride between heads in floats, 0 if they share a set

    Products(int bits, int radius_bits, const float* levels, const float* k_words, int64_t k_heads, const float* v_words,
             int64_t v_heads, uint32_t count, const float* dct, int odd, const float* signs, int dim)
        : Coder(PRODUCT), bits(bits), radius_bits(radius_bits), levels(levels, levels + (int64_t{1} << radius_bits)), count(count),
          dct_(dct, dct + odd * odd), signs_(signs, signs + dim) {
        if (dim) rotation = {dim, odd, dct_.data(), signs_.data()};
        if (radius_bits < 1 || bits <= radius_bits || bits > 25) throw std::invalid_argument("no such codebook");
        const float* from[2] = {k_words, v_words};
        const int64_t heads[2] = {k_heads, v_heads};
        for (int role = 0; role < 2; ++role) {
            const size_t length = 4 * size_t(count);
            for (int64_t h = 0; h < heads[role]; ++h) {
                words[role].insert(words[role].end(), from[role] + length * h, from[role] + length * (h + 1));
                words[role].insert(words[role].end(), 4, 0.0f);
            }
            head_words[role] = heads[role] > 1 ? int64_t(length) + 4 : 0;
        }
    }

    int64_t row_bytes(int chunks) const override { return (int64_t(chunks) * bits + 7) / 8; }

  private:
    std::vector<float> dct_, signs_;
};

}  // namespace tessera
