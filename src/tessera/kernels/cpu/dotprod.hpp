// The inner loops of attend_impl.hpp with NEON and Arm's dot product of bytes.
//
// As in avx512.hpp queries are written as one to three 8-bit limbs and softmax weights as two or three, and products with the bytes of
// codewords are added up exactly in 32 bits, by fours: of neighbours of a vector for keys, of tokens for values.

namespace {

// sum[n] += products of x with y[n].
template <int N>
inline __attribute__((always_inline)) void add_all(int32x4_t* sum, int stride, int8x16_t x, const int8x16_t y[N]) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) sum[n * stride] = vdotq_s32(sum[n * stride], x, y[n]);
}

// See ArmKeys.
struct DotForm {
    using Number = int8_t;
    static constexpr int LIMBS = 3;
    static constexpr float MOST = 127.0f;
    static constexpr float BASE = 254.0f;

    static int limbs(int asked) { return asked; }
    static void narrow(int8_t* to, int32x4_t x) {
        const int16x4_t half = vqmovn_s32(x);
        const int32_t four = vget_lane_s32(vreinterpret_s32_s8(vqmovn_s16(vcombine_s16(half, half))), 0);
        std::memcpy(to, &four, 4);
    }
    static void widen(int8_t* to, int8x16_t x) { vst1q_s8(to, x); }

    template <int N>
    [[gnu::noinline]] static void products(const int8_t* vectors, const int8_t* limbs, int size, int32x4_t out[N]) {
        int32x4_t sum[N][4];
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n)
#pragma GCC unroll 4
            for (int t = 0; t < 4; ++t) sum[n][t] = vdupq_n_s32(0);
        for (int c = 0; c < size; c += 16) {
            int8x16_t q[N];
#pragma GCC unroll 4
            for (int n = 0; n < N; ++n) q[n] = vld1q_s8(limbs + size_t(n) * size + c);
#pragma GCC unroll 4
            for (int t = 0; t < 4; ++t) add_all<N>(&sum[0][t], 4, vld1q_s8(vectors + size_t(t) * size + c), q);
        }
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) out[n] = vpaddq_s32(vpaddq_s32(sum[n][0], sum[n][1]), vpaddq_s32(sum[n][2], sum[n][3]));
    }
};

using DotKeys = ArmKeys<DotForm>;

// Not inlined, because each of these functions uses all registers.
class DotValues {
  public:
    using Book = tessera::Book;

    DotValues(const Book& book, int chunks, int limbs, int, Memory& memory)
        : book_(book),
          dim_(4 * chunks),
          limbs_(std::max(limbs, 2)),
          codewords_{{book, 0}, {book, book.parts - 1}},
          rows_(book.row_bytes(chunks), false, BLOCK / UNIT, memory),
          vectors_(memory.take<int8x16_t>(size_t(book.parts) * BLOCK)),
          weights_(memory.take<int8_t>(size_t(TILE) * limbs_ * BLOCK)) {}

    void lengths(const Side& side, int64_t line, int64_t token, int n, float* to) const { read_scales(book_, side, line, token, n, to); }

    // Adds weights[r] · (vectors coded in `unit`) to sum[r], UNIT tokens each or `count`; high[r]: the largest weight.
    void add(const Unit* unit, int units, const float* weights, int stride, const float* high, int rows, float* sum) {
        const int count = units * UNIT;
        for (int r = 0; r < rows; ++r) set_weights(weights + r * stride, count, high[r], r);
        const uint8_t* row[BLOCK];
        for (int u = 0; u < units; ++u) rows_.find(unit[u], u, row + u * UNIT);
        for (int c = 0; c < dim_; c += 16) {
            for (int part = 0; part < book_.parts; ++part) look_up(row, count, c, part);
            int r = 0;
            if (limbs_ == 2) {
                for (; r + 2 <= rows; r += 2) add_some<2, 2>(c, r, count, sum);
                if (r < rows) add_some<1, 2>(c, r, count, sum);
            } else {
                for (; r < rows; ++r) add_some<1, 3>(c, r, count, sum);
            }
        }
    }

  private:
    // Weights take two or three bytes, the high one first, each minus 128, which `bias_` adds back. One byte would lose many
    // small weights, each rounded to zero, next to a large one.
    void set_weights(const float* w, int count, float most, int r) {
        const int32_t largest = (1 << (8 * limbs_)) - 1;
        share_[r] = most / float(largest) * book_.step;
        const float inverse = most > 1e-30f ? float(largest) / most : 0.0f;
        int8_t* to = weights_ + size_t(r) * limbs_ * BLOCK;
        for (int j = 0; j < count; j += 4) {
            const int32x4_t whole = vminq_s32(vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(w + j), inverse)), vdupq_n_s32(largest));
            uint8_t bytes[16];
            vst1q_u8(bytes, veorq_u8(vreinterpretq_u8_s32(whole), vdupq_n_u8(0x80)));
            for (int l = 0; l < limbs_; ++l)
                for (int i = 0; i < 4; ++i) to[l * BLOCK + j + i] = int8_t(bytes[4 * i + limbs_ - 1 - l]);
        }
    }

    // Decodes components c to c + 15 of all tokens into registers of four components of four tokens each.
    [[gnu::noinline]] void look_up(const uint8_t* const* row, int count, int c, int part) {
        const Codewords codewords = codewords_[part];
        const int at = c / 16 * (book_.bits / 2);
        int8x16_t* to = vectors_ + size_t(part) * BLOCK;
        int32x4_t sum[4];
        for (int i = 0; i < 4; ++i) sum[i] = vdupq_n_s32(0);
        for (int t = 0; t < count; t += 4, to += 4) {
            const int8x16_t x0 = codewords.four(row[t] + at), x1 = codewords.four(row[t + 1] + at);
            const int8x16_t x2 = codewords.four(row[t + 2] + at), x3 = codewords.four(row[t + 3] + at);
            const int16x8_t low[2] = {vreinterpretq_s16_s8(vzip1q_s8(x0, x1)), vreinterpretq_s16_s8(vzip1q_s8(x2, x3))};
            const int16x8_t high[2] = {vreinterpretq_s16_s8(vzip2q_s8(x0, x1)), vreinterpretq_s16_s8(vzip2q_s8(x2, x3))};
            to[0] = vreinterpretq_s8_s16(vzip1q_s16(low[0], low[1])), to[1] = vreinterpretq_s8_s16(vzip2q_s16(low[0], low[1]));
            to[2] = vreinterpretq_s8_s16(vzip1q_s16(high[0], high[1])), to[3] = vreinterpretq_s8_s16(vzip2q_s16(high[0], high[1]));
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) sum[i] = vdotq_s32(sum[i], to[i], vdupq_n_s8(1));
        }
        for (int i = 0; i < 4; ++i) bias_[part][i] = vshlq_n_s32(sum[i], 7);
    }

    template <int ROWS, int LIMBS>
    [[gnu::noinline]] void add_some(int c, int r, int count, float* sum) const {
        float32x4_t total[ROWS][4];
        for (int j = 0; j < ROWS; ++j)
            for (int i = 0; i < 4; ++i) total[j][i] = vdupq_n_f32(0);
        for (int part = 0; part < book_.parts; ++part) {
            int32x4_t dot[ROWS * LIMBS][4];
            for (int i = 0; i < 4; ++i) dot[0][i] = bias_[part][i];
            products<ROWS * LIMBS>(vectors_ + size_t(part) * BLOCK, weights_ + size_t(r) * LIMBS * BLOCK, count, dot);
            const float worth = book_.parts == 2 ? TWO_PARTS[part] : 1.0f;
            for (int j = 0; j < ROWS; ++j)
                for (int i = 0; i < 4; ++i) {
                    float32x4_t whole = vcvtq_f32_s32(dot[j * LIMBS][i]);
                    for (int l = 1; l < LIMBS; ++l) whole = vfmaq_n_f32(vcvtq_f32_s32(dot[j * LIMBS + l][i]), whole, 256.0f);
                    total[j][i] = vfmaq_n_f32(total[j][i], whole, worth);
                }
        }
        const int registers = std::min(16, dim_ - c) / 4;
        for (int j = 0; j < ROWS; ++j) {
            float* to = sum + size_t(r + j) * dim_ + c;
            for (int i = 0; i < registers; ++i, to += 4) vst1q_f32(to, vfmaq_n_f32(vld1q_f32(to), total[j][i], share_[r + j]));
        }
    }

    // Adds products with N rows of weights over all tokens; the sums of all rows begin at out[0].
    template <int N>
    [[gnu::noinline]] static void products(const int8x16_t* vector, const int8_t* weight, int count, int32x4_t out[N][4]) {
        int32x4_t sum[N][4];
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n)
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) sum[n][i] = out[0][i];
        for (int t = 0; t < count; t += 4, vector += 4) {
            int8x16_t w[N];
#pragma GCC unroll 4
            for (int n = 0; n < N; ++n) {
                int32_t four;
                std::memcpy(&four, weight + n * BLOCK + t, 4);
                w[n] = vreinterpretq_s8_s32(vdupq_n_s32(four));
            }
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) add_all<N>(&sum[0][i], 4, vector[i], w);
        }
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n)
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) out[n][i] = sum[n][i];
    }

    const Book& book_;
    const int dim_, limbs_;
    const Codewords codewords_[2];
    const Rows rows_;
    int8x16_t* const vectors_;  // (parts, BLOCK / 4, 4)
    int8_t* const weights_;     // (TILE, limbs, BLOCK)
    int32x4_t bias_[2][4];      // 128 times the sums of the vectors
    float share_[TILE] = {};
};

}  // namespace
