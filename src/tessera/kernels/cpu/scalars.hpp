// Scalar formats in the kernels' form; see kernels/scalars.py.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <vector>

#include "coder.hpp"

namespace tessera {

struct Scalars : Coder {
    enum Form { UNIFORM, LEVELS, BLOCKS, GROUPS, FP8 };  // in the order of kernels/scalars.py
    static constexpr int BLOCK = 32;  // tokens or channels that share a scale in BLOCKS and GROUPS

    Form form;
    int bits;    // of a code
    float zero;  // the code of 0, of form UNIFORM
    float factor;  // scales are to be multiplied by it
    std::vector<float> levels;  // of form LEVELS

    Scalars(int form, int bits, float zero, float factor, const float* levels, int64_t count, const float* dct, int odd,
            const float* signs, int dim)
        : Coder(SCALAR), form(Form(form)), bits(bits), zero(zero), factor(factor), levels(levels, levels + count),
          dct_(dct, dct + odd * odd), signs_(signs, signs + dim) {
        if (form < UNIFORM || form > FP8 || bits < 1 || bits > 8) throw std::invalid_argument("no such form");
        if (form == LEVELS && (bits > 6 || count != int64_t{1} << bits)) throw std::invalid_argument("levels of another number than codes have");
        if (form == BLOCKS && bits != 4 && bits != 8) throw std::invalid_argument("blocks of other bits");
        if (dim) rotation = {dim, odd, dct_.data(), signs_.data()};
    }

    int64_t row_bytes(int chunks) const override {
        const int64_t count = 4 * int64_t(chunks);
        if (form == BLOCKS) return (count + BLOCK - 1) / BLOCK * (2 + BLOCK * bits / 8);
        return (count * bits + 7) / 8;
    }

  private:
    std::vector<float> dct_, signs_;
};

}  // namespace tessera
