// Reads ggml's blocks of 32 numbers with one scale each, q4_0 and q8_0, see codecs/blocks.py. For tiles.hpp.

namespace {

#if TESSERA_LANES > 4
// Converts LANES signed or unsigned bytes to floats.
template <bool SIGNED>
inline IntLanes bytes_at(const uint8_t* from) {
#if TESSERA_LANES == 16
    const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return IntLanes(SIGNED ? _mm512_cvtepi8_epi32(x) : _mm512_cvtepu8_epi32(x));
#else
    const __m128i x = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
    return IntLanes(SIGNED ? _mm256_cvtepi8_epi32(x) : _mm256_cvtepu8_epi32(x));
#endif
}
#endif

class ReadBlocks : public Reader {
  public:
    ReadBlocks(const Scalars& coder, int chunks)
        : dim_(4 * chunks), blocks_((dim_ + Scalars::BLOCK - 1) / Scalars::BLOCK), wide_(coder.bits == 8), bytes_(coder.row_bytes(chunks)) {}

    void lengths(const Side&, int64_t, int64_t, int n, float* to) const override {
        std::fill(to, to + n, 1.0f);
        std::fill(to + n, to + UNIT, 0.0f);
    }

    // The next vector overwrites the excess of a last block.
    void read(const Unit& unit, float* to) override {
        const uint8_t* row = unit.codes;
        for (int j = 0; j < unit.count; ++j, row += bytes_, to += dim_) {
            const uint8_t* block = row;
            for (int b = 0; b < blocks_; ++b, block += 2 + Scalars::BLOCK * (wide_ ? 8 : 4) / 8) {
                uint16_t half;
                std::memcpy(&half, block, 2);
                const float scale = half_to_float(half);
                if (wide_) eight_bits(block + 2, scale, to + Scalars::BLOCK * b);
                else four_bits(block + 2, scale, to + Scalars::BLOCK * b);
            }
        }
    }

  private:
#if TESSERA_LANES == 4
    // Written as loops that compilers vectorise.
    static void eight_bits(const uint8_t* codes, float scale, float* __restrict to) {
        for (int i = 0; i < Scalars::BLOCK; ++i) to[i] = float(int8_t(codes[i])) * scale;
    }

    static void four_bits(const uint8_t* codes, float scale, float* __restrict to) {
        for (int i = 0; i < 16; ++i) to[i] = float(int(codes[i] & 15) - 8) * scale;
        for (int i = 0; i < 16; ++i) to[16 + i] = float(int(codes[i] >> 4) - 8) * scale;
    }
#else
    static void eight_bits(const uint8_t* codes, float scale, float* to) {
        for (int i = 0; i < Scalars::BLOCK; i += LANES) store(to + i, __builtin_convertvector(bytes_at<true>(codes + i), Lanes) * scale);
    }

    static void four_bits(const uint8_t* codes, float scale, float* to) {
        for (int i = 0; i < 16; i += LANES) {
            const IntLanes x = bytes_at<false>(codes + i);
            store(to + i, __builtin_convertvector((x & 15) - 8, Lanes) * scale);
            store(to + 16 + i, __builtin_convertvector((x >> 4) - 8, Lanes) * scale);
        }
    }
#endif

    const int dim_, blocks_;
    const bool wide_;
    const int64_t bytes_;
};

}  // namespace
