// Reads vectors of a joint codebook. For tiles.hpp.

namespace {

// Calls use(k, code) for each of `count` packed codes of up to 25 bits.
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
    // Codes that four bytes of the row contain are read at once, the last few byte by byte.
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

class ReadPoints : public Reader {
  public:
    ReadPoints(const Book& book, int chunks, Memory& memory)
        : book_(book), chunks_(chunks), words_{memory.take<uint32_t>(chunks), memory.take<uint32_t>(chunks)} {}

    void lengths(const Side& side, int64_t line, int64_t token, int n, float* to) const override {
        const uint8_t* scales = side.scale.row(line, token, 1);
        for (int j = 0; j < n; ++j) to[j] = book_.scale[scales[j]];
        for (int j = n; j < UNIT; ++j) to[j] = 0.0f;
    }

    void read(const Unit& unit, float* to) override {
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

}  // namespace
