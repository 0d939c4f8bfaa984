// Locates and converts the unquantised vectors of an engine's step, in float, bfloat16 or half precision.
#pragma once

#include <cstdint>
#include <cstring>

#include "half.hpp"
#include "paged.hpp"

namespace {

using namespace tessera;

inline uint16_t to_bfloat(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16 | 0x40);
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline void to_floats(const uint8_t* from, Number type, int count, float* to) {
    if (type == Number::FLOAT) {
        std::memcpy(to, from, sizeof(float) * size_t(count));
        return;
    }
    const uint16_t* halves = reinterpret_cast<const uint16_t*>(from);
    if (type == Number::HALF) {
        for (int c = 0; c < count; ++c) to[c] = half_to_float(halves[c]);
        return;
    }
    for (int c = 0; c < count; ++c) {
        const uint32_t bits = uint32_t(halves[c]) << 16;
        std::memcpy(to + c, &bits, 4);
    }
}

inline void from_floats(const float* from, Number type, int count, uint8_t* to) {
    if (type == Number::FLOAT) {
        std::memcpy(to, from, sizeof(float) * size_t(count));
        return;
    }
    uint16_t* halves = reinterpret_cast<uint16_t*>(to);
    if (type == Number::HALF)
        for (int c = 0; c < count; ++c) halves[c] = to_half(from[c]);
    else
        for (int c = 0; c < count; ++c) halves[c] = to_bfloat(from[c]);
}

// Returns the unquantised key of token `at` of a request whose tokens from `begin` on are those of the step.
inline const uint8_t* exact_key(const Paged& p, int64_t request, int64_t head, int64_t at, int64_t begin) {
    if (at >= begin) return p.keys.data + (p.first[request] + at - begin) * p.keys.token + head * p.keys.head;
    return p.ring + int64_t(p.ring_table[request * p.ring_width]) * p.ring_block + head * p.ring_head + at % p.ring_tokens * p.ring_token;
}

inline const uint8_t* exact_value(const Paged& p, int64_t request, int64_t head, int64_t at, int64_t begin) {
    if (at >= begin) return p.values.data + (p.first[request] + at - begin) * p.values.token + head * p.values.head;
    return exact_key(p, request, head, at, begin) + p.ring_value;
}

}  // namespace
