// Reads codewords and scales on Arm. Included once per instruction set, after attend_impl.hpp.

namespace {

// Decodes four codes at a time: points are loaded from memory, a word of four bytes each; then moves are applied with a table
// lookup that permutes bytes, and sign changes.
class Codewords {
  public:
    // Part p of the codewords.
    Codewords(const Book& book, int p)
        : table_(book.part[p].data()),
          point_shift_(vdupq_n_s32(-book.move_bits)),
          point_mask_(vdupq_n_u32((1u << (book.bits - book.move_bits)) - 1)),
          move_mask_(vdupq_n_u8(uint8_t((1 << book.move_bits) - 1))),
          numbers_(pair(book.move_number)),
          controls_(pair(reinterpret_cast<const uint8_t*>(book.few_controls))),
          signs_(pair(reinterpret_cast<const uint8_t*>(book.few_signs))) {
        uint8_t spread[16], word[16], byte[16];
        int32_t shift[4];
        for (int i = 0; i < 16; ++i) {
            spread[i] = uint8_t(i / 4 * book.bits / 8 + i % 4);
            word[i] = uint8_t(i / 4 * 4), byte[i] = uint8_t(i % 4);
        }
        for (int i = 0; i < 4; ++i) shift[i] = -(i * book.bits % 8);
        spread_ = vld1q_u8(spread), word_ = vld1q_u8(word), byte_ = vld1q_u8(byte), shift_ = vld1q_s32(shift);
    }

    // Decodes the four codes at `from`, where 16 bytes may be read.
    inline __attribute__((always_inline)) int8x16_t four(const uint8_t* from) const {
        const uint32x4_t code = vshlq_u32(vreinterpretq_u32_u8(vqtbl1q_u8(vld1q_u8(from), spread_)), shift_);
        const uint32x4_t point = vandq_u32(vshlq_u32(code, point_shift_), point_mask_);
        uint32x4_t words = vdupq_n_u32(table_[vgetq_lane_u32(point, 0)]);
        words = vld1q_lane_u32(table_ + vgetq_lane_u32(point, 1), words, 1);
        words = vld1q_lane_u32(table_ + vgetq_lane_u32(point, 2), words, 2);
        words = vld1q_lane_u32(table_ + vgetq_lane_u32(point, 3), words, 3);
        const uint8x16_t move = vandq_u8(vqtbl1q_u8(vreinterpretq_u8_u32(code), word_), move_mask_);  // in all four bytes of its word
        // The permutation and the signs of each move.
        const uint8x16_t number = vqtbl2q_u8(numbers_, move);
        const uint8x16_t control = vqtbl2q_u8(controls_, vsliq_n_u8(byte_, vshrq_n_u8(number, 3), 2));
        const uint8x16_t sign = vqtbl2q_u8(signs_, vsliq_n_u8(byte_, vandq_u8(number, vdupq_n_u8(7)), 2));
        const uint8x16_t moved = vqtbl1q_u8(vreinterpretq_u8_u32(words), vaddq_u8(control, word_));
        return vmulq_s8(vreinterpretq_s8_u8(moved), vreinterpretq_s8_u8(sign));
    }

  private:
    static uint8x16x2_t pair(const uint8_t* from) { return {{vld1q_u8(from), vld1q_u8(from + 16)}}; }

    const uint32_t* const table_;
    const int32x4_t point_shift_;
    const uint32x4_t point_mask_;
    const uint8x16_t move_mask_;
    const uint8x16x2_t numbers_, controls_, signs_;
    uint8x16_t spread_, word_, byte_;  // word: 4 times the index of a byte's word; byte: its index in the word
    int32x4_t shift_;
};

// Decodes the bytes of n scales, followed by zeros up to UNIT.
inline void read_scales(const Book& book, const Side& side, int64_t line, int64_t token, int n, float* to) {
    const uint8_t* from = side.scale.row(line, token, 1);
    for (int j = 0; j < n; ++j) to[j] = book.scale[from[j]];
    for (int j = n; j < UNIT; ++j) to[j] = 0.0f;
}

constexpr float TWO_PARTS[2] = {128.0f, 1.0f};  // weights of the two parts of a codeword

// Whether both keys and values have such codewords.
inline bool both_few_moves(const Problem& p) {
    for (const Coder* coder : {p.key, p.value})
        if (coder->kind != Coder::JOINT || !static_cast<const Book*>(coder)->few_moves) return false;
    return true;
}

}  // namespace
