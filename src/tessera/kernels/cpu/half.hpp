// Half-precision numbers as floats. Included by one file for each instruction set, see attend_impl.hpp.
#pragma once

#include <cstdint>
#include <cstring>

namespace {

// A finite half-precision number: its bits, moved to a float's place, are too small by a factor of 2^112.
inline float half_to_float(uint16_t h) {
    const uint32_t bits = uint32_t(h & 0x7fff) << 13;
    float value;
    std::memcpy(&value, &bits, 4);
    value *= 5.192296858534828e33f;
    return h & 0x8000 ? -value : value;
}

}  // namespace
