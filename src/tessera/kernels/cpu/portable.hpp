// The inner loops of attend_impl.hpp in plain C++, in float: correct everywhere, and loops that compilers vectorise.

namespace {

class Portable {
  public:
    class Scratch {
      public:
        Scratch(const Book& book, int chunks, int, Memory&) : Scratch(book, chunks) {}

        Scratch(const Book& book, int chunks) : book_(book), chunks_(chunks), dim_(4 * chunks) {
            queries_.resize(size_t(TILE) * dim_);
            vectors_.resize(size_t(UNIT) * dim_);
            for (auto& words : words_) words.resize(chunks);
        }

        void set_queries(const float* q, int rows) { std::memcpy(queries_.data(), q, sizeof(float) * rows * dim_); }

        // What the bytes of n scales stand for, and zeros up to UNIT.
        void lengths(const uint8_t* scale, int n, float* to) const {
            for (int j = 0; j < n; ++j) to[j] = book_.scale[scale[j]];
            for (int j = n; j < UNIT; ++j) to[j] = 0.0f;
        }

        // The `n` vectors coded at `codes`, less their scales: (n, dim), until the next call.
        const float* vectors(const uint8_t* codes, int n) {
            decode(codes, n);
            return vectors_.data();
        }

        // scores[r * stride + j] = <query r, vector j>, less the scale of the vector, for n tokens one behind the other; and
        // anything beyond, up to a multiple of UNIT.
        void dot(const uint8_t* codes, int n, int rows, float* scores, int stride) {
            for (; n > 0; n -= UNIT, codes += UNIT * book_.row_bytes(chunks_), scores += UNIT) {
                const int count = std::min(n, UNIT);
                decode(codes, count);
                for (int r = 0; r < rows; ++r) {
                    const float* q = &queries_[size_t(r) * dim_];
                    for (int j = 0; j < count; ++j) scores[r * stride + j] = inner(q, &vectors_[size_t(j) * dim_], dim_);
                    for (int j = count; j < UNIT; ++j) scores[r * stride + j] = 0.0f;
                }
            }
        }

        // sum[r] += weights[r] · the vectors coded in `unit`, each UNIT tokens or `count` of them.
        void add(const Unit* unit, int units, const float* weights, int stride, const float*, int rows, float* sum) {
            for (int u = 0; u < units; ++u) {
                decode(unit[u].codes, unit[u].count);
                for (int r = 0; r < rows; ++r) {
                    float* to = sum + size_t(r) * dim_;
                    for (int j = 0; j < unit[u].count; ++j) {
                        const float weight = weights[r * stride + u * UNIT + j];
                        const float* vector = &vectors_[size_t(j) * dim_];
                        for (int c = 0; c < dim_; ++c) to[c] += weight * vector[c];
                    }
                }
            }
        }

      private:
        void decode(const uint8_t* codes, int n) {
            const int64_t bytes = book_.row_bytes(chunks_);
            float* to = vectors_.data();
            for (int j = 0; j < n; ++j, codes += bytes, to += dim_) {
                look_up(codes, bytes);
                const int8_t* high = reinterpret_cast<const int8_t*>(words_[0].data());
                if (book_.parts == 1) {
                    for (int c = 0; c < dim_; ++c) to[c] = float(high[c]) * book_.step;
                } else {
                    const int8_t* low = reinterpret_cast<const int8_t*>(words_[1].data());
                    for (int c = 0; c < dim_; ++c) to[c] = float(128 * high[c] + low[c]) * book_.step;
                }
            }
        }

        void look_up(const uint8_t* codes, int64_t bytes) {
            const uint32_t* table[2] = {book_.words[0].data(), book_.words[1].data()};
            const uint32_t ones = (uint32_t{1} << book_.bits) - 1;
            for (int k = 0; k < chunks_; ++k) {
                const int64_t bit = int64_t(k) * book_.bits, byte = bit >> 3;
                uint32_t wide = 0;
                if (byte + 4 <= bytes) {
                    std::memcpy(&wide, codes + byte, 4);
                } else {
                    for (int i = 0; byte + i < bytes; ++i) wide |= uint32_t(codes[byte + i]) << (8 * i);
                }
                const uint32_t code = wide >> (bit & 7) & ones;
                words_[0][k] = table[0][code];
                if (book_.parts == 2) words_[1][k] = table[1][code];
            }
        }

        const Book& book_;
        int chunks_, dim_;
        std::vector<float> queries_, vectors_;
        std::vector<uint32_t> words_[2];
    };
};

inline void decode_with_loops(const Vectors& p) {
    const int chunks = p.dim / 4, dim = p.dim;
    const int64_t bytes = p.book->row_bytes(chunks), parts = (p.tokens + BLOCK - 1) / BLOCK;
    Threads::get().run(p.lines * parts, p.threads, [&](int64_t task, int) {
        const int64_t line = task / parts, begin = task % parts * BLOCK, end = std::min(p.tokens, begin + BLOCK);
        Portable::Scratch scratch(*p.book, chunks);
        float mean[MAX_DIM], factor[MAX_DIM];
        int64_t group = -1;
        for (int64_t t = begin; t < end; t += UNIT) {
            const int n = int(std::min<int64_t>(UNIT, end - t));
            const float* from = scratch.vectors(p.codes + line * p.codes_stride + t * bytes, n);
            for (int j = 0; j < n; ++j, from += dim) {
                float* to = p.out + (line * p.tokens + t + j) * dim;
                const float length = p.book->scale[p.scale[line * p.scale_stride + t + j]] * p.gain;
                for (int c = 0; c < dim; ++c) to[c] = from[c] * length;
                rotate_back(p.book->rotation, to);
                if (!p.centre) continue;
                if (group != (p.offset + t + j) / GROUP) {
                    group = (p.offset + t + j) / GROUP;
                    read_centre(p.centre + line * p.centre_stride + group * dim * 2, dim, mean, factor);
                }
                for (int c = 0; c < dim; ++c) to[c] = to[c] * factor[c] + mean[c];
            }
        }
    });
}

}  // namespace
