#include "quantise.hpp"

#include <cmath>
#include <cstring>
#include <vector>

#include "clones.hpp"
#include "packing.hpp"

namespace tessera {
namespace {

// Rounds a number of at most 2^22 to the nearest integer, ties to even: the sum has no bits for a fraction.
inline __attribute__((always_inline)) int32_t rounded(float x) {
    constexpr float ROOM = 12582912.0f;
    const float sum = x + ROOM;
    int32_t bits;
    std::memcpy(&bits, &sum, 4);
    return bits - 0x4b400000;
}

// With integer bounds, clamping before rounding gives the same result.
inline __attribute__((always_inline)) uint8_t code_of(float x, float least, float most) {
    const float high = x < most ? x : most;
    return uint8_t(rounded(high > least ? high : least) - int32_t(least));
}

inline __attribute__((always_inline)) void linear_row(const LinearCodes& s, const float* x, const float* low, const float* scale, uint8_t* codes) {
    const float least = s.least, most = s.most;
    if (s.span == 1) {
        for (int64_t c = 0; c < s.dim; ++c) codes[c] = code_of((x[c] - low[c]) / scale[c], least, most);
        return;
    }
    for (int64_t first = 0, e = 0; first < s.dim; first += s.span, ++e) {
        const int64_t end = first + s.span < s.dim ? first + s.span : s.dim;
        const float from = low ? low[e] : 0.0f, by = scale[e];
        for (int64_t c = first; c < end; ++c) codes[c] = code_of((x[c] - from) / by, least, most);
    }
}

TESSERA_CLONES void level_row(const float* x, int64_t dim, float divisor, float factor, const float* bounds, int count, uint8_t* codes) {
    constexpr int SOME = 64;
    for (int64_t first = 0; first < dim; first += SOME) {
        const int64_t some = dim - first < SOME ? dim - first : SOME;
        float at[SOME] = {};
        int32_t code[SOME] = {};
        for (int64_t c = 0; c < some; ++c) at[c] = x[first + c] / divisor * factor;
        for (int b = 0; b < count; ++b)
            for (int c = 0; c < SOME; ++c) code[c] += at[c] > bounds[b];
        for (int64_t c = 0; c < some; ++c) codes[first + c] = uint8_t(code[c]);
    }
}

}  // namespace

TESSERA_CLONES void linear_codes(const LinearCodes& s, int64_t begin, int64_t end) {
    const int64_t bytes = packed_bytes(s.dim, s.bits), rows = (s.tokens + s.group - 1) / s.group, width = (s.dim + s.span - 1) / s.span;
    std::vector<uint8_t> codes(size_t(s.dim + 8), 0), packed(size_t(bytes + 8));
    for (int64_t row = begin; row < end; ++row) {
        const int64_t entry = (row / s.tokens * rows + row % s.tokens / s.group) * width;
        linear_row(s, s.x + row * s.dim, s.low ? s.low + entry : nullptr, s.scale + entry, codes.data());
        pack_bytes(codes.data(), s.dim, s.bits, packed.data());
        std::memcpy(s.out + row * bytes, packed.data(), size_t(bytes));
    }
}

void level_codes(const LevelCodes& s, int64_t begin, int64_t end) {
    const int64_t bytes = packed_bytes(s.dim, s.bits);
    std::vector<uint8_t> codes(size_t(s.dim + 8), 0), packed(size_t(bytes + 8));
    for (int64_t row = begin; row < end; ++row) {
        level_row(s.x + row * s.dim, s.dim, s.divisor[row], s.factor, s.bounds, (1 << s.bits) - 1, codes.data());
        for (int64_t c = 0; c < s.dim; ++c) s.chosen[row * s.dim + c] = s.levels[codes[size_t(c)]];
        pack_bytes(codes.data(), s.dim, s.bits, packed.data());
        std::memcpy(s.out + row * bytes, packed.data(), size_t(bytes));
    }
}

TESSERA_CLONES void block_codes(const BlockCodes& s, int64_t begin, int64_t end) {
    constexpr int SIZE = 32;
    const int64_t bytes = 2 + SIZE * s.bits / 8;
    for (int64_t block = begin; block < end; ++block) {
        const float *x = s.x + block * SIZE, ratio = s.ratio[block];
        uint8_t* out = s.out + block * bytes;
        std::memcpy(out, s.scale + block, 2);
        int32_t q[SIZE];
        if (s.bits == 4) {
            for (int i = 0; i < SIZE; ++i) {
                const int32_t code = int32_t(x[i] * ratio + 8.5f);  // not negative, so truncation rounds down
                q[i] = code < 15 ? code : 15;
            }
            for (int i = 0; i < SIZE / 2; ++i) out[2 + i] = uint8_t(q[i] | q[i + SIZE / 2] << 4);
        } else {
            for (int i = 0; i < SIZE; ++i) {
                const float at = x[i] * ratio;
                const int32_t whole = int32_t(at);
                q[i] = whole + (std::fabs(at - float(whole)) >= 0.5f ? (at > 0 ? 1 : -1) : 0);
            }
            for (int i = 0; i < SIZE; ++i) out[2 + i] = uint8_t(q[i]);
        }
    }
}

}  // namespace tessera
