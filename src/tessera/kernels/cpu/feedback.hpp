// Encodes vectors from the last chunk to the first, feeding back errors of later chunks. Included after nearest_impl.hpp.

namespace {

using tessera::Feedback;

// Subtracts rows 4 i to 4 i + 3 of the feedback times the errors of later chunks from the targets, for BLOCK interleaved
// vectors.
inline __attribute__((always_inline)) void feed_back(const float* matrix, int dim, int chunk, const float (*error)[BLOCK], float (*target)[BLOCK]) {
    constexpr int TWO = 2;
    for (int at = 0; at < BLOCK; at += TWO * LANES) {
        Lanes sum[4][TWO];
        for (int r = 0; r < 4; ++r)
            for (int v = 0; v < TWO; ++v) sum[r][v] = load(target[r] + at + v * LANES);
        for (int c = 4 * (chunk + 1); c < dim; ++c) {
            const Lanes e[TWO] = {load(error[c] + at), load(error[c] + at + LANES)};
#pragma GCC unroll 4
            for (int r = 0; r < 4; ++r) {
                const float m = matrix[(4 * chunk + r) * dim + c];
#pragma GCC unroll 2
                for (int v = 0; v < TWO; ++v) sum[r][v] -= m * e[v];
            }
        }
        for (int r = 0; r < 4; ++r)
            for (int v = 0; v < TWO; ++v) store(target[r] + at + v * LANES, sum[r][v]);
    }
}

static_assert(BLOCK == Feedback::BLOCK);

using SideBySide = float (*)[BLOCK];

// Buffers for up to BLOCK interleaved vectors, (dim, BLOCK), zero beyond `count`.
inline SideBySide side_by_side(tessera::Memory& memory, int dim, int count) {
    const size_t size = size_t(dim) * BLOCK;
    float* const room = memory.take<float>(size);
    if (count < BLOCK) std::memset(room, 0, sizeof(float) * size);
    return reinterpret_cast<SideBySide>(room);
}

// Encodes `count` interleaved vectors in `target`, which is overwritten. codes: (count, dim / 4).
inline void feed_codes(const tessera::Index& index, const float* matrix, int dim, int count, SideBySide target, int32_t* codes, tessera::Memory& memory) {
    const int chunks = dim / 4;
    const SideBySide error = side_by_side(memory, dim, count);
    alignas(64) float word[4][BLOCK];
    int32_t code[BLOCK];
    for (int chunk = chunks - 1; chunk >= 0; --chunk) {
        for (int i = 0; i < 4; ++i) std::memcpy(error[4 * chunk + i], target[4 * chunk + i], sizeof(float) * BLOCK);  // for now
        feed_back(matrix, dim, chunk, error, target + 4 * chunk);
        search({&index, target[4 * chunk], 1, BLOCK, count, code, word[0]});
        for (int i = 0; i < 4; ++i)
            for (int j = 0; j < count; ++j) error[4 * chunk + i][j] = word[i][j] - error[4 * chunk + i][j];
        for (int j = 0; j < count; ++j) codes[j * chunks + chunk] = code[j];
    }
}

// Encodes up to BLOCK vectors of a head, beginning at `begin`.
inline void code_with_feedback(const Feedback& s, int64_t head, int64_t begin) {
    const int count = int(std::min<int64_t>(BLOCK, s.vectors - begin)), dim = s.dim;
    tessera::Memory memory;
    const SideBySide target = side_by_side(memory, dim, count);
    const float* y = s.y + (head * s.vectors + begin) * dim;
    for (int j = 0; j < count; ++j)
        for (int c = 0; c < dim; ++c) target[c][j] = y[int64_t(j) * dim + c];
    feed_codes(*s.index, s.matrix + head * dim * dim, dim, count, target, s.code + (head * s.vectors + begin) * (dim / 4), memory);
}

}  // namespace
