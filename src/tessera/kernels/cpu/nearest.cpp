#include "nearest.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "clones.hpp"
#include "unit.hpp"

namespace tessera {
namespace {

// Chunks that are worked on together, component by component: loops over them become vector instructions, and what is
// looked up for one is on its way while the others are computed.
constexpr int CHUNKS = 32;
constexpr float LEAST = -std::numeric_limits<float>::infinity();

struct Batch {
    alignas(64) float z[4][CHUNKS];   // the chunks, reduced
    alignas(64) int32_t unit[CHUNKS]; // what they were divided by from the left
    alignas(64) int32_t turn[CHUNKS]; // which of the twelve rotations they were turned by
    alignas(64) int32_t list[CHUNKS]; // of candidates; -1: none
};

// Divides by the nearest unit, which has a closed form, see quaternion.py.
inline __attribute__((always_inline)) void divide(const float (&x)[4][CHUNKS], Batch& b) {
    for (int j = 0; j < CHUNKS; ++j) {
        const float x0 = x[0][j], x1 = x[1][j], x2 = x[2][j], x3 = x[3][j];
        const auto [halves, axis, number] = nearest_unit(x0, x1, x2, x3);
        b.unit[j] = number;
        const int n0 = x0 < 0, n1 = x1 < 0, n2 = x2 < 0, n3 = x3 < 0;
        const float size = halves ? 0.5f : 1.0f;
        const float p0 = halves || axis == 0 ? (n0 ? -size : size) : 0.0f, p1 = halves || axis == 1 ? (n1 ? -size : size) : 0.0f;
        const float p2 = halves || axis == 2 ? (n2 ? -size : size) : 0.0f, p3 = halves || axis == 3 ? (n3 ? -size : size) : 0.0f;
        b.z[0][j] = p0 * x0 + p1 * x1 + p2 * x2 + p3 * x3;
        b.z[1][j] = p0 * x1 - p1 * x0 - p2 * x3 + p3 * x2;
        b.z[2][j] = p0 * x2 + p1 * x3 - p2 * x0 - p3 * x1;
        b.z[3][j] = p0 * x3 - p1 * x2 + p2 * x1 - p3 * x0;
    }
}

// Brings the vector parts to z1 >= z2 >= 0, z1 >= |z3|.
inline __attribute__((always_inline)) void turn(Batch& b) {
    for (int j = 0; j < CHUNKS; ++j) {
        const float v0 = b.z[1][j], v1 = b.z[2][j], v2 = b.z[3][j];
        const float a0 = std::fabs(v0), a1 = std::fabs(v1), a2 = std::fabs(v2);
        int shift = a1 > a0 ? 1 : 0;
        shift = a2 > (a1 > a0 ? a1 : a0) ? 2 : shift;
        const float x = shift == 0 ? v0 : shift == 1 ? v1 : v2;
        const float y = shift == 0 ? v1 : shift == 1 ? v2 : v0;
        const float w = shift == 0 ? v2 : shift == 1 ? v0 : v1;
        const int p = x < 0, q = y < 0;
        // An even number of signs: the third's changes with exactly one of the others.
        b.z[1][j] = p ? -x : x;
        b.z[2][j] = q ? -y : y;
        b.z[3][j] = p != q ? -w : w;
        b.turn[j] = 4 * shift + 2 * p + q;
    }
}

TESSERA_CLONES void reduce(const Index& index, const float* chunks, Batch& b) {
    alignas(64) float x[4][CHUNKS], place[4][CHUNKS];
    for (int j = 0; j < CHUNKS; ++j)
        for (int i = 0; i < 4; ++i) x[i][j] = chunks[4 * j + i];
    divide(x, b);
    if (index.conjugations) turn(b);
    int32_t cube[CHUNKS] = {};
    for (int i = 0; i < 4; ++i) {
        const float inverse = 1.0f / index.root, low = float(index.origin[i]), high = float(index.origin[i] + index.dims[i] - 1);
        const int32_t size = int32_t(index.dims[i]), start = int32_t(index.origin[i]);
        for (int j = 0; j < CHUNKS; ++j) {
            const float at = b.z[i][j] * inverse;
            // Rounding may leave a chunk a hair outside the region; the cube beside it knows its candidates.
            float corner = std::floor(at);
            corner = corner < low ? low : corner > high ? high : corner;
            cube[j] = cube[j] * size + (int32_t(corner) - start);
            const float rest = at - corner;
            place[i][j] = rest < 0.0f ? 0.0f : rest > 1.0f ? 1.0f : rest;
        }
    }
    for (int j = 0; j < CHUNKS; ++j) b.list[j] = index.roots[cube[j]];
    const int32_t* children = index.children.data();
    for (int level = 0; level < index.depth; ++level) {
        int32_t part[CHUNKS] = {};
        for (int i = 0; i < 4; ++i)
            for (int j = 0; j < CHUNKS; ++j) {
                const float half = place[i][j] >= 0.5f ? 1.0f : 0.0f, rest = 2 * place[i][j] - half;
                place[i][j] = rest < 0.0f ? 0.0f : rest > 1.0f ? 1.0f : rest;
                part[j] = 2 * part[j] + int32_t(half);
            }
        for (int j = 0; j < CHUNKS; ++j)
            if (b.list[j] < -1) b.list[j] = children[int64_t(-2 - b.list[j]) * 16 + part[j]];
    }
    const float limit = index.radius * index.radius;
    for (int j = 0; j < CHUNKS; ++j) {
        const float square = b.z[0][j] * b.z[0][j] + b.z[1][j] * b.z[1][j] + b.z[2][j] * b.z[2][j] + b.z[3][j] * b.z[3][j];
        b.list[j] = square > limit ? -1 : b.list[j];
    }
}

typedef float Scores __attribute__((vector_size(4 * CANDIDATES)));
typedef int32_t Numbers __attribute__((vector_size(4 * CANDIDATES)));

inline __attribute__((always_inline)) Scores load(const float* from) {
    Scores scores;
    std::memcpy(&scores, from, sizeof scores);
    return scores;
}

// The best candidate of each chunk, as its place in `codes`.
TESSERA_CLONES void choose(const Index& index, const Batch& b, int32_t (&best)[CHUNKS]) {
    for (int j = 0; j < CHUNKS; ++j)
        if (b.list[j] >= 0) __builtin_prefetch(&index.points[size_t(index.first[b.list[j]]) * 5 * CANDIDATES]);
    for (int j = 0; j < CHUNKS; ++j) {
        if (b.list[j] < 0) continue;
        const int32_t first = index.first[b.list[j]];
        const float* point = &index.points[size_t(first) * 5 * CANDIDATES];
        const float z0 = b.z[0][j], z1 = b.z[1][j], z2 = b.z[2][j], z3 = b.z[3][j];
        Scores most = Scores{} + LEAST;
        Numbers where = {};
        for (int k = 0; k < index.blocks[b.list[j]]; ++k, point += 5 * CANDIDATES) {
            const Scores score = load(point) * z0 + load(point + CANDIDATES) * z1 + load(point + 2 * CANDIDATES) * z2 +
                                 load(point + 3 * CANDIDATES) * z3 - load(point + 4 * CANDIDATES);
            const Numbers better = score > most;
            most = better ? score : most;
            where = better ? Numbers{} + k : where;
        }
        int lane = 0;
        float top = most[0];
        for (int i = 1; i < CANDIDATES; ++i) {
            const bool better = most[i] > top || (most[i] == top && where[i] < where[lane]);  // the first of those equally near
            lane = better ? i : lane;
            top = better ? most[i] : top;
        }
        best[j] = (first + where[lane]) * CANDIDATES + lane;
    }
}

TESSERA_CLONES int64_t best_of_all(const float* const words[5], int64_t count, const float* x) {
    // Scores of a block, then their maximum: both loops vectorise.
    constexpr int64_t BLOCK = 256;
    float most = LEAST;
    int64_t where = 0;
    for (int64_t a = 0; a < count; a += BLOCK) {
        const int64_t n = std::min(BLOCK, count - a);
        float score[BLOCK];
        for (int64_t i = 0; i < n; ++i)
            score[i] = x[0] * words[0][a + i] + x[1] * words[1][a + i] + x[2] * words[2][a + i] + x[3] * words[3][a + i] - words[4][a + i];
        float lane[16];
        for (int j = 0; j < 16; ++j) lane[j] = LEAST;
        for (int64_t i = n; i < (n + 15) / 16 * 16; ++i) score[i] = LEAST;
        for (int64_t i = 0; i < n; i += 16)
            for (int j = 0; j < 16; ++j) lane[j] = score[i + j] > lane[j] ? score[i + j] : lane[j];
        const float top = *std::max_element(lane, lane + 16);
        if (top > most) {
            most = top;
            where = a + (std::find(score, score + n, top) - score);
        }
    }
    return where;
}

}  // namespace

void Index::set_lists(const int32_t* count, int64_t lists, const float* from, const int32_t* numbers) {
    first.resize(size_t(lists)), blocks.resize(size_t(lists));
    int32_t all = 0;
    for (int64_t l = 0; l < lists; ++l) {
        first[l] = all;
        blocks[l] = (count[l] + CANDIDATES - 1) / CANDIDATES;
        all += blocks[l];
    }
    points.assign(size_t(all) * 5 * CANDIDATES, 0.0f);
    codes.assign(size_t(all) * CANDIDATES, 0);
    for (int64_t l = 0; l < lists; ++l)
        for (int i = 0; i < blocks[l] * CANDIDATES; ++i) {
            const size_t block = size_t(first[l]) + i / CANDIDATES, lane = i % CANDIDATES;
            float* to = &points[block * 5 * CANDIDATES + lane];
            if (i >= count[l]) {
                to[4 * CANDIDATES] = -LEAST;
                continue;
            }
            for (int c = 0; c < 5; ++c) to[c * CANDIDATES] = from[c];
            codes[block * CANDIDATES + lane] = *numbers++;
            from += 5;
        }
}

void Index::set_turns() {
    constexpr size_t FEW = 16;
    const size_t size = words[0].size() / 24;
    if (size > FEW) return;
    for (size_t s = 0; s < size; ++s) {
        const float w = words[0][24 * s], i = words[1][24 * s], j = words[2][24 * s], k = words[3][24 * s];  // unit 0 is 1
        for (float entry : {w, i, j, k, -i, w, -k, j, -j, k, w, -i, -k, -j, i, w}) turns.push_back(entry);
        halves.push_back(words[4][24 * s]);
    }
}

void Index::nearest(const float* x, int64_t n, int32_t* code) const {
    if (!turns.empty()) {
        std::vector<float> projection(static_cast<size_t>(n));
        nearest_product(turns.data(), halves.data(), int(halves.size()), x, n, code, projection.data());
        for (int64_t at = 0; at < n; ++at) code[at] = number[size_t(code[at])];
        return;
    }
    const float* all[5] = {words[0].data(), words[1].data(), words[2].data(), words[3].data(), words[4].data()};
    Batch b;
    float last[4 * CHUNKS] = {};
    int32_t best[CHUNKS] = {};
    for (int64_t at = 0; at < n; at += CHUNKS, x += 4 * CHUNKS) {
        const int some = int(std::min<int64_t>(CHUNKS, n - at));
        if (some < CHUNKS) std::memcpy(last, x, sizeof(float) * 4 * size_t(some));
        const float* chunks = some < CHUNKS ? last : x;
        reduce(*this, chunks, b);
        if (some < CHUNKS) std::fill(b.list + some, b.list + CHUNKS, -1);
        choose(*this, b, best);
        for (int j = 0; j < some; ++j) {
            if (b.list[j] < 0) {
                code[at + j] = number[size_t(best_of_all(all, int64_t(words[0].size()), chunks + 4 * j))];
                continue;
            }
            const int found = codes[size_t(best[j])];
            int s = found / 24, unit = found % 24;
            if (conjugations) {
                // x = q_p·g·z·ḡ, so the codeword for x is q_p·(g·q_unit·ḡ)·(g·s·ḡ).
                const int g = turn_unit[b.turn[j]];
                unit = product[product[g][unit]][inverse[g]];
                s = s / 12 * 12 + unit_rotation[product[g][rotation_unit[s % 12]]];
            }
            code[at + j] = number[size_t(s) * 24 + product[b.unit[j]][unit]];
        }
    }
}

}  // namespace tessera
