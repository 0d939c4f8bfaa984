// The inner loops of attend_impl.hpp in plain C++, in float: correct everywhere, and loops that compilers vectorise.

namespace {

class Portable {
  public:
    class Scratch {
      public:
        Scratch(const Book& book, int chunks, int) : book_(book), chunks_(chunks), dim_(4 * chunks) {
            queries_.resize(size_t(TILE) * dim_);
            words_.resize(size_t(UNIT) * dim_);
            transposed_.resize(size_t(UNIT) * dim_);
        }

        void set_queries(const float* q, int rows) { std::memcpy(queries_.data(), q, sizeof(float) * rows * dim_); }

        // scores[r * stride + j] = <query r, codeword row j> for n tokens, less the scale of the vector.
        void dot(const uint8_t* codes, int n, int rows, float* scores, int stride) {
            decode(codes, n, words_.data());
            for (int j = 0; j < UNIT; ++j)
                for (int c = 0; c < dim_; ++c) transposed_[c * UNIT + j] = j < n ? words_[j * dim_ + c] : 0.0f;
            for (int r = 0; r < rows; ++r) {
                float sum[UNIT] = {};
                const float* q = &queries_[size_t(r) * dim_];
                for (int c = 0; c < dim_; ++c)
                    for (int j = 0; j < UNIT; ++j) sum[j] += q[c] * transposed_[c * UNIT + j];
                for (int j = 0; j < UNIT; ++j) scores[r * stride + j] = sum[j] * book_.step;
            }
        }

        // sum[r] += weights[r] · the vectors coded in `unit`, each UNIT tokens or `count` of them.
        void add(const Unit* unit, int units, const float* weights, int stride, int rows, float* sum) {
            for (int u = 0; u < units; ++u) {
                decode(unit[u].codes, unit[u].count, words_.data());
                for (int r = 0; r < rows; ++r) {
                    float* to = sum + size_t(r) * dim_;
                    for (int j = 0; j < unit[u].count; ++j) {
                        const float weight = weights[r * stride + u * UNIT + j] * book_.step;
                        if (weight == 0.0f) continue;
                        const float* word = &words_[size_t(j) * dim_];
                        for (int c = 0; c < dim_; ++c) to[c] += weight * word[c];
                    }
                }
            }
        }

      private:
        void decode(const uint8_t* codes, int n, float* to) const {
            const int64_t bytes = book_.row_bytes(chunks_);
            const uint32_t ones = (uint32_t{1} << book_.bits) - 1;
            for (int j = 0; j < n; ++j, codes += bytes, to += dim_)
                for (int k = 0; k < chunks_; ++k) {
                    const int64_t bit = int64_t(k) * book_.bits, byte = bit >> 3;
                    uint32_t wide = 0;
                    for (int i = 0; i < 4 && byte + i < bytes; ++i) wide |= uint32_t(codes[byte + i]) << (8 * i);
                    const uint32_t code = wide >> (bit & 7) & ones, move = book_.move(code);
                    for (int i = 0; i < 4; ++i) {
                        const int from = 8 * (book_.control[move] >> (8 * i) & 255);
                        int value = int8_t(book_.part[0][book_.index(code)] >> from);
                        if (book_.parts == 2) value = 128 * value + int8_t(book_.part[1][book_.index(code)] >> from);
                        to[4 * k + i] = float(book_.negate[move] >> (8 * i) & 1 ? -value : value);
                    }
                }
        }

        const Book& book_;
        int chunks_, dim_;
        std::vector<float> queries_, words_, transposed_;
    };
};

}  // namespace
