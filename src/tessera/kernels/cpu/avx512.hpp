// The inner loops of attend_impl.hpp with AVX-512 and its dot product of bytes (VNNI).
//
// Queries are written as one to three 8-bit limbs and softmax weights as two or three, codewords are 8-bit integers, and products are
// added up exactly in 32 bits. Codewords come as planes, component j of 64 chunks in one register: for keys, sixteen chunks
// of a vector are adjacent, so that a dot product of bytes adds over chunks; for values, bytes of four vectors are, so that
// it adds over tokens. A decoder (avx512_permute.hpp, avx512_lookup.hpp) makes the planes from packed codes.

namespace {

// Order of the bytes of a plane: 16 row + chunk for keys, 4 chunk + row for values.
enum Order { KEYS, VALUES };

// Adds products of unsigned bytes u and signed bytes s in fours. Inline assembly, because compilers (GCC 12 and earlier)
// copy every sum passed to the intrinsic twice.
inline __attribute__((always_inline)) void add_products(__m512i& sum, __m512i u, __m512i s) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(u), "vm"(s));
}

// Decodes the bytes of n scales, followed by zeros up to UNIT.
inline void read_scales(const Book& book, const Side& side, int64_t line, int64_t token, int n, float* to) {
    const uint8_t* scale = side.scale.row(line, token, 1);
    const __m512i byte = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(__mmask16((1u << n) - 1), scale));
    __m512 length;
    if (book.octaves) {
        // Scales double every eight bytes: three bits are looked up, the others are added to the exponent.
        const __m512 base = _mm512_castps256_ps512(_mm256_load_ps(book.scale + 128));
        const __m512i mantissa = _mm512_castps_si512(_mm512_permutexvar_ps(_mm512_and_si512(byte, _mm512_set1_epi32(7)), base));
        const __m512i octave = _mm512_sub_epi32(_mm512_srli_epi32(byte, 3), _mm512_set1_epi32(16));
        length = _mm512_castsi512_ps(_mm512_add_epi32(mantissa, _mm512_slli_epi32(octave, 23)));
    } else {
        length = _mm512_i32gather_ps(byte, book.scale, 4);
    }
    // Byte 0 means zero, and lanes beyond n are zero.
    _mm512_storeu_ps(to, _mm512_maskz_mov_ps(_mm512_test_epi32_mask(byte, byte), length));
}

// A copy of the codes of fewer than UNIT tokens, padded to UNIT.
class Partial {
  public:
    Partial(int64_t bytes, Memory& memory) : bytes_(bytes), codes_(memory.take<uint8_t>(UNIT * size_t(bytes))) {}

    // Returns the codes of UNIT tokens; those after the first `count` are arbitrary, since their weights are zero.
    const uint8_t* whole(const uint8_t* codes, int count) {
        if (count >= UNIT) return codes;
        std::memcpy(codes_, codes, size_t(count) * size_t(bytes_));
        return codes_;
    }

  private:
    const int64_t bytes_;
    uint8_t* const codes_;
};

// Not inlined, because each of these functions uses all registers: merged, compilers keep sums in memory.
template <class Decoder>
class Avx512Keys {
  public:
    using Book = tessera::Book;

    Avx512Keys(const Book& book, int chunks, int limbs, int, Memory& memory)
        : book_(book),
          chunks_(chunks),
          spans_((chunks + 15) / 16),
          dim_(4 * chunks),
          limbs_(limbs),
          decoders_{{book, 0, true, KEYS}, {book, book.parts - 1, true, KEYS}},
          query_limbs_(memory.take<int8_t>(size_t(TILE) * limbs * spans_ * 64)),
          planes_(memory.take<__m512i>(size_t(book.parts) * 4 * spans_ * 4)),
          partial_(book.row_bytes(chunks), memory) {
        alignas(64) uint8_t order[64];
        for (int i = 0; i < 64; ++i) order[i] = uint8_t(i % 16 * 4 + i / 16);
        order_ = _mm512_load_si512(order);
    }

    void lengths(const Side& side, int64_t line, int64_t token, int n, float* to) const { read_scales(book_, side, line, token, n, to); }

    void set_queries(const float* q, int rows) {
        for (int r = 0; r < rows; ++r, q += dim_) {
            Lanes highest = {};
            int c = 0;
            for (; c + LANES <= dim_; c += LANES) {
                const Lanes x = load(q + c), size = x < 0 ? -x : x;
                highest = size > highest ? size : highest;
            }
            float most = largest(highest);
            for (; c < dim_; ++c) most = std::max(most, std::fabs(q[c]));
            // A query of zeros, or whose scale underflows, has scores of zero.
            const float unit = most / 127.0f, inverse = most > 1e-30f ? 127.0f / most : 0.0f;
            alignas(64) float rest[MAX_DIM];
            for (int c = 0; c < dim_; ++c) rest[c] = q[c] * inverse;
            float worth = unit * book_.step;
            for (int l = 0; l < limbs_; ++l, worth /= BASE) {
                alignas(64) int8_t limb[MAX_DIM];
                int32_t sum = 0;
                for (int c = 0; c < dim_; ++c) {
                    const float near = std::nearbyint(rest[c]);
                    rest[c] = (rest[c] - near) * BASE;
                    limb[c] = int8_t(near);
                    sum += int32_t(near);
                }
                std::memset(limb + dim_, 0, size_t(spans_) * 64 - dim_);
                for (int s = 0; s < spans_; ++s) {
                    const __m512i plane = _mm512_permutexvar_epi8(order_, _mm512_load_si512(limb + 64 * s));
                    int8_t* to = query_limbs_ + ((size_t(r / 4 * 4 * spans_ + s * 4) * 4 + r % 4) * limbs_ + l) * 16;
                    const int next = 4 * limbs_ * 16;
                    _mm_store_si128(reinterpret_cast<__m128i*>(to), _mm512_extracti32x4_epi32(plane, 0));
                    _mm_store_si128(reinterpret_cast<__m128i*>(to + next), _mm512_extracti32x4_epi32(plane, 1));
                    _mm_store_si128(reinterpret_cast<__m128i*>(to + 2 * next), _mm512_extracti32x4_epi32(plane, 2));
                    _mm_store_si128(reinterpret_cast<__m128i*>(to + 3 * next), _mm512_extracti32x4_epi32(plane, 3));
                }
                bias_[r * 3 + l] = 128 * sum;  // corrects for the 128 added to codewords
                worth_[r * 3 + l] = worth;
            }
        }
    }

    // Sets scores[r * stride + j] to <query r, vector j>, without the vector's length, for the unit's tokens, up to GROUP;
    // values after them, up to a multiple of UNIT, are undefined.
    [[gnu::noinline]] void dot(const Unit& vectors, int rows, float* scores, int stride) {
        const uint8_t* codes = vectors.codes;
        int n = vectors.count;
        const int64_t bytes = book_.row_bytes(chunks_);
        const Decoder decoders[2] = {decoders_[0], decoders_[1]};  // copies: stores do not change them
        for (; n > 0; n -= UNIT, codes += UNIT * bytes, scores += UNIT) {
            prefetch(codes + AHEAD * UNIT * bytes, UNIT * bytes);
            const uint8_t* unit = partial_.whole(codes, n);
            // Vector j of a plane's four is 4 j + t, so that sums over lanes are in order.
            for (int part = 0; part < book_.parts; ++part)
                for (int t = 0; t < 4; t += 2) {
                    __m512i* to = planes_ + (size_t(part) * 4 + t) * spans_ * 4;
                    const uint8_t* from = unit + t * bytes;
                    for (int left = chunks_; left > 0; left -= 16, from += 2 * book_.bits, to += 4) {
                        __m512i plane[2][4];
                        decoders[part](from, from + bytes, 4 * bytes, std::min(16, left), plane);
                        for (int j = 0; j < 4; ++j) {
                            _mm512_store_si512(to + j, plane[0][j]);
                            _mm512_store_si512(to + 4 * spans_ + j, plane[1][j]);
                        }
                    }
                }
            for (int r = 0; r < rows; r += 4) {
                if (limbs_ == 1) dot_rows<1>(r, rows - r, scores, stride);
                else if (limbs_ == 2) dot_rows<2>(r, rows - r, scores, stride);
                else dot_rows<3>(r, rows - r, scores, stride);
            }
        }
    }

  private:
    static constexpr float BASE = 254.0f;  // of a query's limbs, in [-127, 127]

    template <int LIMBS>
    void dot_rows(int r, int rows, float* scores, int stride) const {
        if (rows >= 4) dot_some<LIMBS, 4>(r, scores, stride);
        else if (rows == 3) dot_some<LIMBS, 3>(r, scores, stride);
        else if (rows == 2) dot_some<LIMBS, 2>(r, scores, stride);
        else dot_some<LIMBS, 1>(r, scores, stride);
    }

    template <int LIMBS, int ROWS>
    [[gnu::noinline]] void dot_some(int r, float* scores, int stride) const {
        __m512 total[ROWS];
        for (int part = 0; part < book_.parts; ++part) {
            const __m512i* plane = planes_ + size_t(part) * 4 * spans_ * 4;
            const int8_t* limb = query_limbs_ + size_t(r) * LIMBS * spans_ * 64;
            const int steps = 4 * spans_;
            __m512i low[ROWS * LIMBS], high[ROWS * LIMBS];
            products<ROWS * LIMBS>(plane, limb, steps, 4 * LIMBS, low);
            products<ROWS * LIMBS>(plane + 2 * steps, limb, steps, 4 * LIMBS, high);
            const float weight = book_.parts == 2 && part == 0 ? 128.0f : 1.0f;
#pragma GCC unroll 4
            for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 3
                for (int l = 0; l < LIMBS; ++l) {
                    const __m512i x = low[i * LIMBS + l], y = high[i * LIMBS + l];
                    const __m512i sum = _mm512_add_epi32(_mm512_unpacklo_epi64(x, y), _mm512_unpackhi_epi64(x, y));
                    const int at = (r + i) * 3 + l;
                    const __m512 exact = _mm512_cvtepi32_ps(_mm512_sub_epi32(sum, _mm512_set1_epi32(bias_[at])));
                    const __m512 worth = _mm512_set1_ps(worth_[at] * weight);
                    total[i] = part == 0 && l == 0 ? _mm512_mul_ps(exact, worth) : _mm512_fmadd_ps(exact, worth, total[i]);
                }
        }
#pragma GCC unroll 4
        for (int i = 0; i < ROWS; ++i) _mm512_storeu_ps(scores + (r + i) * stride, total[i]);
    }

    // Computes products of two times four vectors with N rows of limbs, summed except over pairs of lanes two apart: lane
    // 4 i of half[n] plus lane 4 i + 2 is the sum for vector i of the first four, lanes 4 i + 1 and 4 i + 3 of the second.
    template <int N>
    static inline __attribute__((always_inline)) void products(const __m512i* plane, const int8_t* limb, int steps, int line, __m512i half[N]) {
        __m512i first[N], second[N];
#pragma GCC unroll 12
        for (int n = 0; n < N; ++n) first[n] = second[n] = _mm512_setzero_si512();
        for (int k = 0; k < steps; ++k, ++plane, limb += 16 * line) {
            const __m512i a = _mm512_load_si512(plane), b = _mm512_load_si512(plane + steps);
#pragma GCC unroll 12
            for (int n = 0; n < N; ++n) {
                const __m512i q = _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(limb + 16 * n)));
                add_products(first[n], a, q);
                add_products(second[n], b, q);
            }
        }
#pragma GCC unroll 12
        for (int n = 0; n < N; ++n)
            half[n] = _mm512_add_epi32(_mm512_unpacklo_epi32(first[n], second[n]), _mm512_unpackhi_epi32(first[n], second[n]));
    }

    const Book& book_;
    const int chunks_, spans_, dim_, limbs_;  // spans: of 16 chunks
    const Decoder decoders_[2];               // of each part
    int8_t* const query_limbs_;                    // (TILE / 4, spans, 4, 4, limbs, 16): component j of 16 chunks, of four rows
    __m512i* const planes_;                   // (parts, 4, spans, 4)
    Partial partial_;
    __m512i order_;  // puts the components of 16 chunks next to each other
    int32_t bias_[TILE * 3] = {};
    float worth_[TILE * 3] = {};
};

template <class Decoder>
class Avx512Values {
  public:
    using Book = tessera::Book;

    Avx512Values(const Book& book, int chunks, int limbs, int, Memory& memory)
        : book_(book),
          chunks_(chunks),
          spans_((chunks + 15) / 16),
          dim_(4 * chunks),
          limbs_(limbs),
          decoders_{{book, 0, false, VALUES}, {book, book.parts - 1, false, VALUES}},
          planes_(memory.take<__m512i>(size_t(book.parts) * BLOCK)),
          weights_(memory.take<uint32_t>(size_t(TILE) * 3 * BLOCK / 4)),
          partial_(book.row_bytes(chunks), memory) {}

    void lengths(const Side& side, int64_t line, int64_t token, int n, float* to) const { read_scales(book_, side, line, token, n, to); }

    // Adds weights[r] · (vectors coded in `unit`) to sum[r], UNIT tokens each or `count`; high[r]: the largest weight.
    [[gnu::noinline]] void add(const Unit* unit, int units, const float* weights, int stride, const float* high, int rows, float* sum) {
        for (int r = 0; r < rows; ++r) {
            if (limbs_ <= 2) set_weights<2>(weights + r * stride, units * UNIT, high[r], r);
            else set_weights<3>(weights + r * stride, units * UNIT, high[r], r);
        }
        const int64_t bytes = book_.row_bytes(chunks_);
        for (int s = 0; s < spans_; ++s) {
            for (int part = 0; part < book_.parts; ++part) {
                const Decoder decode = decoders_[part];
                __m512i* to = planes_ + size_t(part) * BLOCK;
                for (int u = 0; u < units; ++u) {
                    if (s == 0 && part == 0) prefetch(unit[u].codes + AHEAD * UNIT * bytes, UNIT * bytes);
                    const uint8_t* from = partial_.whole(unit[u].codes, unit[u].count) + s * 2 * book_.bits;
                    for (int j = 0; j < UNIT; j += 8, from += 8 * bytes) {
                        __m512i plane[2][4];
                        decode(from, from + 4 * bytes, bytes, std::min(16, chunks_ - 16 * s), plane);
                        for (int v = 0; v < 2; ++v)
                            for (int c = 0; c < 4; ++c) _mm512_store_si512(to++, plane[v][c]);
                    }
                }
            }
            for (int r = 0; r < rows; r += 2) {
                if (limbs_ <= 2) add_rows<2>(s, r, rows - r, units, sum);
                else add_rows<3>(s, r, rows - r, units, sum);
            }
        }
    }

  private:
    // At least two limbs: with one, many small weights would be rounded to zero next to a large one.
    template <int LIMBS>
    void set_weights(const float* w, int count, float most, int r) {
        constexpr int MOST = (1 << (8 * LIMBS)) - 1;
        share_[r] = most / float(MOST) * book_.step;
        const __m512 inverse = _mm512_set1_ps(most > 1e-30f ? float(MOST) / most : 0.0f);
        uint8_t* to = reinterpret_cast<uint8_t*>(weights_ + size_t(r) * 3 * (BLOCK / 4));
        for (int j = 0; j < count; j += 16) {
            const __m512i near = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(w + j), inverse));
            const __m512i whole = _mm512_min_epi32(near, _mm512_set1_epi32(MOST));
#pragma GCC unroll 3
            for (int l = 0; l < LIMBS; ++l)
                _mm_store_si128(reinterpret_cast<__m128i*>(to + l * BLOCK + j), _mm512_cvtepi32_epi8(_mm512_srli_epi32(whole, 8 * (LIMBS - 1 - l))));
        }
    }

    template <int LIMBS>
    void add_rows(int s, int r, int rows, int units, float* sum) const {
        if (rows >= 2) add_some<LIMBS, 2>(s, r, units, sum);
        else add_some<LIMBS, 1>(s, r, units, sum);
    }

    template <int LIMBS, int ROWS>
    [[gnu::noinline]] void add_some(int s, int r, int units, float* sum) const {
        __m512 total[ROWS][4];
        for (int part = 0; part < book_.parts; ++part) {
            __m512i dot[ROWS][LIMBS][4];
            for (int i = 0; i < ROWS; ++i)
                for (int l = 0; l < LIMBS; ++l)
                    for (int c = 0; c < 4; ++c) dot[i][l][c] = _mm512_setzero_si512();
            const __m512i* plane = planes_ + size_t(part) * BLOCK;
            const uint32_t* weight = weights_ + size_t(r) * 3 * (BLOCK / 4);
            for (int quad = 0; quad < units * 4; ++quad, plane += 4) {
                __m512i component[4];
#pragma GCC unroll 4
                for (int c = 0; c < 4; ++c) component[c] = _mm512_load_si512(plane + c);
#pragma GCC unroll 2
                for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 3
                    for (int l = 0; l < LIMBS; ++l) {
                        const __m512i w = _mm512_set1_epi32(int(weight[(size_t(i) * 3 + l) * (BLOCK / 4) + quad]));
#pragma GCC unroll 4
                        for (int c = 0; c < 4; ++c) add_products(dot[i][l][c], w, component[c]);
                    }
            }
            const __m512 worth = _mm512_set1_ps(book_.parts == 2 && part == 0 ? 128.0f : 1.0f);
            for (int i = 0; i < ROWS; ++i)
                for (int c = 0; c < 4; ++c) {
                    __m512 whole = _mm512_cvtepi32_ps(dot[i][0][c]);
                    for (int l = 1; l < LIMBS; ++l) whole = _mm512_fmadd_ps(whole, _mm512_set1_ps(256.0f), _mm512_cvtepi32_ps(dot[i][l][c]));
                    total[i][c] = part == 0 ? _mm512_mul_ps(whole, worth) : _mm512_fmadd_ps(whole, worth, total[i][c]);
                }
        }
        // Lane L of vector c has component c of chunk 16 s + L.
        alignas(64) float flat[64];
        for (int i = 0; i < ROWS; ++i) {
            const __m512 share = _mm512_set1_ps(share_[r + i]);
            const __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(total[i][0], total[i][1])), b = _mm512_castps_pd(_mm512_unpackhi_ps(total[i][0], total[i][1]));
            const __m512d c = _mm512_castps_pd(_mm512_unpacklo_ps(total[i][2], total[i][3])), d = _mm512_castps_pd(_mm512_unpackhi_ps(total[i][2], total[i][3]));
            const __m512d chunk[4] = {_mm512_unpacklo_pd(a, c), _mm512_unpackhi_pd(a, c), _mm512_unpacklo_pd(b, d), _mm512_unpackhi_pd(b, d)};
            for (int j = 0; j < 4; ++j) {
                const __m512 value = _mm512_mul_ps(_mm512_castpd_ps(chunk[j]), share);
                _mm_store_ps(flat + 4 * j, _mm512_extractf32x4_ps(value, 0));
                _mm_store_ps(flat + 16 + 4 * j, _mm512_extractf32x4_ps(value, 1));
                _mm_store_ps(flat + 32 + 4 * j, _mm512_extractf32x4_ps(value, 2));
                _mm_store_ps(flat + 48 + 4 * j, _mm512_extractf32x4_ps(value, 3));
            }
            float* to = sum + size_t(r + i) * dim_ + 64 * s;
            const int count = std::min(64, dim_ - 64 * s);
            for (int k = 0; k < count; ++k) to[k] += flat[k];
        }
    }

    const Book& book_;
    const int chunks_, spans_, dim_, limbs_;  // spans: of 16 chunks
    const Decoder decoders_[2];               // of each part
    __m512i* const planes_;                   // (parts, BLOCK / 4, 4)
    uint32_t* const weights_;                 // (TILE, 3, BLOCK / 4): limbs of four weights a word
    Partial partial_;
    float share_[TILE] = {};
};

}  // namespace
