// The inner loops of attend_impl.hpp with AVX2, and with AVX-VNNI where `Sum` says so.
//
// Queries and softmax weights are written as one or two numbers of 16 bits, codewords' components are widened to 16 bits, and
// products are added up exactly in 32 bits, by pairs of neighbours: of components of a vector for keys, of tokens for values.

namespace {

// Adds products of signed 16-bit numbers in pairs. Inline assembly, because compilers (GCC 12 and earlier) copy every
// sum from register to register.
struct Multiply {
    static inline __attribute__((always_inline)) void add(__m256i& sum, __m256i a, __m256i b) {
        asm("vpaddd %1, %0, %0" : "+x"(sum) : "x"(_mm256_madd_epi16(a, b)));
    }
};

#if defined(TESSERA_AVX_VNNI)
// The same in one instruction of AVX-VNNI.
struct MultiplyAndAdd {
    static inline __attribute__((always_inline)) void add(__m256i& sum, __m256i a, __m256i b) {
        asm("%{vex%} vpdpwssd %2, %1, %0" : "+x"(sum) : "x"(a), "xm"(b));
    }
};
#endif

// Keeps x in a register, which compilers would otherwise reload for every product.
inline __attribute__((always_inline)) __m256i load_once(const __m256i* from) {
    __m256i x = _mm256_load_si256(from);
    asm("" : "+x"(x));
    return x;
}

// Adds y[n] · x to sum[STRIDE n].
template <class Sum, int N, int STRIDE>
inline __attribute__((always_inline)) void add_all(__m256i* sum, const __m256i y[N], __m256i x) {
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) Sum::add(sum[STRIDE * n], y[n], x);
}

// Decodes the bytes of n scales, followed by zeros up to UNIT.
inline void read_scales(const Book& book, const Side& side, int64_t line, int64_t token, int n, float* to) {
    const uint8_t* from = side.scale.row(line, token, 1);
    if (!book.octaves) {
        for (int j = 0; j < UNIT; ++j) to[j] = j < n ? book.scale[from[j]] : 0.0f;
        return;
    }
    // Byte 0 is zero.
    alignas(16) uint8_t some[UNIT] = {};
    if (n < UNIT) {
        std::memcpy(some, from, size_t(n));
        from = some;
    }
    // Scales double every eight bytes: three bits are looked up, the others are added to the exponent.
    const __m256 base = _mm256_load_ps(book.scale + 128);
    for (int j = 0; j < UNIT; j += 8) {
        const __m256i byte = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from + j)));
        const __m256i mantissa = _mm256_castps_si256(_mm256_permutevar8x32_ps(base, byte));
        const __m256i octave = _mm256_sub_epi32(_mm256_srli_epi32(byte, 3), _mm256_set1_epi32(16));
        const __m256i length = _mm256_add_epi32(mantissa, _mm256_slli_epi32(octave, 23));
        const __m256i zero = _mm256_cmpeq_epi32(byte, _mm256_setzero_si256());
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + j), _mm256_andnot_si256(zero, length));
    }
}

// Looks codewords up in memory: points by loads and stores of single words, for many codes at once, because reading a register
// back immediately would stall on the stores of its words; then moves, 16 at a time, by a byte shuffle and a sign change.
// SHORT: codes are 16 bits long, of which five are the move.
template <bool SHORT>
class Codewords {
  public:
    // Part p of the codewords.
    Codewords(const Book& book, int part)
        : table_(book.part[part].data()),
          half_(book.bits / 2),
          point_shift_(_mm_cvtsi32_si128(book.move_bits)),
          point_mask_(_mm256_set1_epi32(int((1u << (book.bits - book.move_bits)) - 1))),
          move_mask_(_mm256_set1_epi16(short((1 << book.move_bits) - 1))),
          few_{_mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(book.move_number))),
               _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(book.move_number + 16)))},
          controls_(_mm256_load_si256(reinterpret_cast<const __m256i*>(book.few_controls))),
          signs_(_mm256_load_si256(reinterpret_cast<const __m256i*>(book.few_signs))) {
        alignas(32) uint8_t spread[32];
        alignas(32) int32_t shift[8];
        for (int i = 0; i < 8; ++i) {
            const int bit = i % 4 * book.bits;
            shift[i] = bit % 8;
            for (int j = 0; j < 4; ++j) spread[4 * i + j] = uint8_t(bit / 8 + j);
        }
        spread_ = _mm256_load_si256(reinterpret_cast<const __m256i*>(spread));
        shift_ = _mm256_load_si256(reinterpret_cast<const __m256i*>(shift));
    }

    // Loads the points of the eight codes at `from`, a word of four bytes each.
    inline __attribute__((always_inline)) void points(const uint8_t* from, uint32_t* to) const {
        if constexpr (SHORT) {
            uint64_t four[2];
            std::memcpy(four, from, 16);
#pragma GCC unroll 2
            for (int i = 0; i < 2; ++i)
#pragma GCC unroll 4
                for (int j = 0; j < 4; ++j) to[4 * i + j] = table_[four[i] >> (16 * j + 5) & 0x7ff];
        } else {
            alignas(32) uint32_t point[8];
            const __m256i code = _mm256_srl_epi32(codes(from, from + half_), point_shift_);
            _mm256_store_si256(reinterpret_cast<__m256i*>(point), _mm256_and_si256(code, point_mask_));
#pragma GCC unroll 8
            for (int j = 0; j < 8; ++j) to[j] = table_[point[j]];
        }
    }

    // Applies moves to points. x[0] has four codes at a and four at b; x[1] has the next four of each.
    inline __attribute__((always_inline)) void rows(const uint8_t* a, const uint8_t* b, __m256i x[2]) const {
        if constexpr (SHORT) apply(_mm256_and_si256(join(a, b), move_mask_), x);
        else apply(moves(codes(a, b), codes(a + half_, b + half_)), x);
    }

    // Does the same for eight codes at a in x[0], and eight at b in x[1].
    inline __attribute__((always_inline)) void pair(const uint8_t* a, const uint8_t* b, __m256i x[2]) const {
        if constexpr (SHORT) {
            const __m128i low = load(a), high = load(b);
            const __m256i both = _mm256_set_m128i(_mm_unpackhi_epi64(low, high), _mm_unpacklo_epi64(low, high));
            apply(_mm256_and_si256(both, move_mask_), x);
        } else {
            apply(moves(codes(a, a + half_), codes(b, b + half_)), x);
        }
    }

  private:
    static inline __attribute__((always_inline)) __m128i load(const uint8_t* from) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)); }

    static inline __attribute__((always_inline)) __m256i join(const uint8_t* a, const uint8_t* b) { return _mm256_set_m128i(load(b), load(a)); }

    // Loads four codes at a and four at b, each in a word whose other bits belong to other codes.
    inline __attribute__((always_inline)) __m256i codes(const uint8_t* a, const uint8_t* b) const {
        return _mm256_srlv_epi32(_mm256_shuffle_epi8(join(a, b), spread_), shift_);
    }

    inline __attribute__((always_inline)) __m256i moves(__m256i first, __m256i second) const {
        const __m256i mask = _mm256_srli_epi32(move_mask_, 16);
        return _mm256_packus_epi32(_mm256_and_si256(first, mask), _mm256_and_si256(second, mask));
    }

    // moves: 16 bits each.
    inline __attribute__((always_inline)) void apply(__m256i moves, __m256i x[2]) const {
        // The permutation and the signs of each move.
        const __m256i number = _mm256_blendv_epi8(_mm256_shuffle_epi8(few_[0], moves), _mm256_shuffle_epi8(few_[1], moves), _mm256_slli_epi16(moves, 3));
        x[0] = moved(x[0], _mm256_unpacklo_epi16(number, number));
        x[1] = moved(x[1], _mm256_unpackhi_epi16(number, number));
    }

    // number: in each word the index of the signs in the lowest three bits, that of the permutation in the next three.
    inline __attribute__((always_inline)) __m256i moved(__m256i words, __m256i number) const {
        const __m256i lane = _mm256_setr_epi32(0, 0x04040404, 0x08080808, 0x0c0c0c0c, 0, 0x04040404, 0x08080808, 0x0c0c0c0c);
        const __m256i control = _mm256_or_si256(_mm256_permutevar8x32_epi32(controls_, _mm256_srli_epi32(number, 3)), lane);
        return _mm256_sign_epi8(_mm256_shuffle_epi8(words, control), _mm256_permutevar8x32_epi32(signs_, number));
    }

    const uint32_t* const table_;
    const int half_;  // bytes of four codes
    const __m128i point_shift_;
    const __m256i point_mask_, move_mask_;
    const __m256i few_[2];
    const __m256i controls_, signs_;
    __m256i spread_, shift_;
};

inline bool short_codes(const Book& book) { return book.bits == 16 && book.move_bits == 5; }

inline __attribute__((always_inline)) __m256i load_words(const uint32_t* a, const uint32_t* b) {
    return _mm256_set_m128i(_mm_load_si128(reinterpret_cast<const __m128i*>(b)), _mm_load_si128(reinterpret_cast<const __m128i*>(a)));
}

// Widens components 0 and 2, or 1 and 3, from bytes to 16 bits.
inline __attribute__((always_inline)) __m256i even(__m256i x) { return _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8); }
inline __attribute__((always_inline)) __m256i odd(__m256i x) { return _mm256_srai_epi16(x, 8); }

// Whether loads stay within a row's codes.
inline bool exact_rows(const Book& book, int chunks) { return short_codes(book) && chunks % 8 == 0; }

constexpr float TWO_PARTS[2] = {128.0f, 1.0f};  // weights of the two parts of a codeword

// Not inlined, because each of these functions uses all registers.
template <bool SHORT, class Sum>
class Avx2Keys {
  public:
    using Book = tessera::Book;

    Avx2Keys(const Book& book, int chunks, int limbs, int, Memory& memory)
        : book_(book),
          dim_(4 * chunks),
          steps_((chunks + 7) / 8),
          limbs_(limbs > 2 ? 2 : 1),
          codewords_{{book, 0}, {book, book.parts - 1}},
          rows_(book.row_bytes(chunks), exact_rows(book, chunks), 1, memory),
          query_limbs_(memory.take<int16_t>(size_t(TILE) * limbs_ * steps_ * 32)),
          words_(memory.take<uint32_t>(size_t(UNIT) * steps_ * 8)),
          planes_(memory.take<__m256i>(size_t(book.parts) * 8 * steps_ * 4)) {}

    void lengths(const Side& side, int64_t line, int64_t token, int n, float* to) const { read_scales(book_, side, line, token, n, to); }

    // Rounds to 16 bits, and with two limbs keeps the remainder in 16 more.
    void set_queries(const float* q, int rows) {
        const int size = 32 * steps_;
        alignas(32) float x[MAX_DIM];
        std::fill(x, x + size, 0.0f);
        for (int r = 0; r < rows; ++r) {
            std::copy(q + size_t(r) * dim_, q + size_t(r + 1) * dim_, x);
            Lanes highest = {};
            for (int c = 0; c < size; c += LANES) {
                const Lanes y = load(x + c), length = y < 0 ? -y : y;
                highest = length > highest ? length : highest;
            }
            const float most = largest(highest);
            // A query of zeros, or whose scale underflows, has scores of zero.
            const float inverse = most > 1e-30f ? MOST / most : 0.0f;
            for (int c = 0; c < size; c += LANES) store(x + c, load(x + c) * inverse);
            worth_[r][0] = most / MOST * book_.step;
            worth_[r][1] = worth_[r][0] / BASE;
            for (int l = 0; l < limbs_; ++l) {
                __m128i* to = reinterpret_cast<__m128i*>(query_limbs_ + (size_t(r) * limbs_ + l) * size);
                for (int c = 0; c < size; c += 16, to += 2) {
                    __m128 near[4];
                    for (int i = 0; i < 4; ++i) {
                        const __m128 y = _mm_load_ps(x + c + 4 * i);
                        near[i] = _mm_round_ps(y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
                        _mm_store_ps(x + c + 4 * i, _mm_mul_ps(_mm_sub_ps(y, near[i]), _mm_set1_ps(BASE)));
                    }
                    _mm_store_si128(to, _mm_packs_epi32(_mm_cvtps_epi32(_mm_shuffle_ps(near[0], near[1], 0x88)), _mm_cvtps_epi32(_mm_shuffle_ps(near[2], near[3], 0x88))));
                    _mm_store_si128(to + 1, _mm_packs_epi32(_mm_cvtps_epi32(_mm_shuffle_ps(near[0], near[1], 0xdd)), _mm_cvtps_epi32(_mm_shuffle_ps(near[2], near[3], 0xdd))));
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
            int r = 0;
            if (limbs_ == 2) {
                for (; r < rows; ++r) dot_some<1, 2>(r, scores, stride);
            } else {
                for (; r + 2 <= rows; r += 2) dot_some<2, 1>(r, scores, stride);
                if (r < rows) dot_some<1, 1>(r, scores, stride);
            }
        }
    }

  private:
    static constexpr float MOST = 32767.0f;  // |limb|; 512 products of it with components up to 127 fit 32 bits
    static constexpr float BASE = 65534.0f;

    // Planes 4 h + t, t < 4, have tokens 8 h + t in the lower halves of registers and 8 h + 4 + t in the upper, so that sums
    // are in order. For each four chunks of a vector: components 0 and 2, then 1 and 3.
    [[gnu::noinline]] void look_up(const uint8_t* const* row, int part) const {
        const Codewords<SHORT> codewords = codewords_[part];  // a copy: stores do not change it
        const int step = book_.bits;                          // bytes of eight codes
        uint32_t* word = words_;
        for (int t = 0; t < UNIT; ++t)
            for (int s = 0; s < steps_; ++s, word += 8) codewords.points(row[t] + s * step, word);
        __m256i* to = planes_ + size_t(part) * 8 * steps_ * 4;
        for (int t = 0; t < 8; ++t) {
            const int first = t / 4 * 8 + t % 4, second = first + 4;
            const uint8_t *a = row[first], *b = row[second];
            const uint32_t *u = words_ + first * 8 * steps_, *v = words_ + second * 8 * steps_;
            for (int s = 0; s < steps_; ++s, a += step, b += step, u += 8, v += 8, to += 4) {
                __m256i x[2] = {load_words(u, v), load_words(u + 4, v + 4)};
                codewords.rows(a, b, x);
#pragma GCC unroll 2
                for (int i = 0; i < 2; ++i) {
                    _mm256_store_si256(to + 2 * i, even(x[i]));
                    _mm256_store_si256(to + 2 * i + 1, odd(x[i]));
                }
            }
        }
    }

    template <int ROWS, int LIMBS>
    [[gnu::noinline]] void dot_some(int r, float* scores, int stride) const {
        const int steps = 4 * steps_;
        const int16_t* limbs = query_limbs_ + size_t(r) * LIMBS * 8 * steps;
        for (int half = 0; half < 2; ++half) {
            __m256 total[ROWS];
            for (int part = 0; part < book_.parts; ++part) {
                __m256i sum[ROWS * LIMBS];
                products<ROWS * LIMBS>(planes_ + (size_t(part) * 8 + 4 * half) * steps, limbs, steps, sum);
                const float weight = book_.parts == 2 ? TWO_PARTS[part] : 1.0f;
                for (int i = 0; i < ROWS; ++i)
                    for (int l = 0; l < LIMBS; ++l) {
                        const __m256 exact = _mm256_cvtepi32_ps(sum[i * LIMBS + l]), worth = _mm256_set1_ps(worth_[r + i][l] * weight);
                        total[i] = part == 0 && l == 0 ? _mm256_mul_ps(exact, worth) : _mm256_fmadd_ps(exact, worth, total[i]);
                    }
            }
            for (int i = 0; i < ROWS; ++i) _mm256_storeu_ps(scores + (r + i) * stride + 8 * half, total[i]);
        }
    }

    // Adds the products of four planes, eight vectors, with N rows of limbs.
    template <int N>
    [[gnu::noinline]] static void products(const __m256i* plane, const int16_t* limbs, int steps, __m256i out[N]) {
        __m256i sum[N][4];
#pragma GCC unroll 2
        for (int n = 0; n < N; ++n)
#pragma GCC unroll 4
            for (int t = 0; t < 4; ++t) sum[n][t] = _mm256_setzero_si256();
        for (int k = 0; k < steps; ++k, ++plane, limbs += 8) {
            __m256i q[N];
#pragma GCC unroll 2
            for (int n = 0; n < N; ++n) q[n] = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(limbs + size_t(n) * 8 * steps)));
#pragma GCC unroll 4
            for (int t = 0; t < 4; ++t) add_all<Sum, N, 4>(&sum[0][t], q, load_once(plane + t * steps));
        }
#pragma GCC unroll 2
        for (int n = 0; n < N; ++n)
            out[n] = _mm256_hadd_epi32(_mm256_hadd_epi32(sum[n][0], sum[n][1]), _mm256_hadd_epi32(sum[n][2], sum[n][3]));
    }

    const Book& book_;
    const int dim_, steps_, limbs_;  // steps: of eight chunks
    const Codewords<SHORT> codewords_[2];
    const Rows rows_;
    int16_t* const query_limbs_;   // (TILE, limbs, steps, 4, 8), in the order of the planes
    uint32_t* const words_;   // (UNIT, steps, 8)
    __m256i* const planes_;   // (parts, 2, 4, steps, 4)
    float worth_[TILE][2] = {};
};

template <bool SHORT, class Sum>
class Avx2Values {
  public:
    using Book = tessera::Book;

    Avx2Values(const Book& book, int chunks, int limbs, int, Memory& memory)
        : book_(book),
          dim_(4 * chunks),
          spans_((chunks + 7) / 8),
          limbs_(limbs > 2 ? 2 : 1),
          codewords_{{book, 0}, {book, book.parts - 1}},
          rows_(book.row_bytes(chunks), exact_rows(book, chunks), BLOCK / UNIT, memory),
          planes_(memory.take<__m256i>(size_t(book.parts) * BLOCK / 2 * 4)),
          weights_(memory.take<int16_t>(size_t(TILE) * limbs_ * BLOCK)) {}

    void lengths(const Side& side, int64_t line, int64_t token, int n, float* to) const { read_scales(book_, side, line, token, n, to); }

    // Adds weights[r] · (vectors coded in `unit`) to sum[r], UNIT tokens each or `count`; high[r]: the largest weight.
    void add(const Unit* unit, int units, const float* weights, int stride, const float* high, int rows, float* sum) {
        for (int r = 0; r < rows; ++r) {
            if (limbs_ == 1) set_weights<1>(weights + r * stride, units * UNIT, high[r], r);
            else set_weights<2>(weights + r * stride, units * UNIT, high[r], r);
        }
        const uint8_t* row[BLOCK];
        for (int u = 0; u < units; ++u) rows_.find(unit[u], u, row + u * UNIT);
        for (int s = 0; s < spans_; ++s) {
            for (int part = 0; part < book_.parts; ++part) look_up(row, units * UNIT, s, part);
            int r = 0;
            if (limbs_ == 2) {
                for (; r < rows; ++r) add_some<1, 2>(s, r, units, sum);
            } else {
                for (; r + 2 <= rows; r += 2) add_some<2, 1>(s, r, units, sum);
                if (r < rows) add_some<1, 1>(s, r, units, sum);
            }
        }
    }

  private:
    static constexpr int WORDS = 64;  // tokens whose points are looked up before the first is moved

    // Weights take 16 bits minus 2^15, which `bias_` adds back, or two limbs of 12 bits. Fewer bits would lose many small
    // weights, each rounded to zero, next to a large one.
    template <int LIMBS>
    void set_weights(const float* w, int count, float most, int r) {
        constexpr int MOST = LIMBS == 1 ? 0xffff : 0xffffff;
        share_[r] = most / float(MOST) * book_.step;
        const __m256 inverse = _mm256_set1_ps(most > 1e-30f ? float(MOST) / most : 0.0f);
        int16_t* to = weights_ + size_t(r) * LIMBS * BLOCK;
        for (int j = 0; j < count; j += 16) {
            __m256i whole[2];
            for (int i = 0; i < 2; ++i)
                whole[i] = _mm256_min_epi32(_mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(w + j + 8 * i), inverse)), _mm256_set1_epi32(MOST));
            if constexpr (LIMBS == 1) {
                put(_mm256_sub_epi32(whole[0], _mm256_set1_epi32(0x8000)), _mm256_sub_epi32(whole[1], _mm256_set1_epi32(0x8000)), to + j);
            } else {
                put(_mm256_srli_epi32(whole[0], 12), _mm256_srli_epi32(whole[1], 12), to + j);
                put(_mm256_and_si256(whole[0], _mm256_set1_epi32(0xfff)), _mm256_and_si256(whole[1], _mm256_set1_epi32(0xfff)), to + BLOCK + j);
            }
        }
    }

    static void put(__m256i a, __m256i b, int16_t* to) {
        _mm256_store_si256(reinterpret_cast<__m256i*>(to), _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8));
    }

    // Decodes span s, eight chunks, of all tokens; the numbers of two tokens alternate.
    [[gnu::noinline]] void look_up(const uint8_t* const* row, int count, int s, int part) {
        const Codewords<SHORT> codewords = codewords_[part];
        const int at = s * book_.bits;
        __m256i* to = planes_ + size_t(part) * BLOCK / 2 * 4;
        __m256i sum[4];  // of at most 128 bytes each
        for (int i = 0; i < 4; ++i) sum[i] = _mm256_setzero_si256();
        alignas(32) uint32_t words[WORDS * 8];
        for (int begin = 0; begin < count; begin += WORDS) {
            const int end = std::min(count, begin + WORDS);
            for (int t = begin; t < end; ++t) codewords.points(row[t] + at, words + (t - begin) * 8);
            const uint32_t* word = words;
            for (int t = begin; t < end; t += 2, to += 4, word += 16) {
                __m256i x[2] = {_mm256_load_si256(reinterpret_cast<const __m256i*>(word)), _mm256_load_si256(reinterpret_cast<const __m256i*>(word + 8))};
                codewords.pair(row[t] + at, row[t + 1] + at, x);
                const __m256i low = _mm256_unpacklo_epi16(x[0], x[1]), high = _mm256_unpackhi_epi16(x[0], x[1]);
                const __m256i all[4] = {even(low), odd(low), even(high), odd(high)};
#pragma GCC unroll 4
                for (int i = 0; i < 4; ++i) {
                    _mm256_store_si256(to + i, all[i]);
                    sum[i] = _mm256_add_epi16(sum[i], all[i]);
                }
            }
        }
        for (int i = 0; i < 4; ++i) bias_[part][i] = _mm256_slli_epi32(_mm256_madd_epi16(sum[i], _mm256_set1_epi16(1)), 15);
    }

    template <int ROWS, int LIMBS>
    [[gnu::noinline]] void add_some(int s, int r, int units, float* sum) const {
        __m256 total[ROWS][4];
        for (int part = 0; part < book_.parts; ++part) {
            __m256i dot[ROWS * LIMBS][4];
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) dot[0][i] = LIMBS == 1 ? bias_[part][i] : _mm256_setzero_si256();
            products<ROWS * LIMBS>(planes_ + size_t(part) * BLOCK / 2 * 4, weights_ + size_t(r) * LIMBS * BLOCK, units * UNIT / 2, dot);
            const __m256 worth = _mm256_set1_ps(book_.parts == 2 ? TWO_PARTS[part] : 1.0f);
            for (int j = 0; j < ROWS; ++j)
                for (int i = 0; i < 4; ++i) {
                    __m256 whole = _mm256_cvtepi32_ps(dot[j * LIMBS][i]);
                    if (LIMBS == 2) whole = _mm256_fmadd_ps(whole, _mm256_set1_ps(4096.0f), _mm256_cvtepi32_ps(dot[j * LIMBS + LIMBS - 1][i]));
                    total[j][i] = part == 0 ? _mm256_mul_ps(whole, worth) : _mm256_fmadd_ps(whole, worth, total[j][i]);
                }
        }
        for (int j = 0; j < ROWS; ++j) {
            // Vectors 0 and 1 have components 0, 2 and 1, 3 of chunks 0, 1, 4 and 5; vectors 2 and 3 those of chunks 2, 3, 6
            // and 7.
            const __m256 chunk[4] = {_mm256_unpacklo_ps(total[j][0], total[j][1]), _mm256_unpackhi_ps(total[j][0], total[j][1]),
                                     _mm256_unpacklo_ps(total[j][2], total[j][3]), _mm256_unpackhi_ps(total[j][2], total[j][3])};
            alignas(32) float flat[32];
            const __m256 share = _mm256_set1_ps(share_[r + j]);
            for (int i = 0; i < 4; ++i) {
                const __m256 value = _mm256_mul_ps(chunk[i], share);
                _mm_store_ps(flat + 4 * i, _mm256_castps256_ps128(value));
                _mm_store_ps(flat + 16 + 4 * i, _mm256_extractf128_ps(value, 1));
            }
            float* to = sum + size_t(r + j) * dim_ + 32 * s;
            const int count = std::min(32, dim_ - 32 * s);
            for (int k = 0; k < count; ++k) to[k] += flat[k];
        }
    }

    // Adds products with N rows of weights over pairs of tokens; the sums of all rows begin at sum[0].
    template <int N>
    [[gnu::noinline]] static void products(const __m256i* plane, const int16_t* weight, int pairs, __m256i out[N][4]) {
        __m256i sum[N][4];
#pragma GCC unroll 2
        for (int n = 0; n < N; ++n)
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) sum[n][i] = out[0][i];
        for (int pair = 0; pair < pairs; ++pair, plane += 4, weight += 2) {
            __m256i w[N];
#pragma GCC unroll 2
            for (int n = 0; n < N; ++n) {
                int32_t both;
                std::memcpy(&both, weight + n * BLOCK, 4);
                w[n] = _mm256_set1_epi32(both);
            }
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) add_all<Sum, N, 4>(&sum[0][i], w, load_once(plane + i));
        }
#pragma GCC unroll 2
        for (int n = 0; n < N; ++n)
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) out[n][i] = sum[n][i];
    }

    const Book& book_;
    const int dim_, spans_, limbs_;  // spans: of eight chunks
    const Codewords<SHORT> codewords_[2];
    const Rows rows_;
    __m256i* const planes_;    // (parts, BLOCK / 2, 4)
    int16_t* const weights_;   // (TILE, limbs, BLOCK)
    __m256i bias_[2][4];       // 2^15 times the sums of the planes
    float share_[TILE] = {};
};

}  // namespace
