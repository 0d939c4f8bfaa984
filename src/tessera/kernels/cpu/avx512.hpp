// The inner loops of attend_impl.hpp with AVX-512 and its dot product of bytes (VNNI).
//
// Queries and softmax weights are written as one to three 8-bit digits, codewords are 8-bit integers, and products are
// added up exactly in 32 bits. Keys want 16 tokens side by side, so that a sum needs no reduction: codes are transposed
// as they are unpacked. Values want four tokens in a 32-bit lane, so that a dot product adds over tokens: codewords are
// interleaved after they are looked up.

namespace {

class Avx512 {
  public:
    class Scratch {
      public:
        Scratch(const Book& book, int chunks, int limbs)
            : book_(book), chunks_(chunks), wide_((chunks + 15) / 16 * 16), dim_(4 * chunks), limbs_(limbs) {
            digits_ = aligned<int32_t>(s0_, size_t(TILE) * 3 * wide_);
            codes_ = aligned<uint32_t>(s1_, size_t(UNIT) * wide_);
            points_ = aligned<uint32_t>(s2_, size_t(UNIT) * wide_);
            words_ = aligned<uint32_t>(s3_, size_t(book.parts) * wide_ * UNIT);
            values_ = aligned<uint32_t>(s4_, size_t(book.parts) * 16 * BLOCK);
            weights_ = aligned<uint32_t>(s5_, size_t(TILE) * 3 * BLOCK / 4);
        }

        void set_queries(const float* q, int rows) {
            for (int r = 0; r < rows; ++r, q += dim_) {
                float most = 0;
                for (int c = 0; c < dim_; ++c) most = std::max(most, std::fabs(q[c]));
                // A query of zeros, or of less than floats resolve, scores zero.
                const float unit = most / 127.0f, inverse = most > 1e-30f ? 127.0f / most : 0.0f;
                int32_t sum[3] = {};
                for (int l = 0; l < limbs_; ++l) std::memset(&digits_[(size_t(r) * 3 + l) * wide_], 0, sizeof(int32_t) * wide_);
                for (int c = 0; c < dim_; ++c) {
                    float rest = q[c] * inverse;
                    for (int l = 0; l < limbs_; ++l, rest *= BASE) {
                        const float digit = std::nearbyint(rest);
                        rest -= digit;
                        reinterpret_cast<int8_t*>(&digits_[(size_t(r) * 3 + l) * wide_])[c] = int8_t(digit);
                        sum[l] += int32_t(digit);
                    }
                }
                float worth = unit * book_.step;
                for (int l = 0; l < limbs_; ++l, worth /= BASE) {
                    worth_[r * 3 + l] = worth;
                    bias_[r * 3 + l] = 128 * sum[l];  // codewords are read with 128 added
                }
            }
        }

        void dot(const uint8_t* codes, int n, int rows, float* scores, int stride) {
            const int64_t bytes = book_.row_bytes(chunks_);
            prefetch(codes + AHEAD * UNIT * bytes, UNIT * bytes);
            for (int k = 0; k < wide_; k += 16) {
                __m512i lines[16];
                for (int j = 0; j < 16; ++j) lines[j] = j < n ? unpack(codes + j * bytes, k) : _mm512_setzero_si512();
                transpose(lines);
                for (int j = 0; j < 16; ++j) keep_codes((k + j) * 16, lines[j]);
            }
            const __m512i half = _mm512_set1_epi8(char(0x80));
            for (int part = 0; part < book_.parts; ++part) {
                const LookUp look_up(book_, part);
                uint32_t* to = words_ + size_t(part) * wide_ * 16;
                for (int k = 0; k < chunks_; ++k)
                    _mm512_store_si512(to + k * 16, _mm512_xor_si512(look_up(codes_ + k * 16, points_ + k * 16), half));
            }
            for (int r = 0; r < rows; r += 4) {
                if (limbs_ == 1) dot_rows<1>(r, std::min(4, rows - r), scores, stride);
                else if (limbs_ == 2) dot_rows<2>(r, std::min(4, rows - r), scores, stride);
                else dot_rows<3>(r, std::min(4, rows - r), scores, stride);
            }
        }

        // sum[r] += weights[r] · the vectors coded in `unit`, each UNIT tokens or `count` of them.
        void add(const Unit* unit, int units, const float* weights, int stride, int rows, float* sum) {
            const int most_digit = (1 << (8 * limbs_)) - 1;
            for (int r = 0; r < rows; ++r) {
                const float* w = weights + r * stride;
                const float most = largest(w, units * UNIT, 0.0f);
                share_[r] = most / float(most_digit) * book_.step;
                const __m512 inverse = _mm512_set1_ps(most > 1e-30f ? float(most_digit) / most : 0.0f);
                uint8_t* to = reinterpret_cast<uint8_t*>(weights_ + size_t(r) * 3 * (BLOCK / 4));
                for (int j = 0; j < units * UNIT; j += 16) {
                    const __m512i near = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(w + j), inverse));
                    const __m512i whole = _mm512_min_epi32(near, _mm512_set1_epi32(most_digit));
                    for (int l = 0; l < limbs_; ++l) {
                        const __m512i digit = _mm512_srl_epi32(whole, _mm_cvtsi32_si128(8 * (limbs_ - 1 - l)));
                        _mm_store_si128(reinterpret_cast<__m128i*>(to + l * BLOCK + j), _mm512_cvtepi32_epi8(digit));
                    }
                }
            }
            for (int k = 0; k < wide_; k += 16) {
                for (int u = 0; u < units; ++u) put_values(unit[u], u, k);
                for (int r = 0; r < rows; r += 2) {
                    if (limbs_ == 1) add_rows<1>(k, r, std::min(2, rows - r), units, sum);
                    else if (limbs_ == 2) add_rows<2>(k, r, std::min(2, rows - r), units, sum);
                    else add_rows<3>(k, r, std::min(2, rows - r), units, sum);
                }
            }
        }

      private:
        static constexpr int AHEAD = 4;        // units that are fetched before they are needed
        static constexpr float BASE = 254.0f;  // of a query's digits, which lie in [-127, 127]

        // Codes k .. k + 15 of a vector.
        __m512i unpack(const uint8_t* row, int k) const {
            const int bits = book_.bits, count = std::min(16, chunks_ - k);
            const uint8_t* from = row + int64_t(k) * bits / 8;
            if (bits == 16) {
                const __mmask32 some = (uint32_t{1} << count) - 1;
                return _mm512_cvtepu16_epi32(_mm512_castsi512_si256(_mm512_maskz_loadu_epi16(some, from)));
            }
            const __mmask64 some = (uint64_t{1} << ((count * bits + 7) / 8)) - 1;
            const __m512i data = _mm512_maskz_loadu_epi8(some, from);
            const __m512i number = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
            const __m512i bit = _mm512_mullo_epi32(number, _mm512_set1_epi32(bits));
            const __m512i byte = _mm512_mullo_epi32(_mm512_srli_epi32(bit, 3), _mm512_set1_epi32(0x01010101));
            const __m512i picked = _mm512_permutexvar_epi8(_mm512_add_epi8(byte, _mm512_set1_epi32(0x03020100)), data);
            const __m512i moved = _mm512_srlv_epi32(picked, _mm512_and_si512(bit, _mm512_set1_epi32(7)));
            const __m512i codes = _mm512_and_si512(moved, _mm512_set1_epi32((1 << bits) - 1));
            return _mm512_maskz_mov_epi32(__mmask16((1u << count) - 1), codes);
        }

        // Chunks k .. k + 15 of a unit's values, the bytes of four tokens side by side: of every four vectors, number c holds,
        // in lane L, the components of chunk k + 4 L + c.
        void put_values(const Unit& unit, int u, int k) {
            const int64_t bytes = book_.row_bytes(chunks_);
            const uint8_t* codes = unit.codes;
            if (k == 0) prefetch(codes + AHEAD * UNIT * bytes, UNIT * bytes);
            const bool whole = book_.bits == 16 && unit.count == UNIT && k + 16 <= chunks_;
            if (whole) {
                for (int j = 0; j < UNIT; ++j) {
                    const __m256i row = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + j * bytes + 2 * k));
                    _mm256_store_si256(reinterpret_cast<__m256i*>(short_points_ + 16 * j), _mm256_srl_epi16(row, _mm_cvtsi32_si128(book_.move_bits)));
                }
            } else {
                // All rows first: a word read back at once would wait for the store. Tokens that are not there have no
                // weight, so any codes do for them, and those kept before are sound.
                for (int j = 0; j < unit.count; ++j) keep_codes(j * 16, unpack(codes + j * bytes, k));
            }
            for (int part = 0; part < book_.parts; ++part) {
                const LookUp look_up(book_, part);
                uint32_t* to = values_ + (size_t(part) * (BLOCK / 4) + u * 4) * 64;
                for (int j = 0; j < 16; j += 4, to += 64) {
                    __m512i line[4];
                    for (int i = 0; i < 4; ++i)
                        line[i] = whole ? look_up(codes + (j + i) * bytes + 2 * k, short_points_ + (j + i) * 16)
                                        : look_up(codes_ + (j + i) * 16, points_ + (j + i) * 16);
                    const __m512i a = _mm512_unpacklo_epi8(line[0], line[1]), b = _mm512_unpackhi_epi8(line[0], line[1]);
                    const __m512i c = _mm512_unpacklo_epi8(line[2], line[3]), d = _mm512_unpackhi_epi8(line[2], line[3]);
                    _mm512_store_si512(to, _mm512_unpacklo_epi16(a, c));
                    _mm512_store_si512(to + 16, _mm512_unpackhi_epi16(a, c));
                    _mm512_store_si512(to + 32, _mm512_unpacklo_epi16(b, d));
                    _mm512_store_si512(to + 48, _mm512_unpackhi_epi16(b, d));
                }
            }
        }

        void keep_codes(int at, __m512i codes) {
            _mm512_store_si512(codes_ + at, codes);
            _mm512_store_si512(points_ + at, _mm512_srl_epi32(codes, _mm_cvtsi32_si128(book_.move_bits)));
        }

        static void prefetch(const uint8_t* from, int64_t bytes) {
            for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch(reinterpret_cast<const char*>(from + i), _MM_HINT_T0);
        }

        // Codewords of 16 codes, as signed bytes. Held in registers over a loop.
        struct LookUp {
            const uint32_t* table;
            __m512i mask, lane, control0, control1, negate0, negate1;

            LookUp(const Book& book, int part)
                : table(book.part[part].data()),
                  mask(_mm512_set1_epi32((1 << book.move_bits) - 1)),
                  lane(_mm512_broadcast_i32x4(_mm_set_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0))),
                  control0(_mm512_load_si512(book.control)),
                  control1(_mm512_load_si512(book.control + 16)),
                  negate0(_mm512_load_si512(book.negate)),
                  negate1(_mm512_load_si512(book.negate + 16)) {}

            // Codes of any width, and their points.
            __m512i operator()(const uint32_t* codes, const uint32_t* points) const {
                return turn(gather([points](int i) { return points[i]; }), _mm512_load_si512(codes));
            }

            // Codes of 16 bits where they lie, and their points.
            __m512i operator()(const uint8_t* codes, const uint16_t* points) const {
                const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)));
                return turn(gather([points](int i) { return points[i]; }), wide);
            }

          private:
            // Loads and inserts are faster than a gather instruction on the processors this was measured on.
            template <class Index>
            __m512i gather(Index point) const {
                __m128i quarter[4];
                for (int i = 0; i < 4; ++i) {
                    __m128i x = _mm_cvtsi32_si128(int(table[point(4 * i)]));
                    x = _mm_insert_epi32(x, int(table[point(4 * i + 1)]), 1);
                    x = _mm_insert_epi32(x, int(table[point(4 * i + 2)]), 2);
                    quarter[i] = _mm_insert_epi32(x, int(table[point(4 * i + 3)]), 3);
                }
                return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_set_m128i(quarter[1], quarter[0])),
                                          _mm256_set_m128i(quarter[3], quarter[2]), 1);
            }

            __m512i turn(__m512i words, __m512i codes) const {
                const __m512i move = _mm512_and_si512(codes, mask);
                const __m512i control = _mm512_permutex2var_epi32(control0, move, control1);
                const __m512i negate = _mm512_permutex2var_epi32(negate0, move, negate1);
                const __m512i turned = _mm512_shuffle_epi8(words, _mm512_add_epi32(control, lane));
                return _mm512_sub_epi8(_mm512_xor_si512(turned, negate), negate);
            }
        };

        static void transpose(__m512i x[16]) {
            __m512i y[16];
            for (int i = 0; i < 16; i += 2) {
                y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
                y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
            }
            for (int i = 0; i < 16; i += 4)
                for (int j = 0; j < 2; ++j) {
                    x[i + 2 * j] = _mm512_unpacklo_epi64(y[i + j], y[i + j + 2]);
                    x[i + 2 * j + 1] = _mm512_unpackhi_epi64(y[i + j], y[i + j + 2]);
                }
            // x[4 i + j]: in each 128-bit lane L column 4 L + j of rows 4 i .. 4 i + 3.
            for (int j = 0; j < 4; ++j) {
                const __m512i a = _mm512_shuffle_i32x4(x[j], x[4 + j], 0x44), b = _mm512_shuffle_i32x4(x[j], x[4 + j], 0xee);
                const __m512i c = _mm512_shuffle_i32x4(x[8 + j], x[12 + j], 0x44), d = _mm512_shuffle_i32x4(x[8 + j], x[12 + j], 0xee);
                y[j] = _mm512_shuffle_i32x4(a, c, 0x88);
                y[4 + j] = _mm512_shuffle_i32x4(a, c, 0xdd);
                y[8 + j] = _mm512_shuffle_i32x4(b, d, 0x88);
                y[12 + j] = _mm512_shuffle_i32x4(b, d, 0xdd);
            }
            for (int i = 0; i < 16; ++i) x[i] = y[i];
        }

        template <int LIMBS>
        void dot_rows(int r, int rows, float* scores, int stride) const {
            __m512 total[4];
            for (int i = 0; i < 4; ++i) total[i] = _mm512_setzero_ps();
            for (int part = 0; part < book_.parts; ++part) {
                __m512i sum[4][LIMBS];
                for (int i = 0; i < 4; ++i)
                    for (int l = 0; l < LIMBS; ++l) sum[i][l] = _mm512_setzero_si512();
                const uint32_t* word = words_ + size_t(part) * wide_ * 16;
                for (int k = 0; k < chunks_; ++k) {
                    const __m512i w = _mm512_load_si512(word + k * 16);
#pragma GCC unroll 4
                    for (int i = 0; i < 4; ++i)
#pragma GCC unroll 3
                        for (int l = 0; l < LIMBS; ++l)
                            sum[i][l] = _mm512_dpbusd_epi32(sum[i][l], w, _mm512_set1_epi32(digits_[(size_t(r + i) * 3 + l) * wide_ + k]));
                }
                const float weight = book_.parts == 2 && part == 0 ? 128.0f : 1.0f;
                for (int i = 0; i < rows; ++i)
                    for (int l = 0; l < LIMBS; ++l) {
                        const __m512i exact = _mm512_sub_epi32(sum[i][l], _mm512_set1_epi32(bias_[(r + i) * 3 + l]));
                        total[i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(exact), _mm512_set1_ps(worth_[(r + i) * 3 + l] * weight), total[i]);
                    }
            }
            for (int i = 0; i < rows; ++i) _mm512_storeu_ps(scores + (r + i) * stride, total[i]);
        }

        template <int LIMBS>
        void add_rows(int k, int r, int rows, int units, float* sum) const {
            __m512 total[2][4];
            for (int i = 0; i < 2; ++i)
                for (int c = 0; c < 4; ++c) total[i][c] = _mm512_setzero_ps();
            for (int part = 0; part < book_.parts; ++part) {
                __m512i dot[2][LIMBS][4];
                for (int i = 0; i < 2; ++i)
                    for (int l = 0; l < LIMBS; ++l)
                        for (int c = 0; c < 4; ++c) dot[i][l][c] = _mm512_setzero_si512();
                const uint32_t* word = values_ + size_t(part) * (BLOCK / 4) * 64;
                const uint32_t* weight = weights_ + size_t(r) * 3 * (BLOCK / 4);
                for (int quad = 0; quad < units * 4; ++quad, word += 64)
#pragma GCC unroll 2
                    for (int i = 0; i < 2; ++i)
#pragma GCC unroll 3
                        for (int l = 0; l < LIMBS; ++l) {
                            const __m512i w = _mm512_set1_epi32(int(weight[(size_t(i) * 3 + l) * (BLOCK / 4) + quad]));
#pragma GCC unroll 4
                            for (int c = 0; c < 4; ++c) dot[i][l][c] = _mm512_dpbusd_epi32(dot[i][l][c], w, _mm512_load_si512(word + 16 * c));
                        }
                for (int i = 0; i < rows; ++i)
                    for (int c = 0; c < 4; ++c) {
                        __m512 whole = _mm512_cvtepi32_ps(dot[i][0][c]);
                        for (int l = 1; l < LIMBS; ++l) whole = _mm512_fmadd_ps(whole, _mm512_set1_ps(256.0f), _mm512_cvtepi32_ps(dot[i][l][c]));
                        total[i][c] = _mm512_fmadd_ps(whole, _mm512_set1_ps(book_.parts == 2 && part == 0 ? 128.0f : 1.0f), total[i][c]);
                    }
            }
            // Vector c holds, in lane L, the components of chunk k + 4 L + c.
            alignas(64) float flat[64];
            for (int i = 0; i < rows; ++i) {
                for (int c = 0; c < 4; ++c) {
                    const __m512 value = _mm512_mul_ps(total[i][c], _mm512_set1_ps(share_[r + i]));
                    _mm_store_ps(flat + 4 * c, _mm512_extractf32x4_ps(value, 0));
                    _mm_store_ps(flat + 16 + 4 * c, _mm512_extractf32x4_ps(value, 1));
                    _mm_store_ps(flat + 32 + 4 * c, _mm512_extractf32x4_ps(value, 2));
                    _mm_store_ps(flat + 48 + 4 * c, _mm512_extractf32x4_ps(value, 3));
                }
                float* to = sum + size_t(r + i) * dim_ + 4 * k;
                const int count = std::min(64, dim_ - 4 * k);
                for (int c = 0; c < count; ++c) to[c] += flat[c];
            }
        }

        const Book& book_;
        const int chunks_, wide_, dim_, limbs_;
        std::vector<uint8_t> s0_, s1_, s2_, s3_, s4_, s5_;
        int32_t* digits_;     // (TILE, 3, wide): four 8-bit digits of a row's query a word
        uint32_t *codes_, *points_, *words_, *values_, *weights_;
        alignas(32) uint16_t short_points_[UNIT * 16];
        float worth_[TILE * 3 + 12] = {}, share_[TILE + 4] = {};
        int32_t bias_[TILE * 3 + 12] = {};
    };
};

}  // namespace
