// Scores of keys on Arm. Included once per instruction set, after neon_codewords.hpp.

namespace {

// Queries are written as limbs, and products of these with the components of codewords are added up exactly in 32 bits. Form:
// Number, the type of limbs and components; LIMBS, their maximum number; MOST, the maximum of |limb|; BASE, the ratio of a limb
// to the next; narrow(to, x): stores four whole numbers; widen(to, x): stores the components of four codes;
// products<N>(vectors, limbs, size, out): the sums of products of four vectors with N rows of limbs, all of `size` numbers. Not
// inlined, because each of these functions uses all registers.
template <class Form>
class ArmKeys {
  public:
    using Book = tessera::Book;
    using Number = typename Form::Number;

    ArmKeys(const Book& book, int chunks, int limbs, int, Memory& memory)
        : book_(book),
          dim_(4 * chunks),
          size_((chunks + 3) / 4 * 16),
          limbs_(Form::limbs(limbs)),
          codewords_{{book, 0}, {book, book.parts - 1}},
          rows_(book.row_bytes(chunks), false, 1, memory),
          query_limbs_(memory.take<Number>(size_t(TILE) * limbs_ * size_)),
          vectors_(memory.take<Number>(size_t(book.parts) * UNIT * size_)) {}

    void lengths(const Side& side, int64_t line, int64_t token, int n, float* to) const { read_scales(book_, side, line, token, n, to); }

    // Split into limbs, each rounding the remainder of those before it.
    void set_queries(const float* q, int rows) {
        float x[MAX_DIM];
        std::fill(x, x + size_, 0.0f);
        for (int r = 0; r < rows; ++r) {
            std::copy(q + size_t(r) * dim_, q + size_t(r + 1) * dim_, x);
            float32x4_t highest = vdupq_n_f32(0);
            for (int c = 0; c < size_; c += 4) highest = vmaxq_f32(highest, vabsq_f32(vld1q_f32(x + c)));
            const float most = vmaxvq_f32(highest);
            // A query of zeros, or whose scale underflows, has scores of zero.
            const float inverse = most > 1e-30f ? Form::MOST / most : 0.0f;
            for (int c = 0; c < size_; c += 4) vst1q_f32(x + c, vmulq_n_f32(vld1q_f32(x + c), inverse));
            float worth = most / Form::MOST * book_.step;
            for (int l = 0; l < limbs_; ++l, worth /= Form::BASE) {
                worth_[r][l] = worth;
                Number* to = query_limbs_ + (size_t(r) * limbs_ + l) * size_;
                for (int c = 0; c < size_; c += 4) {
                    const float32x4_t y = vld1q_f32(x + c), near = vrndnq_f32(y);
                    Form::narrow(to + c, vcvtq_s32_f32(near));
                    vst1q_f32(x + c, vmulq_n_f32(vsubq_f32(y, near), Form::BASE));
                }
            }
        }
    }

    // Sets scores[r * stride + j] to <query r, vector j>, without the vector's length, for the unit's tokens, up to GROUP;
    // values after them, up to a multiple of UNIT, are undefined.
    void dot(Unit unit, int rows, float* scores, int stride) {
        const int64_t bytes = book_.row_bytes(dim_ / 4);
        for (; unit.count > 0; unit.count -= UNIT, unit.codes += UNIT * bytes, scores += UNIT) {
            const uint8_t* row[UNIT];
            rows_.find(unit, 0, row);
            for (int part = 0; part < book_.parts; ++part) look_up(row, part);
            if (limbs_ == 1) dot_rows<4, 1>(rows, scores, stride);
            else if (limbs_ == 2) dot_rows<2, 2>(rows, scores, stride);
            else if constexpr (Form::LIMBS == 3) dot_rows<1, 3>(rows, scores, stride);
        }
    }

  private:
    [[gnu::noinline]] void look_up(const uint8_t* const* row, int part) const {
        const Codewords codewords = codewords_[part];  // a copy: stores do not change it
        const int step = book_.bits / 2;               // bytes of four codes
        Number* to = vectors_ + size_t(part) * UNIT * size_;
        for (int t = 0; t < UNIT; ++t) {
            const uint8_t* from = row[t];
            for (int c = 0; c < size_; c += 16, from += step, to += 16) Form::widen(to, codewords.four(from));
        }
    }

    // ROWS at a time while so many remain.
    template <int ROWS, int LIMBS>
    void dot_rows(int rows, float* scores, int stride) const {
        int r = 0;
        for (; r + ROWS <= rows; r += ROWS) dot_some<ROWS, LIMBS>(r, scores, stride);
        for (; r < rows; ++r) dot_some<1, LIMBS>(r, scores, stride);
    }

    template <int ROWS, int LIMBS>
    [[gnu::noinline]] void dot_some(int r, float* scores, int stride) const {
        const Number* limbs = query_limbs_ + size_t(r) * LIMBS * size_;
        for (int j = 0; j < UNIT; j += 4) {
            float32x4_t total[ROWS];
            for (int i = 0; i < ROWS; ++i) total[i] = vdupq_n_f32(0);
            for (int part = 0; part < book_.parts; ++part) {
                int32x4_t sum[ROWS * LIMBS];
                Form::template products<ROWS * LIMBS>(vectors_ + (size_t(part) * UNIT + j) * size_, limbs, size_, sum);
                const float weight = book_.parts == 2 ? TWO_PARTS[part] : 1.0f;
                for (int i = 0; i < ROWS; ++i)
                    for (int l = 0; l < LIMBS; ++l)
                        total[i] = vfmaq_n_f32(total[i], vcvtq_f32_s32(sum[i * LIMBS + l]), worth_[r + i][l] * weight);
            }
            for (int i = 0; i < ROWS; ++i) vst1q_f32(scores + (r + i) * stride + j, total[i]);
        }
    }

    const Book& book_;
    const int dim_, size_, limbs_;  // size: dim, up to a multiple of four chunks
    const Codewords codewords_[2];
    const Rows rows_;
    Number* const query_limbs_;  // (TILE, limbs, size)
    Number* const vectors_;      // (parts, UNIT, size)
    float worth_[TILE][Form::LIMBS] = {};
};

}  // namespace
