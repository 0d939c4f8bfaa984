// Unpacks codes of up to 8 bits to integers; kernels/bits.py is the definition.

namespace {

class Unpack {
  public:
    explicit Unpack(int bits) : bits_(bits) {
#if TESSERA_LANES == 16
        // Eight codes take as many bytes as a code has bits. They are loaded into a 64-bit word, in which each is shifted to
        // its byte.
        for (int i = 0; i < 64; ++i) {
            control_[i] = uint8_t(i % 8 < bits ? i / 8 * bits + i % 8 : 0);
            shift_[i] = uint8_t(i % 8 * bits);
        }
#elif TESSERA_LANES == 8
        // Code i of a register is in the byte of its first bit and the next one.
        for (int i = 0; i < 8; ++i) {
            const int first = i * bits / 8, last = (i * bits + bits - 1) / 8;
            control_[4 * i] = uint8_t(first);
            control_[4 * i + 1] = last > first ? uint8_t(last) : 0x80;
            control_[4 * i + 2] = control_[4 * i + 3] = 0x80;
            shift_[i] = i * bits % 8;
        }
#endif
    }

    // Calls use(c, codes) with codes c to c + LANES - 1 of a row, up to `count`; codes beyond are undefined. Nothing is
    // read beyond the row, where unmapped memory may begin.
    template <class Use>
    inline __attribute__((always_inline)) void operator()(const uint8_t* row, int count, const Use& use) const {
        const int bytes = (count * bits_ + 7) / 8;
#if TESSERA_LANES == 16
        const __m512i control = _mm512_load_si512(control_), shift = _mm512_load_si512(shift_), ones = _mm512_set1_epi8(char((1 << bits_) - 1));
        for (int c = 0, at = 0; c < count; c += 64, at += 8 * bits_) {
            const int left = bytes - at;
            const __m512i near = _mm512_maskz_loadu_epi8(left >= 64 ? ~__mmask64{0} : (__mmask64{1} << left) - 1, row + at);
            const __m512i codes = _mm512_and_si512(_mm512_multishift_epi64_epi8(shift, _mm512_permutexvar_epi8(control, near)), ones);
            use(c, IntLanes(_mm512_cvtepu8_epi32(_mm512_castsi512_si128(codes))));
            if (c + 16 < count) use(c + 16, IntLanes(_mm512_cvtepu8_epi32(_mm512_extracti32x4_epi32(codes, 1))));
            if (c + 32 < count) use(c + 32, IntLanes(_mm512_cvtepu8_epi32(_mm512_extracti32x4_epi32(codes, 2))));
            if (c + 48 < count) use(c + 48, IntLanes(_mm512_cvtepu8_epi32(_mm512_extracti32x4_epi32(codes, 3))));
        }
#elif TESSERA_LANES == 8
        const __m256i control = _mm256_load_si256(reinterpret_cast<const __m256i*>(control_));
        const __m256i shift = _mm256_load_si256(reinterpret_cast<const __m256i*>(shift_)), ones = _mm256_set1_epi32((1 << bits_) - 1);
        for (int c = 0, at = 0; c < count; c += 8, at += bits_) {
            uint64_t near = 0;
            if (at + 8 <= bytes) std::memcpy(&near, row + at, 8);
            else std::memcpy(&near, row + at, size_t(std::min(bits_, bytes - at)));
            const __m256i wide = _mm256_shuffle_epi8(_mm256_set1_epi64x(int64_t(near)), control);
            use(c, IntLanes(_mm256_and_si256(_mm256_srlv_epi32(wide, shift), ones)));
        }
#else
        const uint64_t ones = (uint64_t{1} << bits_) - 1;
        for (int c = 0, at = 0; c < count; c += 8, at += bits_) {
            uint64_t near = 0;
            if (at + 8 <= bytes) std::memcpy(&near, row + at, 8);
            else std::memcpy(&near, row + at, size_t(std::min(bits_, bytes - at)));
            const auto code = [=](int i) { return int32_t(near >> (i * bits_) & ones); };
            use(c, IntLanes{code(0), code(1), code(2), code(3)});
            if (c + 4 < count) use(c + 4, IntLanes{code(4), code(5), code(6), code(7)});
        }
#endif
    }

  private:
    const int bits_;
#if TESSERA_LANES == 16
    alignas(64) uint8_t control_[64], shift_[64];
#elif TESSERA_LANES == 8
    alignas(64) uint8_t control_[32];
    alignas(64) int32_t shift_[8];
#endif
};

// Converts LANES half-precision numbers to floats.
inline Lanes halves_at(const uint8_t* from) {
#if TESSERA_LANES == 16
    return Lanes(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
#elif TESSERA_LANES == 8
    return Lanes(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#else
    Lanes found;
    for (int i = 0; i < LANES; ++i) {
        uint16_t half;
        std::memcpy(&half, from + 2 * i, 2);
        found[i] = half_to_float(half);
    }
    return found;
#endif
}

inline void halves_to_floats(const uint8_t* from, int count, float* to) {
    int i = 0;
    for (; i + LANES <= count; i += LANES) store(to + i, halves_at(from + 2 * i));
    for (; i < count; ++i) {
        uint16_t half;
        std::memcpy(&half, from + 2 * i, 2);
        to[i] = half_to_float(half);
    }
}

// Loads half-precision scales of n tokens, times a factor, followed by zeros up to UNIT.
inline void read_halves(const Side& side, int64_t line, int64_t token, int n, float factor, float* to) {
    halves_to_floats(side.scale.row(line, token, 2), n, to);
    for (int j = 0; j < n; ++j) to[j] *= factor;
    for (int j = n; j < UNIT; ++j) to[j] = 0.0f;
}

}  // namespace
