// A joint codebook as the kernels read it: code = point << move_bits | move, see JointCodebook in codecs/codebooks.py.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <vector>

namespace tessera {

struct Book {
    int bits = 0;       // of a code
    int move_bits = 0;  // of them, the move
    int parts = 0;      // 1: components fit int8. 2: a component is 128 * high + low
    float step = 0;     // what one integer is worth
    // Four int8 components a word, one table for each part, high first. As many words as a code can name: a code that
    // names none of the codebook's points, as in a damaged file, reads zero.
    std::vector<uint32_t> part[2];
    std::vector<uint32_t> words[2];  // the same of whole codewords, for kernels that would rather look up than permute
    alignas(64) uint32_t control[32] = {};  // for each move, which of the four bytes goes where
    alignas(64) uint32_t negate[32] = {};   // for each move, 0xff in the bytes whose sign changes
    alignas(64) float scale[256] = {};      // what a byte of codecs/logscale.py stands for

    Book(int bits, int move_bits, float step, const int16_t* points, int64_t count, const int64_t* permutation,
         const int64_t* sign, const float* scales)
        : bits(bits), move_bits(move_bits), step(step) {
        if (bits < 4 || bits > 24 || move_bits < 1 || move_bits > 5) throw std::invalid_argument("no such codebook");
        const int64_t room = int64_t{1} << (bits - move_bits);
        if (count > room) throw std::invalid_argument("more points than a code can name");
        int most = 0;
        for (int64_t i = 0; i < 4 * count; ++i) most = points[i] < 0 ? (most > -points[i] ? most : -points[i]) : (most > points[i] ? most : points[i]);
        parts = most <= 127 ? 1 : 2;
        if (most > 127 * 64) throw std::invalid_argument("codewords too large");
        for (int p = 0; p < parts; ++p) {
            part[p].assign(room, 0);
            for (int64_t i = 0; i < count; ++i) {
                uint32_t word = 0;
                for (int j = 0; j < 4; ++j) word |= uint32_t(uint8_t(component(points[4 * i + j], p))) << (8 * j);
                part[p][i] = word;
            }
        }
        for (int m = 0; m < 1 << move_bits; ++m)
            for (int j = 0; j < 4; ++j) {
                control[m] |= uint32_t(permutation[4 * m + j]) << (8 * j);
                negate[m] |= (sign[4 * m + j] < 0 ? 0xffu : 0u) << (8 * j);
            }
        for (int i = 0; i < 256; ++i) scale[i] = scales[i];
        for (int p = 0; p < parts; ++p) {
            words[p].assign(size_t{1} << bits, 0);
            for (uint32_t code = 0; code < uint32_t{1} << bits; ++code) {
                uint32_t word = 0;
                for (int j = 0; j < 4; ++j) {
                    const int from = 8 * (control[move(code)] >> (8 * j) & 255);
                    const int value = int8_t(part[p][index(code)] >> from);
                    word |= uint32_t(uint8_t(negate[move(code)] >> (8 * j) & 1 ? -value : value)) << (8 * j);
                }
                words[p][code] = word;
            }
        }
    }

    // Part p of a component; the low part lies in [-64, 63], so that changing the sign never overflows.
    int component(int value, int p) const {
        if (parts == 1) return value;
        const int high = (value + 64) >> 7;
        return p == 0 ? high : value - 128 * high;
    }

    int64_t row_bytes(int chunks) const { return (int64_t(chunks) * bits + 7) / 8; }
    uint32_t index(uint32_t code) const { return code >> move_bits; }
    uint32_t move(uint32_t code) const { return code & ((1u << move_bits) - 1); }
};

}  // namespace tessera
