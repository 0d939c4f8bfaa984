// Converts half-precision numbers to floats and back. Included once per instruction set, see attend_impl.hpp.
#pragma once

#include <cstdint>
#include <cstring>

namespace {

// Converts a finite half-precision number: its bits, shifted to a float's, are too small by a factor of 2^112.
inline float half_to_float(uint16_t h) {
    const uint32_t bits = uint32_t(h & 0x7fff) << 13;
    float value;
    std::memcpy(&value, &bits, 4);
    value *= 5.192296858534828e33f;
    return h & 0x8000 ? -value : value;
}

// Rounds to the nearest, ties to even; overflow becomes infinite.
inline uint16_t to_half(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
    bits &= 0x7fffffff;
    if (bits >= 0x7f800000) return sign | (bits > 0x7f800000 ? 0x7e00 : 0x7c00);
    if (bits >= 0x477ff000) return sign | 0x7c00;
    if (bits < 0x38800000) {  // subnormal: adding a half lets the processor round
        float magnitude;
        std::memcpy(&magnitude, &bits, 4);
        magnitude += 0.5f;
        std::memcpy(&bits, &magnitude, 4);
        return sign | uint16_t(bits - 0x3f000000);
    }
    return sign | uint16_t((bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13);
}

}  // namespace
