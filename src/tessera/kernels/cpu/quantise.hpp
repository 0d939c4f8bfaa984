// Encodes the baselines' codecs, bit for bit as codecs/integer.py, scalar.py and blocks.py define.
#pragma once

#include <cstdint>

namespace tessera {

// Rounds (x - low) / scale to an integer from `least` to `most`, plus `offset`. x: (lines, tokens, dim). `low` and
// `scale` are shared by `group` tokens and `span` channels: (lines, ceil(tokens / group), ceil(dim / span)).
struct LinearCodes {
    const float *x, *low, *scale;  // low null: zero
    int64_t lines, tokens, dim, group, span;
    float least, most;
    int bits;
    uint8_t* out;  // (lines, tokens, bytes)
};

// Finds the interval between `bounds` that contains x / divisor * factor. x: (rows, dim); divisor: (rows,).
struct LevelCodes {
    const float *x, *divisor, *bounds, *levels;
    int64_t rows, dim;
    float factor;
    int bits;         // there are 2^bits - 1 bounds
    uint8_t* out;     // (rows, bytes)
    float* chosen;    // (rows, dim), the levels of the codes
};

// Rounds blocks of 32 numbers times `ratio` as ggml does for q4_0 or q8_0. x: (blocks, 32); ratio: (blocks,).
struct BlockCodes {
    const float *x, *ratio;
    const uint16_t* scale;  // (blocks,), half precision, stored before the codes
    int64_t blocks;
    int bits;      // 4 or 8
    uint8_t* out;  // (blocks, 2 + 4 bits)
};

// Encodes one row: a token of a line, one of `rows`, or a block.
void linear_codes(const LinearCodes& s, int64_t begin, int64_t end);
void level_codes(const LevelCodes& s, int64_t begin, int64_t end);
void block_codes(const BlockCodes& s, int64_t begin, int64_t end);

}  // namespace tessera
