// Reads vectors coded by direction and radius. For tiles.hpp.

namespace {

typedef float Chunk __attribute__((vector_size(16)));

inline Chunk load_chunk(const float* from) {
    Chunk chunk;
    std::memcpy(&chunk, from, sizeof chunk);
    return chunk;
}

// Returns byte i of a token's flags, without bits for chunks that do not exist.
inline uint32_t flagged(const uint8_t* flags, int i, int chunks) {
    return flags[i] & (chunks >= 8 * (i + 1) ? 255u : (1u << (chunks - 8 * i)) - 1);
}

class ReadDirections : public Reader {
  public:
    ReadDirections(const Products& book, int chunks, int heads) : book_(book), chunks_(chunks), heads_(heads) {}

    // Unquantised chunks have no scale; `read` has already multiplied the others.
    void lengths(const Side&, int64_t, int64_t, int n, float* to) const override {
        std::fill(to, to + n, 1.0f);
        std::fill(to + n, to + UNIT, 0.0f);
    }

    // Aligned, because the position of its short loops changes the portable form's speed by a quarter.
    __attribute__((aligned(64))) void read(const Unit& unit, float* to) override {
        const Side& side = *unit.side;
        const float* words = book_.words[side.role].data() + book_.head_words[side.role] * (unit.line % heads_);
        const int64_t bytes = book_.row_bytes(chunks_);
        const int radius_bits = book_.radius_bits;
        const uint32_t radii = (uint32_t{1} << radius_bits) - 1, count = book_.count;
        const float* levels = book_.levels.data();
        const uint8_t* row = unit.codes;
        for (int j = 0; j < unit.count; ++j, row += bytes, to += 4 * chunks_) {
            uint16_t half;
            std::memcpy(&half, side.scale.row(unit.line, unit.token + j, 2), 2);
            const float scale = half_to_float(half);
            each_code(row, book_.bits, chunks_, [=](int k, uint32_t code) {
                const uint32_t direction = std::min(code >> radius_bits, count);
                const Chunk chunk = load_chunk(words + 4 * size_t(direction)) * (levels[code & radii] * scale);
                std::memcpy(to + 4 * k, &chunk, sizeof chunk);
            });
            if (side.flags.data) put_kept(side, unit.line, unit.token + j, to);
        }
    }

  private:
    void put_kept(const Side& side, int64_t line, int64_t token, float* to) const {
        const int64_t bytes = (chunks_ + 7) / 8;
        const uint8_t* flags = side.flags.row(line, token, bytes);
        uint32_t before;
        std::memcpy(&before, side.before.row(line, token, 4), 4);
        const uint8_t* kept = side.kept + 8 * size_t(before);
        for (int64_t i = 0; i < bytes; ++i)
            for (uint32_t left = flagged(flags, int(i), chunks_); left; left &= left - 1, kept += 8) {
                float* chunk = to + 4 * (8 * i + __builtin_ctz(left));
                uint16_t half[4];
                std::memcpy(half, kept, 8);
                for (int c = 0; c < 4; ++c) chunk[c] = half_to_float(half[c]);
            }
    }

    const Products& book_;
    const int chunks_, heads_;
};

// Returns pages with the number of unquantised chunks before each token of each line, which `memory` stores.
inline std::vector<Page> counted(const Page* pages, int64_t count, int64_t lines, int chunks, int threads, Memory& memory) {
    std::vector<Page> list(pages, pages + count);
    for (Page& page : list)
        for (Side& side : page.side)
            if (side.flags.data) side.before = {memory.take<uint8_t>(size_t(lines * page.tokens) * 4), page.tokens * 4};
    Threads::get().run(2 * count, threads, [&](int64_t task, int) {
        const Page& page = list[task / 2];
        const Side& side = page.side[task % 2];
        if (!side.flags.data) return;
        const int bytes = (chunks + 7) / 8;
        uint32_t sum = 0;
        for (int64_t t = 0; t < page.tokens; ++t)
            for (int64_t line = 0; line < lines; ++line) {
                std::memcpy(const_cast<uint8_t*>(side.before.row(line, t, 4)), &sum, 4);
                const uint8_t* flags = side.flags.row(line, t, bytes);
                for (int i = 0; i < bytes; ++i) sum += uint32_t(__builtin_popcount(flagged(flags, i, chunks)));
            }
    });
    return list;
}

}  // namespace
