// A joint codebook in the kernels' form: code = point << move_bits | move, see JointCodebook in codecs/codebooks.py.
// A point represents an orbit of codewords; a move is one of the signed permutations that map it to the others.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <vector>

#include "coder.hpp"

namespace tessera {

struct Book : Coder {
    int bits = 0;       // of a code
    int move_bits = 0;  // of them, the move
    int parts = 0;      // 1: components fit int8. 2: a component is 128 * high + low
    float step = 0;     // value of the integer 1
    // Four int8 components per word, one table for each part, high first. There is a word for every value of a code: a code
    // that is not in the codebook, as in a damaged file, decodes to zero.
    std::vector<uint32_t> part[2];
    std::vector<uint32_t> words[2];  // whole codewords, for kernels that look them up instead of applying moves
    alignas(64) uint32_t control[32] = {};  // for each move, the permutation of the four bytes
    alignas(64) uint32_t negate[32] = {};   // for each move, 0xff in the bytes whose sign changes
    alignas(64) float scale[256] = {};      // value of each byte of codecs/logscale.py
    bool octaves = true;                    // whether values double every eight bytes, and byte 0 means zero

    // Moves for kernels that select from at most eight permutations and eight signs: those of a move have the numbers
    // move_number >> 3 and move_number & 7.
    bool few_moves = false;  // whether there are at most eight of each, and every fourth code begins at a whole byte
    alignas(32) uint8_t move_number[32] = {};
    alignas(32) uint32_t few_controls[8] = {}, few_signs[8] = {};  // signs: bytes 1 and -1

    // Tables for kernels that look bytes up in registers: component j of 128 points each, with its sign bit flipped in
    // bytes[1]. The first `cycled` points are followed by the two cyclic permutations of their last three components, which need
    // no tables. `blocks` is the number of tables, 0 if too many are needed.
    static constexpr int BLOCKS = 6;
    int blocks = 0;
    alignas(64) uint8_t bytes[2][BLOCKS][4][128] = {};
    // Encoding of a move: bits 0 and 1: component j comes from j ^ these; bit 2 + j: its sign is then flipped.
    alignas(64) uint8_t move_bytes[64] = {};
    // For points 128 b to 128 b + 127: bit t: they are in table t; bit 6: permute cyclically once; bit 7: twice.
    alignas(64) uint8_t block_bytes[64] = {};

    Book(int bits, int move_bits, float step, const int16_t* points, int64_t count, const int64_t* permutation,
         const int64_t* sign, const float* scales, const float* dct, int odd, const float* signs, int dim)
        : Coder(JOINT), bits(bits), move_bits(move_bits), step(step), dct_(dct, dct + odd * odd), signs_(signs, signs + dim) {
        if (dim) rotation = {dim, odd, dct_.data(), signs_.data()};
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
        for (int i = 0; i < 256; ++i) {
            scale[i] = scales[i];
            if (i == 0 ? scale[i] != 0 : i > 8 && scale[i] != 2 * scale[i - 8]) octaves = false;
        }
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
        set_bytes(points, count, permutation, sign);
        set_moves();
    }

    // Returns part p of a component; the low part is in [-64, 63], so that negation cannot overflow.
    int component(int value, int p) const {
        if (parts == 1) return value;
        const int high = (value + 64) >> 7;
        return p == 0 ? high : value - 128 * high;
    }

    int64_t row_bytes(int chunks) const override { return (int64_t(chunks) * bits + 7) / 8; }
    uint32_t index(uint32_t code) const { return code >> move_bits; }
    uint32_t move(uint32_t code) const { return code & ((1u << move_bits) - 1); }

  private:
    std::vector<float> dct_, signs_;

    void set_moves() {
        int controls = 0, signs = 0;
        for (int m = 0; m < 1 << move_bits; ++m) {
            const uint32_t sign = negate[m] | 0x01010101;
            int c = 0, s = 0;
            while (c < controls && few_controls[c] != control[m]) ++c;
            while (s < signs && few_signs[s] != sign) ++s;
            if (c == 8 || s == 8) return;
            few_controls[c] = control[m], few_signs[s] = sign;
            controls += c == controls, signs += s == signs;
            move_number[m] = uint8_t(c << 3 | s);
        }
        few_moves = bits % 2 == 0;
    }

    void set_bytes(const int16_t* points, int64_t count, const int64_t* permutation, const int64_t* sign) {
        if (parts != 1 || bits > 16 || bits % 2) return;
        for (int m = 0; m < 64; ++m) {
            const int at = 4 * (m % (1 << move_bits));
            for (int j = 0; j < 4; ++j) {
                if (permutation[at + j] != (j ^ permutation[at])) return;
                move_bytes[m] |= (sign[at + j] < 0 ? 4 : 0) << j;
            }
            move_bytes[m] |= uint8_t(permutation[at]);
        }
        constexpr int SIZE = 128, cycle[3] = {3, 1, 2};
        int64_t cycled = count / 3 / SIZE * SIZE;
        for (int64_t i = 0; i < 2 * cycled && cycled; ++i) {
            const int16_t *from = points + 4 * i, *to = from + 4 * cycled;
            if (to[0] != from[0]) cycled = 0;
            for (int j = 0; j < 3 && cycled; ++j)
                if (to[1 + j] != from[cycle[j]]) cycled = 0;
        }
        const int64_t room = int64_t{1} << (bits - move_bits), needed = cycled / SIZE + (count - 3 * cycled + SIZE - 1) / SIZE;
        const int named = int((room + SIZE - 1) / SIZE);  // number of blocks that codes can address
        if (needed > BLOCKS || needed + 2 * cycled / SIZE < named) return;
        blocks = int(needed);
        for (int b = 0; b < 64; ++b) {
            const int block = b % named, once = int(cycled / SIZE);
            const int times = block < 3 * once ? block / once : 0;
            const int table = block < 3 * once ? block % once : block - 2 * once;
            block_bytes[b] = uint8_t(1 << table | (times == 1 ? 64 : 0) | (times == 2 ? 128 : 0));
            if (times == 0 && table < blocks)
                for (int i = 0; i < SIZE; ++i) {
                    const int64_t point = (int64_t(block) * SIZE + i) % room;
                    for (int j = 0; j < 4; ++j) bytes[0][table][j][i] = uint8_t(point < count ? points[4 * point + j] : 0);
                }
        }
        for (int table = 0; table < blocks; ++table)
            for (int j = 0; j < 4; ++j)
                for (int i = 0; i < SIZE; ++i) bytes[1][table][j][i] = bytes[0][table][j][i] ^ 0x80;
    }
};

}  // namespace tessera
