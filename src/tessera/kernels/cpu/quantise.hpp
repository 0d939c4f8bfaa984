// Codes of the baselines' codecs, packed: what codecs/integer.py, scalar.py and blocks.py define, bit for bit.
#pragma once

#include <cstdint>

namespace tessera {

// Round (x - low) / scale to a whole number from `least` to `most`, plus `offset`. x: (lines, tokens, dim). Of both `low` and
// `scale` there is one for every `group` tokens and every `span` channels: (lines, ceil(tokens / group), ceil(dim / span)).
struct LinearCodes {
    const float *x, *low, *scale;  // low null: zero
    int64_t lines, tokens, dim, group, span;
    float least, most;
    int bits;
    uint8_t* out;  // (lines, tokens, bytes)
};

// Number of the interval between `bounds` in which x / divisor * factor lies. x: (rows, dim); divisor: (rows,).
struct LevelCodes {
    const float *x, *divisor, *bounds, *levels;
    int64_t rows, dim;
    float factor;
    int bits;         // there are 2^bits - 1 bounds
    uint8_t* out;     // (rows, bytes)
    float* chosen;    // (rows, dim), the levels of the codes
};

// Blocks of 32 numbers times `ratio`, rounded as ggml does for q4_0 or q8_0. x: (blocks, 32); ratio: (blocks,).
struct BlockCodes {
    const float *x, *ratio;
    const uint16_t* scale;  // (blocks,), half precision, which goes before the codes
    int64_t blocks;
    int bits;      // 4 or 8
    uint8_t* out;  // (blocks, 2 + 4 bits)
};

// One row: of a line's token, of `rows`, or a block.
void linear_codes(const LinearCodes& s, int64_t begin, int64_t end);
void level_codes(const LevelCodes& s, int64_t begin, int64_t end);
void block_codes(const BlockCodes& s, int64_t begin, int64_t end);

}  // namespace tessera
