// The inner loops of attend_impl.hpp in plain C++, in float: correct everywhere, and loops that compilers vectorise.

namespace {

// What the vectors that `reader` reads are to be multiplied by, for n tokens, and zeros up to UNIT.
template <class Reader>
inline void read_lengths(const Reader& reader, const Side& side, int64_t line, int64_t token, int n, float* to) {
    for (int j = 0; j < n; ++j) to[j] = reader.length(side, line, token + j);
    for (int j = n; j < UNIT; ++j) to[j] = 0.0f;
}

// `Reader` turns coded vectors into floats, as `Points` does below.
template <class Reader>
class LoopKeys {
  public:
    using Book = typename Reader::Book;

    LoopKeys(const Book& book, int chunks, int, int heads, Memory& memory)
        : reader_(book, chunks, heads, memory),
          bytes_(book.row_bytes(chunks)),
          dim_(4 * chunks),
          queries_(memory.take<float>(size_t(TILE) * dim_)),
          vectors_(memory.take<float>(size_t(UNIT) * dim_)) {}

    void set_queries(const float* q, int rows) { std::memcpy(queries_, q, sizeof(float) * rows * dim_); }

    void lengths(const Side& side, int64_t line, int64_t token, int n, float* to) const { read_lengths(reader_, side, line, token, n, to); }

    // scores[r * stride + j] = <query r, vector j>, less its length, for the tokens of the unit, up to GROUP; and anything
    // beyond, up to a multiple of UNIT.
    void dot(Unit unit, int rows, float* scores, int stride) {
        for (int left = unit.count; left > 0; left -= UNIT, unit.token += UNIT, unit.codes += UNIT * bytes_, scores += UNIT) {
            unit.count = std::min(left, UNIT);
            reader_.read(unit, vectors_);
            for (int r = 0; r < rows; ++r) {
                const float* q = queries_ + size_t(r) * dim_;
                int j = 0;
                for (; j + 4 <= unit.count; j += 4) inner_of_four(q, vectors_ + size_t(j) * dim_, dim_, scores + r * stride + j);
                for (; j < unit.count; ++j) scores[r * stride + j] = inner(q, vectors_ + size_t(j) * dim_, dim_);
                for (; j < UNIT; ++j) scores[r * stride + j] = 0.0f;
            }
        }
    }

  private:
    Reader reader_;
    const int64_t bytes_;
    const int dim_;
    float *const queries_, *const vectors_;
};

template <class Reader>
class LoopValues {
  public:
    using Book = typename Reader::Book;

    LoopValues(const Book& book, int chunks, int, int heads, Memory& memory)
        : reader_(book, chunks, heads, memory), dim_(4 * chunks), vectors_(memory.take<float>(size_t(UNIT) * dim_)) {}

    void lengths(const Side& side, int64_t line, int64_t token, int n, float* to) const { read_lengths(reader_, side, line, token, n, to); }

    // sum[r] += weights[r] · the vectors of the units.
    void add(const Unit* unit, int units, const float* weights, int stride, const float*, int rows, float* sum) {
        for (int u = 0; u < units; ++u) {
            reader_.read(unit[u], vectors_);
            const float* share = weights + u * UNIT;
            int r = 0;
            for (; r + 4 <= rows; r += 4) add_to<4>(share + r * stride, stride, unit[u].count, sum + size_t(r) * dim_);
            for (; r < rows; ++r) add_to<1>(share + r * stride, stride, unit[u].count, sum + size_t(r) * dim_);
        }
    }

  private:
    // sum[r] += weights[r] · vectors, for a few rows: a part of their sums stays in registers until all vectors are added.
    template <int ROWS>
    void add_to(const float* weights, int stride, int count, float* sum) const {
        int c = 0;
        for (; c + 2 * LANES <= dim_; c += 2 * LANES) {
            Lanes part[ROWS][2];
            for (int r = 0; r < ROWS; ++r)
                for (int i = 0; i < 2; ++i) part[r][i] = load(sum + size_t(r) * dim_ + c + i * LANES);
            for (int j = 0; j < count; ++j) {
                const float* from = vectors_ + size_t(j) * dim_ + c;
                const Lanes low = load(from), high = load(from + LANES);
                for (int r = 0; r < ROWS; ++r) {
                    part[r][0] += low * weights[r * stride + j];
                    part[r][1] += high * weights[r * stride + j];
                }
            }
            for (int r = 0; r < ROWS; ++r)
                for (int i = 0; i < 2; ++i) store(sum + size_t(r) * dim_ + c + i * LANES, part[r][i]);
        }
        for (int r = 0; r < ROWS; ++r)
            for (int j = 0; j < count; ++j)
                for (int i = c; i < dim_; ++i) sum[size_t(r) * dim_ + i] += weights[r * stride + j] * vectors_[size_t(j) * dim_ + i];
    }

    Reader reader_;
    const int dim_;
    float* const vectors_;
};

// Calls use(k, code) for each of `count` codes of up to 25 bits that lie one behind the other.
template <class Use>
inline __attribute__((always_inline)) void each_code(const uint8_t* row, int bits, int count, const Use& use) {
    if (bits == 16) {
        for (int k = 0; k < count; ++k) {
            uint16_t code;
            std::memcpy(&code, row + 2 * k, 2);
            use(k, uint32_t(code));
        }
        return;
    }
    const uint32_t ones = (uint32_t{1} << bits) - 1;
    const int bytes = (count * bits + 7) / 8;
    // Codes that lie in four bytes of the row; the last few are read byte by byte.
    const int plain = bytes < 4 ? 0 : std::min(count, ((bytes - 3) * 8 + bits - 1) / bits);
    int k = 0, bit = 0;
    for (; k < plain; ++k, bit += bits) {
        uint32_t wide;
        std::memcpy(&wide, row + (bit >> 3), 4);
        use(k, wide >> (bit & 7) & ones);
    }
    for (; k < count; ++k, bit += bits) {
        uint32_t wide = 0;
        for (int i = 0; (bit >> 3) + i < bytes; ++i) wide |= uint32_t(row[(bit >> 3) + i]) << (8 * i);
        use(k, wide >> (bit & 7) & ones);
    }
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
            look_up(codes);
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
    void look_up(const uint8_t* codes) {
        const uint32_t *high = book_.words[0].data(), *low = book_.words[1].data();
        uint32_t *to = words_[0], *rest = words_[1];
        if (book_.parts == 1) each_code(codes, book_.bits, chunks_, [=](int k, uint32_t code) { to[k] = high[code]; });
        else each_code(codes, book_.bits, chunks_, [=](int k, uint32_t code) { to[k] = high[code], rest[k] = low[code]; });
    }

    const Book& book_;
    const int chunks_;
    uint32_t* const words_[2];
};

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
