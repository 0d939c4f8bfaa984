// Attention over vectors of any format by tiles: the vectors of UNIT tokens of a key head are decoded into a buffer that stays
// in the L1 cache, as floats, and multiplied with all rows of queries. A `Reader` decodes a tile; there is one for each format
// of codes, so keys and values may have different ones.

namespace {

// Floats that a reader may write past the last vector, since it decodes whole registers and blocks.
constexpr int SLACK = 64;

class Reader {
  public:
    virtual ~Reader() = default;

    // Returns the lengths of the vectors of n tokens, followed by zeros up to UNIT.
    virtual void lengths(const Side& side, int64_t line, int64_t token, int n, float* to) const = 0;

    // Decodes the vectors of a unit of up to UNIT tokens without their lengths: (count, dim), followed by SLACK undefined
    // floats.
    virtual void read(const Unit& unit, float* to) = 0;
};

std::unique_ptr<Reader> make_reader(const Coder& coder, int chunks, int heads, Memory& memory);

#if defined(__clang__) || __GNUC__ >= 12
#define TESSERA_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#endif

// Sums the lanes of each of four registers.
inline void totals(Lanes a, Lanes b, Lanes c, Lanes d, float* to) {
#if defined(TESSERA_SHUFFLE) && TESSERA_LANES == 16
    const Lanes ab = TESSERA_SHUFFLE(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29) +
                     TESSERA_SHUFFLE(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
    const Lanes cd = TESSERA_SHUFFLE(c, d, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29) +
                     TESSERA_SHUFFLE(c, d, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
    const Lanes x = TESSERA_SHUFFLE(ab, cd, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
                    TESSERA_SHUFFLE(ab, cd, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    const Quarter low = TESSERA_SHUFFLE(x, x, 0, 1, 2, 3) + TESSERA_SHUFFLE(x, x, 4, 5, 6, 7);
    const Quarter high = TESSERA_SHUFFLE(x, x, 8, 9, 10, 11) + TESSERA_SHUFFLE(x, x, 12, 13, 14, 15);
    const Quarter sum = low + high;
    std::memcpy(to, &sum, sizeof sum);
#elif defined(TESSERA_SHUFFLE) && TESSERA_LANES == 8
    const Lanes ab = TESSERA_SHUFFLE(a, b, 0, 8, 1, 9, 4, 12, 5, 13) + TESSERA_SHUFFLE(a, b, 2, 10, 3, 11, 6, 14, 7, 15);
    const Lanes cd = TESSERA_SHUFFLE(c, d, 0, 8, 1, 9, 4, 12, 5, 13) + TESSERA_SHUFFLE(c, d, 2, 10, 3, 11, 6, 14, 7, 15);
    const Lanes x = TESSERA_SHUFFLE(ab, cd, 0, 1, 8, 9, 4, 5, 12, 13) + TESSERA_SHUFFLE(ab, cd, 2, 3, 10, 11, 6, 7, 14, 15);
    const Quarter sum = TESSERA_SHUFFLE(x, x, 0, 1, 2, 3) + TESSERA_SHUFFLE(x, x, 4, 5, 6, 7);
    std::memcpy(to, &sum, sizeof sum);
#else
    to[0] = total(a), to[1] = total(b), to[2] = total(c), to[3] = total(d);
#endif
}

// Computes the inner products of ROWS rows of x, (ROWS, count), with four of y; to: (ROWS, stride).
template <int ROWS>
inline void products_of_four(const float* x, const float* y, int count, float* to, int stride) {
    Lanes part[ROWS][4] = {};
    int i = 0;
    for (; i + LANES <= count; i += LANES) {
        Lanes four[4];
        for (int j = 0; j < 4; ++j) four[j] = load(y + size_t(j) * count + i);
        for (int r = 0; r < ROWS; ++r) {
            const Lanes a = load(x + size_t(r) * count + i);
            for (int j = 0; j < 4; ++j) part[r][j] += a * four[j];
        }
    }
    for (int r = 0; r < ROWS; ++r) {
        totals(part[r][0], part[r][1], part[r][2], part[r][3], to + size_t(r) * stride);
        for (int k = i; k < count; ++k)
            for (int j = 0; j < 4; ++j) to[size_t(r) * stride + j] += x[size_t(r) * count + k] * y[size_t(j) * count + k];
    }
}

class TileKeys {
  public:
    using Book = Coder;

    TileKeys(const Coder& coder, int chunks, int, int heads, Memory& memory)
        : bytes_(coder.row_bytes(chunks)),
          dim_(4 * chunks),
          queries_(memory.take<float>(size_t(TILE) * dim_)),
          vectors_(memory.take<float>(size_t(UNIT) * dim_ + SLACK)),
          reader_(make_reader(coder, chunks, heads, memory)) {
        std::fill(vectors_, vectors_ + size_t(UNIT) * dim_ + SLACK, 0.0f);
    }

    void set_queries(const float* q, int rows) { std::memcpy(queries_, q, sizeof(float) * rows * dim_); }

    void lengths(const Side& side, int64_t line, int64_t token, int n, float* to) const { reader_->lengths(side, line, token, n, to); }

    // Sets scores[r * stride + j] to <query r, vector j>, without the vector's length, for the unit's tokens, up to GROUP;
    // values after them, up to a multiple of UNIT, are undefined.
    void dot(Unit unit, int rows, float* scores, int stride) {
        for (int left = unit.count; left > 0; left -= UNIT, unit.token += UNIT, unit.codes += UNIT * bytes_, scores += UNIT) {
            unit.count = std::min(left, UNIT);
            reader_->read(unit, vectors_);
            constexpr int ROWS = LANES == 16 ? 4 : 2;  // rows that fit in registers
            int r = 0;
            for (; r + ROWS <= rows; r += ROWS) dot_rows<ROWS>(r, unit.count, scores, stride);
            for (; r < rows; ++r) dot_rows<1>(r, unit.count, scores, stride);
        }
    }

  private:
    // After the last vector of a unit the buffer has older vectors: these are finite, and their scores are not used.
    template <int ROWS>
    void dot_rows(int r, int count, float* scores, int stride) const {
        for (int j = 0; j < count; j += 4)
            products_of_four<ROWS>(queries_ + size_t(r) * dim_, vectors_ + size_t(j) * dim_, dim_, scores + size_t(r) * stride + j, stride);
    }

    const int64_t bytes_;
    const int dim_;
    float *const queries_, *const vectors_;
    const std::unique_ptr<Reader> reader_;
};

class TileValues {
  public:
    using Book = Coder;

    TileValues(const Coder& coder, int chunks, int, int heads, Memory& memory)
        : dim_(4 * chunks), vectors_(memory.take<float>(size_t(UNIT) * dim_ + SLACK)), reader_(make_reader(coder, chunks, heads, memory)) {}

    void lengths(const Side& side, int64_t line, int64_t token, int n, float* to) const { reader_->lengths(side, line, token, n, to); }

    // Adds weights[r] · (vectors of the units) to sum[r].
    void add(const Unit* unit, int units, const float* weights, int stride, const float*, int rows, float* sum) {
        for (int u = 0; u < units; ++u) {
            reader_->read(unit[u], vectors_);
            const float* share = weights + u * UNIT;
            int r = 0;
            for (; r + 4 <= rows; r += 4) add_to<4>(share + r * stride, stride, unit[u].count, sum + size_t(r) * dim_);
            for (; r < rows; ++r) add_to<1>(share + r * stride, stride, unit[u].count, sum + size_t(r) * dim_);
        }
    }

  private:
    // Adds weights[r] · vectors to sum[r] for a few rows, keeping a part of the sums in registers until all vectors are added.
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

    const int dim_;
    float* const vectors_;
    const std::unique_ptr<Reader> reader_;
};

// Decodes all vectors of one side of a page to floats.
inline void decode_with(const Vectors& p) {
    const int chunks = p.dim / 4, dim = p.dim;
    const Side& side = p.page->side[p.role];
    const int64_t bytes = p.coder->row_bytes(chunks), tokens = p.page->tokens, parts = (tokens + BLOCK - 1) / BLOCK;
    Threads::get().run(int64_t(p.batch) * p.heads * parts, p.threads, [&](int64_t task, int) {
        const int64_t line = task / parts, begin = task % parts * BLOCK, end = std::min(tokens, begin + BLOCK);
        Memory memory;
        const std::unique_ptr<Reader> reader = make_reader(*p.coder, chunks, p.heads, memory);
        float* const vectors = memory.take<float>(size_t(UNIT) * dim + SLACK);
        float mean[MAX_DIM], factor[MAX_DIM], length[UNIT];
        int64_t group = -1;
        for (int64_t t = begin; t < end; t += UNIT) {
            const int n = int(std::min<int64_t>(UNIT, end - t));
            reader->read({&side, line, t, side.codes.row(line, t, bytes), n}, vectors);
            reader->lengths(side, line, t, n, length);
            for (int j = 0; j < n; ++j) {
                const float* from = vectors + size_t(j) * dim;
                float* to = p.out + (line * tokens + t + j) * dim;
                const float times = length[j] * p.gain;
                for (int c = 0; c < dim; ++c) to[c] = from[c] * times;
                rotate_back(p.coder->rotation, to);
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
