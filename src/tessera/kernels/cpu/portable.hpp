// The inner loops of attend_impl.hpp in plain C++, in float: correct everywhere, and loops that compilers vectorise.

namespace {

// `Reader` turns coded vectors into floats, as `Points` does below.
template <class Reader>
class Loops {
  public:
    using Book = typename Reader::Book;

    class Scratch {
      public:
        Scratch(const Book& book, int chunks, int, int heads, Memory& memory)
            : reader_(book, chunks, heads, memory),
              bytes_(book.row_bytes(chunks)),
              dim_(4 * chunks),
              queries_(memory.take<float>(size_t(TILE) * dim_)),
              vectors_(memory.take<float>(size_t(UNIT) * dim_)) {}

        void set_queries(const float* q, int rows) { std::memcpy(queries_, q, sizeof(float) * rows * dim_); }

        // What the vectors that are read are to be multiplied by, for n tokens, and zeros up to UNIT.
        void lengths(const Side& side, int64_t line, int64_t token, int n, float* to) const {
            for (int j = 0; j < n; ++j) to[j] = reader_.length(side, line, token + j);
            for (int j = n; j < UNIT; ++j) to[j] = 0.0f;
        }

        // scores[r * stride + j] = <query r, vector j>, less its length, for the tokens of the unit, up to GROUP; and anything
        // beyond, up to a multiple of UNIT.
        void dot(Unit unit, int rows, float* scores, int stride) {
            for (int left = unit.count; left > 0; left -= UNIT, unit.token += UNIT, unit.codes += UNIT * bytes_, scores += UNIT) {
                unit.count = std::min(left, UNIT);
                reader_.read(unit, vectors_);
                for (int r = 0; r < rows; ++r) {
                    const float* q = queries_ + size_t(r) * dim_;
                    for (int j = 0; j < unit.count; ++j) scores[r * stride + j] = inner(q, vectors_ + size_t(j) * dim_, dim_);
                    for (int j = unit.count; j < UNIT; ++j) scores[r * stride + j] = 0.0f;
                }
            }
        }

        // sum[r] += weights[r] · the vectors of the units.
        void add(const Unit* unit, int units, const float* weights, int stride, const float*, int rows, float* sum) {
            for (int u = 0; u < units; ++u) {
                reader_.read(unit[u], vectors_);
                for (int r = 0; r < rows; ++r) {
                    float* to = sum + size_t(r) * dim_;
                    for (int j = 0; j < unit[u].count; ++j) {
                        const float weight = weights[r * stride + u * UNIT + j];
                        const float* vector = vectors_ + size_t(j) * dim_;
                        for (int c = 0; c < dim_; ++c) to[c] += weight * vector[c];
                    }
                }
            }
        }

      private:
        Reader reader_;
        const int64_t bytes_;
        const int dim_;
        float *const queries_, *const vectors_;
    };
};

// The code that begins `bit` bits into a row of `bytes`, and whatever follows it: the lowest 25 bits can be relied on.
inline uint32_t code_at(const uint8_t* row, int64_t bytes, int64_t bit) {
    const int64_t byte = bit >> 3;
    uint32_t wide = 0;
    if (byte + 4 <= bytes) {
        std::memcpy(&wide, row + byte, 4);
    } else {
        for (int i = 0; byte + i < bytes; ++i) wide |= uint32_t(row[byte + i]) << (8 * i);
    }
    return wide >> (bit & 7);
}

// Vectors of a joint codebook.
class Points {
  public:
    using Book = tessera::Book;

    Points(const Book& book, int chunks, int, Memory& memory)
        : book_(book), chunks_(chunks), words_{memory.take<uint32_t>(chunks), memory.take<uint32_t>(chunks)} {}

    float length(const Side& side, int64_t line, int64_t token) const { return book_.scale[*side.scale.row(line, token, 1)]; }

    // The vectors of the unit, less their lengths: (count, dim).
    void read(const Unit& unit, float* to) {
        const int64_t bytes = book_.row_bytes(chunks_);
        const int dim = 4 * chunks_;
        const uint8_t* codes = unit.codes;
        for (int j = 0; j < unit.count; ++j, codes += bytes, to += dim) {
            look_up(codes, bytes);
            const int8_t* high = reinterpret_cast<const int8_t*>(words_[0]);
            if (book_.parts == 1) {
                for (int c = 0; c < dim; ++c) to[c] = float(high[c]) * book_.step;
            } else {
                const int8_t* low = reinterpret_cast<const int8_t*>(words_[1]);
                for (int c = 0; c < dim; ++c) to[c] = float(128 * high[c] + low[c]) * book_.step;
            }
        }
    }

  private:
    void look_up(const uint8_t* codes, int64_t bytes) {
        const uint32_t* table[2] = {book_.words[0].data(), book_.words[1].data()};
        const uint32_t ones = (uint32_t{1} << book_.bits) - 1;
        for (int k = 0; k < chunks_; ++k) {
            const uint32_t code = code_at(codes, bytes, int64_t(k) * book_.bits) & ones;
            words_[0][k] = table[0][code];
            if (book_.parts == 2) words_[1][k] = table[1][code];
        }
    }

    const Book& book_;
    const int chunks_;
    uint32_t* const words_[2];
};

using Portable = Loops<Points>;

template <class Reader>
void decode_with(const Vectors& p, const typename Reader::Book& book) {
    const int chunks = p.dim / 4, dim = p.dim;
    const Side& side = p.page->side[p.role];
    const int64_t bytes = book.row_bytes(chunks), tokens = p.page->tokens, parts = (tokens + BLOCK - 1) / BLOCK;
    Threads::get().run(int64_t(p.batch) * p.heads * parts, p.threads, [&](int64_t task, int) {
        const int64_t line = task / parts, begin = task % parts * BLOCK, end = std::min(tokens, begin + BLOCK);
        Memory memory;
        Reader reader(book, chunks, p.heads, memory);
        float* const vectors = memory.take<float>(size_t(UNIT) * dim);
        float mean[MAX_DIM], factor[MAX_DIM];
        int64_t group = -1;
        for (int64_t t = begin; t < end; t += UNIT) {
            const int n = int(std::min<int64_t>(UNIT, end - t));
            reader.read({&side, line, t, side.codes.row(line, t, bytes), n}, vectors);
            for (int j = 0; j < n; ++j) {
                const float* from = vectors + size_t(j) * dim;
                float* to = p.out + (line * tokens + t + j) * dim;
                const float length = reader.length(side, line, t + j) * p.gain;
                for (int c = 0; c < dim; ++c) to[c] = from[c] * length;
                rotate_back(book.rotation, to);
                if (!side.centre.data) continue;
                if (group != (p.page->offset + t + j) / GROUP) {
                    group = (p.page->offset + t + j) / GROUP;
                    read_centre(side.centre.row(line, group, dim * 2), dim, mean, factor);
                }
                for (int c = 0; c < dim; ++c) to[c] = to[c] * factor[c] + mean[c];
            }
        }
    });
}

}  // namespace
