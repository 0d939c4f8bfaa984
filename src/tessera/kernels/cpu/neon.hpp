// The inner loops of attend_impl.hpp with NEON.
//
// As in avx2.hpp queries and softmax weights are written as one or two numbers of 16 bits, codewords' components are widened to
// 16 bits, and products are added up exactly in 32 bits. One instruction adds four products to four sums, so numbers need not
// be paired.

namespace {

inline __attribute__((always_inline)) void store_wide(int16_t* to, int8x16_t x) {
    vst1q_s16(to, vmovl_s8(vget_low_s8(x)));
    vst1q_s16(to + 8, vmovl_high_s8(x));
}

// See ArmKeys.
struct NeonForm {
    using Number = int16_t;
    static constexpr int LIMBS = 2;
    static constexpr float MOST = 32767.0f;  // 512 products of it with components up to 127 fit 32 bits
    static constexpr float BASE = 65534.0f;

    static int limbs(int asked) { return asked > 2 ? 2 : 1; }
    static void narrow(int16_t* to, int32x4_t x) { vst1_s16(to, vqmovn_s32(x)); }
    static void widen(int16_t* to, int8x16_t x) { store_wide(to, x); }

    template <int N>
    [[gnu::noinline]] static void products(const int16_t* vectors, const int16_t* limbs, int size, int32x4_t out[N]) {
        int32x4_t sum[N][4];
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n)
#pragma GCC unroll 4
            for (int t = 0; t < 4; ++t) sum[n][t] = vdupq_n_s32(0);
        for (int c = 0; c < size; c += 8) {
            int16x8_t x[4];
#pragma GCC unroll 4
            for (int t = 0; t < 4; ++t) x[t] = vld1q_s16(vectors + size_t(t) * size + c);
#pragma GCC unroll 4
            for (int n = 0; n < N; ++n) {
                const int16x8_t q = vld1q_s16(limbs + size_t(n) * size + c);
#pragma GCC unroll 4
                for (int t = 0; t < 4; ++t) sum[n][t] = vmlal_high_s16(vmlal_s16(sum[n][t], vget_low_s16(x[t]), vget_low_s16(q)), x[t], q);
            }
        }
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) out[n] = vpaddq_s32(vpaddq_s32(sum[n][0], sum[n][1]), vpaddq_s32(sum[n][2], sum[n][3]));
    }
};

using NeonKeys = ArmKeys<NeonForm>;

// Not inlined, because each of these functions uses all registers.
class NeonValues {
  public:
    using Book = tessera::Book;

    NeonValues(const Book& book, int chunks, int limbs, int, Memory& memory)
        : book_(book),
          dim_(4 * chunks),
          limbs_(limbs > 2 ? 2 : 1),
          codewords_{{book, 0}, {book, book.parts - 1}},
          rows_(book.row_bytes(chunks), false, BLOCK / UNIT, memory),
          vectors_(memory.take<int16_t>(size_t(book.parts) * BLOCK * SPAN)),
          weights_(memory.take<int16_t>(size_t(TILE) * limbs_ * BLOCK)) {}

    void lengths(const Side& side, int64_t line, int64_t token, int n, float* to) const { read_scales(book_, side, line, token, n, to); }

    // Adds weights[r] · (vectors coded in `unit`) to sum[r], UNIT tokens each or `count`; high[r]: the largest weight.
    void add(const Unit* unit, int units, const float* weights, int stride, const float* high, int rows, float* sum) {
        const int count = units * UNIT;
        for (int r = 0; r < rows; ++r) {
            if (limbs_ == 1) set_weights<1>(weights + r * stride, count, high[r], r);
            else set_weights<2>(weights + r * stride, count, high[r], r);
        }
        const uint8_t* row[BLOCK];
        for (int u = 0; u < units; ++u) rows_.find(unit[u], u, row + u * UNIT);
        for (int c = 0; c < dim_; c += SPAN) {
            for (int part = 0; part < book_.parts; ++part) look_up(row, count, c, part);
            int r = 0;
            if (limbs_ == 2) {
                for (; r < rows; ++r) add_some<1, 2>(c, r, count, sum);
            } else {
                for (; r + 2 <= rows; r += 2) add_some<2, 1>(c, r, count, sum);
                if (r < rows) add_some<1, 1>(c, r, count, sum);
            }
        }
    }

  private:
    static constexpr int SPAN = 32;  // components of all tokens that are processed together

    // Weights take 16 bits minus 2^15, which `bias_` adds back, or two limbs of 12 bits. Fewer bits would lose many small
    // weights, each rounded to zero, next to a large one.
    template <int LIMBS>
    void set_weights(const float* w, int count, float most, int r) {
        constexpr int LARGEST = LIMBS == 1 ? 0xffff : 0xffffff;
        share_[r] = most / float(LARGEST) * book_.step;
        const float inverse = most > 1e-30f ? float(LARGEST) / most : 0.0f;
        int16_t* to = weights_ + size_t(r) * LIMBS * BLOCK;
        for (int j = 0; j < count; j += 4) {
            const int32x4_t whole = vminq_s32(vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(w + j), inverse)), vdupq_n_s32(LARGEST));
            if constexpr (LIMBS == 1) {
                vst1_s16(to + j, vmovn_s32(vsubq_s32(whole, vdupq_n_s32(0x8000))));
            } else {
                vst1_s16(to + j, vmovn_s32(vshrq_n_s32(whole, 12)));
                vst1_s16(to + BLOCK + j, vmovn_s32(vandq_s32(whole, vdupq_n_s32(0xfff))));
            }
        }
    }

    // Decodes components c to c + SPAN - 1 of all tokens.
    [[gnu::noinline]] void look_up(const uint8_t* const* row, int count, int c, int part) {
        const Codewords codewords = codewords_[part];
        const int step = book_.bits / 2, at = c / 16 * step;
        int16_t* to = vectors_ + size_t(part) * BLOCK * SPAN;
        int16x8_t sum[4];  // of at most 256 bytes each
        for (int i = 0; i < 4; ++i) sum[i] = vdupq_n_s16(0);
        const bool both = dim_ - c > 16;
        for (int t = 0; t < count; ++t, to += SPAN) {
            const int8x16_t low = codewords.four(row[t] + at), high = both ? codewords.four(row[t] + at + step) : vdupq_n_s8(0);
            store_wide(to, low), store_wide(to + 16, high);
            sum[0] = vaddw_s8(sum[0], vget_low_s8(low)), sum[1] = vaddw_high_s8(sum[1], low);
            sum[2] = vaddw_s8(sum[2], vget_low_s8(high)), sum[3] = vaddw_high_s8(sum[3], high);
        }
        for (int i = 0; i < 4; ++i) {
            bias_[part][2 * i] = vshll_n_s16(vget_low_s16(sum[i]), 15);
            bias_[part][2 * i + 1] = vshll_high_n_s16(sum[i], 15);
        }
    }

    template <int ROWS, int LIMBS>
    [[gnu::noinline]] void add_some(int c, int r, int count, float* sum) const {
        float32x4_t total[ROWS][8];
        for (int j = 0; j < ROWS; ++j)
            for (int i = 0; i < 8; ++i) total[j][i] = vdupq_n_f32(0);
        for (int part = 0; part < book_.parts; ++part) {
            int32x4_t dot[ROWS * LIMBS][8];
            for (int i = 0; i < 8; ++i) dot[0][i] = LIMBS == 1 ? bias_[part][i] : vdupq_n_s32(0);
            products<ROWS * LIMBS>(vectors_ + size_t(part) * BLOCK * SPAN, weights_ + size_t(r) * LIMBS * BLOCK, count, dot);
            const float worth = book_.parts == 2 ? TWO_PARTS[part] : 1.0f;
            for (int j = 0; j < ROWS; ++j)
                for (int i = 0; i < 8; ++i) {
                    float32x4_t whole = vcvtq_f32_s32(dot[j * LIMBS][i]);
                    if (LIMBS == 2) whole = vfmaq_n_f32(vcvtq_f32_s32(dot[j * LIMBS + LIMBS - 1][i]), whole, 4096.0f);
                    total[j][i] = vfmaq_n_f32(total[j][i], whole, worth);
                }
        }
        const int registers = std::min(SPAN, dim_ - c) / 4;
        for (int j = 0; j < ROWS; ++j) {
            float* to = sum + size_t(r + j) * dim_ + c;
            for (int i = 0; i < registers; ++i, to += 4) vst1q_f32(to, vfmaq_n_f32(vld1q_f32(to), total[j][i], share_[r + j]));
        }
    }

    // Adds products with N rows of weights over all tokens; the sums of all rows begin at out[0].
    template <int N>
    [[gnu::noinline]] static void products(const int16_t* vector, const int16_t* weight, int count, int32x4_t out[N][8]) {
        int32x4_t sum[N][8];
#pragma GCC unroll 2
        for (int n = 0; n < N; ++n)
#pragma GCC unroll 8
            for (int i = 0; i < 8; ++i) sum[n][i] = out[0][i];
        for (int t = 0; t < count; ++t, vector += SPAN) {
            int16x8_t x[4];
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) x[i] = vld1q_s16(vector + 8 * i);
#pragma GCC unroll 2
            for (int n = 0; n < N; ++n) {
                const int16x8_t w = vld1q_dup_s16(weight + n * BLOCK + t);
#pragma GCC unroll 4
                for (int i = 0; i < 4; ++i) {
                    sum[n][2 * i] = vmlal_s16(sum[n][2 * i], vget_low_s16(x[i]), vget_low_s16(w));
                    sum[n][2 * i + 1] = vmlal_high_s16(sum[n][2 * i + 1], x[i], w);
                }
            }
        }
#pragma GCC unroll 2
        for (int n = 0; n < N; ++n)
#pragma GCC unroll 8
            for (int i = 0; i < 8; ++i) out[n][i] = sum[n][i];
    }

    const Book& book_;
    const int dim_, limbs_;
    const Codewords codewords_[2];
    const Rows rows_;
    int16_t* const vectors_;   // (parts, BLOCK, SPAN)
    int16_t* const weights_;   // (TILE, limbs, BLOCK)
    int32x4_t bias_[2][8];     // 2^15 times the sums of the vectors
    float share_[TILE] = {};
};

}  // namespace
