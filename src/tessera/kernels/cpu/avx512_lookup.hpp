// Looks codewords up in memory, for codebooks of any size: one load per code, then moves by byte shuffles.

namespace {

class Lookup {
  public:
    // Part p of the codewords; biased: 128 is added to every component.
    Lookup(const Book& book, int part, bool biased, Order order)
        : book_(book),
          table_(book.part[part].data()),
          order_(order),
          bias_(biased ? _mm512_set1_epi8(char(0x80)) : _mm512_setzero_si512()),
          mask_(_mm512_set1_epi32((1 << book.move_bits) - 1)),
          lane_(_mm512_broadcast_i32x4(_mm_set_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0))),
          control0_(_mm512_load_si512(book.control)),
          control1_(_mm512_load_si512(book.control + 16)),
          negate0_(_mm512_load_si512(book.negate)),
          negate1_(_mm512_load_si512(book.negate + 16)) {
        alignas(64) uint8_t planes[64], values[64];
        for (int i = 0; i < 64; ++i) {
            planes[i] = uint8_t(i % 16 * 4 + i / 16);
            values[i] = uint8_t(i % 4 * 16 + i / 4);
        }
        planes_ = _mm512_load_si512(planes), values_ = _mm512_load_si512(values);
    }

    // Decodes 16 chunks, or `count`, of two times four vectors, whose codes are at first + i · step
    // and second + i · step.
    void operator()(const uint8_t* first, const uint8_t* second, int64_t step, int count, __m512i out[2][4]) const {
        alignas(64) uint32_t codes[8][16], points[8][16];
        // All rows are stored first: reading a word back immediately would stall on the store.
        for (int i = 0; i < 8; ++i) {
            const __m512i code = unpack((i < 4 ? first : second) + i % 4 * step, count);
            _mm512_store_si512(codes[i], code);
            _mm512_store_si512(points[i], _mm512_srl_epi32(code, _mm_cvtsi32_si128(book_.move_bits)));
        }
        for (int v = 0; v < 2; ++v) {
            __m512i line[4];
            for (int i = 0; i < 4; ++i)
                line[i] = _mm512_permutexvar_epi8(planes_, apply(gather(points[4 * v + i]), _mm512_load_si512(codes[4 * v + i])));
            const __m512i a = _mm512_shuffle_i32x4(line[0], line[1], 0x44), b = _mm512_shuffle_i32x4(line[0], line[1], 0xee);
            const __m512i c = _mm512_shuffle_i32x4(line[2], line[3], 0x44), d = _mm512_shuffle_i32x4(line[2], line[3], 0xee);
            out[v][0] = _mm512_shuffle_i32x4(a, c, 0x88), out[v][1] = _mm512_shuffle_i32x4(a, c, 0xdd);
            out[v][2] = _mm512_shuffle_i32x4(b, d, 0x88), out[v][3] = _mm512_shuffle_i32x4(b, d, 0xdd);
            for (int j = 0; j < 4; ++j) {
                if (order_ == VALUES) out[v][j] = _mm512_permutexvar_epi8(values_, out[v][j]);
                out[v][j] = _mm512_xor_si512(out[v][j], bias_);
            }
        }
    }

  private:
    __m512i unpack(const uint8_t* from, int count) const {
        const int bits = book_.bits;
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

    // Loads and inserts are faster than a gather instruction on the processors this was measured on.
    __m512i gather(const uint32_t* point) const {
        __m128i quarter[4];
        for (int i = 0; i < 4; ++i) {
            __m128i x = _mm_cvtsi32_si128(int(table_[point[4 * i]]));
            x = _mm_insert_epi32(x, int(table_[point[4 * i + 1]]), 1);
            x = _mm_insert_epi32(x, int(table_[point[4 * i + 2]]), 2);
            quarter[i] = _mm_insert_epi32(x, int(table_[point[4 * i + 3]]), 3);
        }
        return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_set_m128i(quarter[1], quarter[0])),
                                  _mm256_set_m128i(quarter[3], quarter[2]), 1);
    }

    __m512i apply(__m512i words, __m512i codes) const {
        const __m512i move = _mm512_and_si512(codes, mask_);
        const __m512i control = _mm512_permutex2var_epi32(control0_, move, control1_);
        const __m512i negate = _mm512_permutex2var_epi32(negate0_, move, negate1_);
        const __m512i moved = _mm512_shuffle_epi8(words, _mm512_add_epi32(control, lane_));
        return _mm512_sub_epi8(_mm512_xor_si512(moved, negate), negate);
    }

    const Book& book_;
    const uint32_t* table_;
    const Order order_;
    const __m512i bias_, mask_, lane_, control0_, control1_, negate0_, negate1_;
    __m512i planes_, values_;
};

}  // namespace
