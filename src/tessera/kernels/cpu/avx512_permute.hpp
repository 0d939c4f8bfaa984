// Looks codewords up in registers: for 64 codes, component j of each is picked from tables of 128 bytes by permutations of two
// registers, and moved by blends. This is faster than loading single codewords if a codebook needs few tables.

namespace {

template <int TABLES>
class Permute {
  public:
    // biased: 128 is added to every component.
    Permute(const Book& book, int, bool biased, Order order)
        : tables_(&book.bytes[biased][0][0][0]),
          row_bits_(book.bits),
          moves_(_mm512_load_si512(book.move_bytes)),
          blocks_(_mm512_load_si512(book.block_bytes)) {
        alignas(64) uint8_t first[64], second[64], points[64], moves[64], spread[64];
        for (int i = 0; i < 64; ++i) {
            // Masks for four codes in 64 bits: first points and moves, second blocks.
            const int at = book.bits * (i % 4);
            first[i] = uint8_t((at + (i % 8 < 4 ? book.move_bits : 0)) % 64);
            second[i] = uint8_t((at + book.move_bits + 7) % 64);
            const int row = order == KEYS ? i / 16 : i % 4, chunk = order == KEYS ? i % 16 : i / 4;
            points[i] = uint8_t(32 * row + chunk / 4 * 8 + chunk % 4);
            moves[i] = points[i] + 4;
            spread[i] = uint8_t(i / 32 * 32 + i % 32 / 8 * book.bits / 2 + i % 8);
        }
        first_ = _mm512_load_si512(first), second_ = _mm512_load_si512(second), spread_ = _mm512_load_si512(spread);
        point_order_ = _mm512_load_si512(points), move_order_ = _mm512_load_si512(moves);
    }

    // Decodes 16 chunks, or `count`, of two times four vectors, whose codes are at first + i · step
    // and second + i · step. Two times four, so that two lookups share the loads of a table.
    inline __attribute__((always_inline)) void operator()(const uint8_t* first, const uint8_t* second, int64_t step, int count,
                                                          __m512i out[2][4]) const {
        Split split[2];
        if (row_bits_ == 16 && count == 16) {
            split[0] = part(pair(first, first + step), pair(first + 2 * step, first + 3 * step));
            split[1] = part(pair(second, second + step), pair(second + 2 * step, second + 3 * step));
        } else {
            split[0] = part(spread(first, first + step, count), spread(first + 2 * step, first + 3 * step, count));
            split[1] = part(spread(second, second + step, count), spread(second + 2 * step, second + 3 * step, count));
        }
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j)
#pragma GCC unroll 2
            for (int v = 0; v < 2; ++v) out[v][j] = split[v].point;
#pragma GCC unroll 6
        for (int t = 0; t < TABLES; ++t) {
            const __mmask64 here[2] = {test(split[0].block, 1 << t), test(split[1].block, 1 << t)};
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) {
                const uint8_t* table = tables_ + (t * 4 + j) * 128;
                const __m512i a = _mm512_load_si512(table), b = _mm512_load_si512(table + 64);
#pragma GCC unroll 2
                for (int v = 0; v < 2; ++v) pick(out[v][j], here[v], a, b);
            }
        }
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v) move(split[v], out[v]);
    }

  private:
    struct Split {
        __m512i point, move, block;
    };

    // Replaces the bytes of x selected by `where`, which index the table (a, b), by its entries. Inline assembly, because
    // compilers choose the form that overwrites a, and reload it.
    static inline __attribute__((always_inline)) void pick(__m512i& x, __mmask64 where, __m512i a, __m512i b) {
        if (TABLES > 1) asm("vpermi2b %3, %2, %0%{%1%}" : "+v"(x) : "Yk"(where), "v"(a), "v"(b));
        else asm("vpermi2b %2, %1, %0" : "+v"(x) : "v"(a), "v"(b));
    }

    static __mmask64 test(__m512i x, int bit) { return _mm512_test_epi8_mask(x, _mm512_set1_epi8(char(bit))); }

    // Loads the codes of two vectors, four in every 64 bits.
    static inline __attribute__((always_inline)) __m512i pair(const uint8_t* a, const uint8_t* b) {
        const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(a));
        return _mm512_inserti64x4(_mm512_castsi256_si512(low), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b)), 1);
    }

    inline __attribute__((always_inline)) __m512i spread(const uint8_t* a, const uint8_t* b, int count) const {
        const __mmask32 some = __mmask32((uint64_t{1} << ((count * row_bits_ + 7) / 8)) - 1);
        const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_maskz_loadu_epi8(some, a)), _mm256_maskz_loadu_epi8(some, b), 1);
        return _mm512_permutexvar_epi8(spread_, both);
    }

    // Bits above those of a point, a move or a block belong to another code and are ignored by the instructions.
    inline __attribute__((always_inline)) Split part(__m512i a, __m512i b) const {
        const __m512i a0 = _mm512_multishift_epi64_epi8(first_, a), b0 = _mm512_multishift_epi64_epi8(first_, b);
        Split split;
        split.point = _mm512_permutex2var_epi8(a0, point_order_, b0);
        split.move = _mm512_permutexvar_epi8(_mm512_permutex2var_epi8(a0, move_order_, b0), moves_);
        split.block = _mm512_setzero_si512();
        if (TABLES > 1) {
            const __m512i a1 = _mm512_multishift_epi64_epi8(second_, a), b1 = _mm512_multishift_epi64_epi8(second_, b);
            split.block = _mm512_permutexvar_epi8(_mm512_permutex2var_epi8(a1, point_order_, b1), blocks_);
        }
        return split;
    }

    static inline __attribute__((always_inline)) void move(const Split& split, __m512i x[4]) {
        if (TABLES > 4) {
            const __mmask64 once = test(split.block, 64), twice = test(split.block, 128);
            const __m512i a = x[1], b = x[2], c = x[3];
            x[1] = _mm512_mask_mov_epi8(_mm512_mask_mov_epi8(a, once, c), twice, b);
            x[2] = _mm512_mask_mov_epi8(_mm512_mask_mov_epi8(b, once, a), twice, c);
            x[3] = _mm512_mask_mov_epi8(_mm512_mask_mov_epi8(c, once, b), twice, a);
        }
        const __mmask64 one = test(split.move, 1), two = test(split.move, 2);
        const __m512i a = _mm512_mask_mov_epi8(x[0], one, x[1]), b = _mm512_mask_mov_epi8(x[1], one, x[0]);
        const __m512i c = _mm512_mask_mov_epi8(x[2], one, x[3]), d = _mm512_mask_mov_epi8(x[3], one, x[2]);
        x[0] = _mm512_mask_mov_epi8(a, two, c), x[1] = _mm512_mask_mov_epi8(b, two, d);
        x[2] = _mm512_mask_mov_epi8(c, two, a), x[3] = _mm512_mask_mov_epi8(d, two, b);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) x[j] = _mm512_mask_sub_epi8(x[j], test(split.move, 4 << j), _mm512_setzero_si512(), x[j]);
    }

    const uint8_t* tables_;
    const int row_bits_;
    const __m512i moves_, blocks_;
    __m512i first_, second_, spread_, point_order_, move_order_;
};

}  // namespace
