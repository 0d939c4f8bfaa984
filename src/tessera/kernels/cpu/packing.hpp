// Packs integers into bytes without gaps, little-endian within and across bytes; codecs/bits.py is the definition.
#pragma once

#include <cstdint>
#include <cstring>

namespace tessera {

inline int64_t packed_bytes(int64_t count, int bits) { return (count * bits + 7) / 8; }

// Packs eight bytes of `bits` each into the low bits: neighbours are joined, then pairs, then fours.
inline uint64_t joined_bytes(uint64_t x, int bits) {
    x = (x & 0x00ff00ff00ff00ff) | (x & 0xff00ff00ff00ff00) >> (8 - bits);
    x = (x & 0x0000ffff0000ffff) | (x & 0xffff0000ffff0000) >> (16 - 2 * bits);
    return (x & 0x00000000ffffffff) | (x & 0xffffffff00000000) >> (32 - 4 * bits);
}

// Packs codes of up to 8 bits. `codes` is padded with zeros to a multiple of eight, and `out` has 8 bytes more than are packed.
inline void pack_bytes(const uint8_t* codes, int64_t count, int bits, uint8_t* out) {
    for (int64_t i = 0; i < count; i += 8, out += bits) {
        uint64_t eight;
        std::memcpy(&eight, codes + i, 8);
        eight = joined_bytes(eight, bits);
        std::memcpy(out, &eight, 8);
    }
}

// Packs codes of 8 to 24 bits, writing only the packed bytes.
inline void pack_words(const int32_t* codes, int64_t count, int bits, uint8_t* out) {
    uint64_t waiting = 0;
    int filled = 0;
    for (int64_t i = 0; i < count; ++i) {
        waiting |= uint64_t(uint32_t(codes[i])) << filled;
        filled += bits;
        if (filled >= 32) {
            std::memcpy(out, &waiting, 4);
            out += 4, waiting >>= 32, filled -= 32;
        }
    }
    for (; filled > 0; filled -= 8, waiting >>= 8) *out++ = uint8_t(waiting);
}

}  // namespace tessera
