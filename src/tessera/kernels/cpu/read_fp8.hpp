// Reads eight-bit floating point, e4m3, with or without a scale per vector. For tiles.hpp.

namespace {

class ReadFp8 : public Reader {
  public:
    ReadFp8(const Scalars& coder, int chunks) : factor_(coder.factor), dim_(4 * chunks) {
#if TESSERA_LANES == 4
        for (int code = 0; code < 256; ++code) {
            const int exponent = code >> 3 & 15, mantissa = code & 7;
            const float x = exponent ? std::ldexp(float(8 + mantissa), exponent - 10) : std::ldexp(float(mantissa), -9);
            table_[code] = code & 128 ? -x : x;
        }
#endif
    }

    void lengths(const Side& side, int64_t line, int64_t token, int n, float* to) const override {
        if (side.scale.data) return read_halves(side, line, token, n, factor_ * UNIT_OF, to);
        std::fill(to, to + n, factor_ * UNIT_OF);
        std::fill(to + n, to + UNIT, 0.0f);
    }

    void read(const Unit& unit, float* to) override {
        const uint8_t* row = unit.codes;
        for (int j = 0; j < unit.count; ++j, row += dim_, to += dim_) {
            int c = 0;
            for (; c + LANES <= dim_; c += LANES) store(to + c, numbers(row + c));
            if (c < dim_) {
                uint8_t rest[LANES] = {};
                std::memcpy(rest, row + c, size_t(dim_ - c));
                store(to + c, numbers(rest));
            }
        }
    }

  private:
    // Its bits, shifted, are a half-precision number whose smaller exponent bias makes it 256 times too small.
    static constexpr float UNIT_OF = LANES == 4 ? 1.0f : 256.0f;

    inline Lanes numbers(const uint8_t* from) const {
#if TESSERA_LANES == 16
        const __m256i x = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
        const __m256i sign = _mm256_and_si256(_mm256_slli_epi16(x, 8), _mm256_set1_epi16(int16_t(0x8000)));
        return Lanes(_mm512_cvtph_ps(_mm256_or_si256(sign, _mm256_and_si256(_mm256_slli_epi16(x, 7), _mm256_set1_epi16(0x3f80)))));
#elif TESSERA_LANES == 8
        const __m128i x = _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
        const __m128i sign = _mm_and_si128(_mm_slli_epi16(x, 8), _mm_set1_epi16(int16_t(0x8000)));
        return Lanes(_mm256_cvtph_ps(_mm_or_si128(sign, _mm_and_si128(_mm_slli_epi16(x, 7), _mm_set1_epi16(0x3f80)))));
#else
        Lanes found;
        for (int i = 0; i < LANES; ++i) found[i] = table_[from[i]];
        return found;
#endif
    }

    const float factor_;
    const int dim_;
#if TESSERA_LANES == 4
    float table_[256];
#endif
};

}  // namespace
