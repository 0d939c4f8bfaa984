// The search for the nearest codeword, TESSERA_LANES chunks at a time. Included once per instruction set, in a
// separate namespace; nearest.hpp describes the tables.

#include "lanes.hpp"
#include "nearest.hpp"
#include "unit.hpp"

namespace {

using tessera::Index;
using tessera::Search;

// Number of chunks whose lookups are in flight together, so that memory latency overlaps with computation.
constexpr int BLOCK = 64;
constexpr float LEAST = -std::numeric_limits<float>::infinity();

// Loads from[STRIDE * at] for each lane, by single loads, which are faster than gather instructions.
template <int STRIDE>
inline IntLanes gather(const int32_t* from, IntLanes at) {
    IntLanes found;
    for (int j = 0; j < LANES; ++j) found[j] = from[at[j] * STRIDE];
    return found;
}

inline Lanes floats(IntLanes x) { return __builtin_convertvector(x, Lanes); }
inline IntLanes sign_of(IntLanes negative) { return negative & int32_t(0x80000000); }
inline Lanes flipped(Lanes x, IntLanes sign) { return Lanes(IntLanes(x) ^ sign); }
inline Lanes magnitude(Lanes x) { return Lanes(IntLanes(x) & 0x7fffffff); }
inline Lanes larger(Lanes a, Lanes b) { return a > b ? a : b; }

inline IntLanes load(const int32_t* x) {
    IntLanes lanes;
    std::memcpy(&lanes, x, sizeof lanes);
    return lanes;
}

inline void store(int32_t* x, IntLanes lanes) { std::memcpy(x, &lanes, sizeof lanes); }

struct Block {
    alignas(64) float x[4][BLOCK];         // the chunks
    alignas(64) float unit[4][BLOCK];      // what they are divided by,
    alignas(64) int32_t rotation[BLOCK];   // and the rotation by which they are rotated
    alignas(64) int32_t frame[BLOCK];      // both, see Index::frames
    alignas(64) float y[4][BLOCK];         // in steps, from the centre of their cells
    alignas(64) int32_t centre[4][BLOCK];
    alignas(64) int32_t cell[BLOCK];
    alignas(64) int32_t first[BLOCK], last[BLOCK];  // candidates; number 0 is a placeholder for cells without a list
    alignas(64) int32_t code[BLOCK];
    alignas(64) float word[4][BLOCK];
};

struct Units {
    Lanes p[4];
    IntLanes number;
};

// The nearest units, see unit.hpp.
inline __attribute__((always_inline)) Units nearest_units(Lanes x0, Lanes x1, Lanes x2, Lanes x3) {
    Units near;
    const Lanes a0 = magnitude(x0), a1 = magnitude(x1), a2 = magnitude(x2), a3 = magnitude(x3);
    const IntLanes n0 = x0 < 0.0f, n1 = x1 < 0.0f, n2 = x2 < 0.0f, n3 = x3 < 0.0f;
    Lanes most = a0;
    IntLanes axis = IntLanes{};
    axis = a1 > most ? IntLanes{} + 1 : axis, most = larger(a1, most);
    axis = a2 > most ? IntLanes{} + 2 : axis, most = larger(a2, most);
    axis = a3 > most ? IntLanes{} + 3 : axis, most = larger(a3, most);
    const IntLanes halves = (a0 + a1 + a2 + a3) * 0.5f > most;
    const Lanes one = Lanes{} + 1.0f, half = Lanes{} + 0.5f;
    const IntLanes m0 = axis == 0, m1 = axis == 1, m2 = axis == 2, m3 = axis == 3;
    near.p[0] = flipped(halves ? half : Lanes(m0 & IntLanes(one)), sign_of(n0));
    near.p[1] = flipped(halves ? half : Lanes(m1 & IntLanes(one)), sign_of(n1));
    near.p[2] = flipped(halves ? half : Lanes(m2 & IntLanes(one)), sign_of(n2));
    near.p[3] = flipped(halves ? half : Lanes(m3 & IntLanes(one)), sign_of(n3));
    const IntLanes negative = (m0 & n0) | (m1 & n1) | (m2 & n2) | (m3 & n3);
    near.number = halves ? 8 + (n0 & 8) + (n1 & 4) + (n2 & 2) + (n3 & 1) : 2 * axis - negative;
    return near;
}

// Finds the cells of LANES chunks, beginning at `at`.
inline __attribute__((always_inline)) void locate(const Index& index, Block& b, int at) {
    const Lanes x0 = load(b.x[0] + at), x1 = load(b.x[1] + at), x2 = load(b.x[2] + at), x3 = load(b.x[3] + at);
    const Units near = nearest_units(x0, x1, x2, x3);
    const Lanes p0 = near.p[0], p1 = near.p[1], p2 = near.p[2], p3 = near.p[3];
    Lanes z0 = p0 * x0 + p1 * x1 + p2 * x2 + p3 * x3;
    Lanes z1 = p0 * x1 - p1 * x0 - p2 * x3 + p3 * x2;
    Lanes z2 = p0 * x2 + p1 * x3 - p2 * x0 - p3 * x1;
    Lanes z3 = p0 * x3 - p1 * x2 + p2 * x1 - p3 * x0;
    IntLanes rotation = IntLanes{};
    if (index.conjugations) {
        // Rotate to z1 >= z2 >= 0, z1 >= |z3|, with an even number of sign changes.
        const Lanes c1 = magnitude(z1), c2 = magnitude(z2), c3 = magnitude(z3);
        const IntLanes once = c2 > c1, twice = c3 > larger(c1, c2);
        const Lanes v1 = twice ? z3 : once ? z2 : z1, v2 = twice ? z1 : once ? z3 : z2, v3 = twice ? z2 : once ? z1 : z3;
        const IntLanes p = v1 < 0.0f, q = v2 < 0.0f;
        z1 = flipped(v1, sign_of(p)), z2 = flipped(v2, sign_of(q)), z3 = flipped(v3, sign_of(p ^ q));
        rotation = (twice ? IntLanes{} + 8 : once & 4) + (p & 2) + (q & 1);
    }
    store(b.unit[0] + at, p0), store(b.unit[1] + at, p1), store(b.unit[2] + at, p2), store(b.unit[3] + at, p3);
    store(b.rotation + at, rotation);
    store(b.frame + at, gather<1>(index.frames, 12 * near.number + rotation));

    const Lanes inverse = Lanes{} + 1.0f / index.step;
    const Lanes z[4] = {z0 * inverse, z1 * inverse, z2 * inverse, z3 * inverse};
    const float cells = 1.0f / float(1 << index.edge);
    IntLanes place[4], cube = IntLanes{}, outside = IntLanes{};
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        constexpr float FAR = 1e6f;
        Lanes u = z[i] * cells;
        u = u > -FAR ? u : Lanes{} - FAR;
        u = u < FAR ? u : Lanes{} + FAR;
        place[i] = __builtin_convertvector(u, IntLanes);
        place[i] += floats(place[i]) > u;  // conversion truncates
        const IntLanes from = (place[i] >> Index::MOST) - index.origin[i];
        outside |= (from < 0) | (from >= index.dims[i]);
        cube = cube * index.dims[i] + from;
    }
    const IntLanes found = gather<1>(index.cubes.data(), outside ? IntLanes{} : cube);
    const IntLanes halvings = outside ? IntLanes{} : found & 3, less = Index::MOST - halvings, bits = less + index.edge;
    IntLanes part = IntLanes{};
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        part = part << halvings | (place[i] & ((1 << Index::MOST) - 1)) >> less;
        const IntLanes centre = (place[i] >> less << bits) + ((IntLanes{} + 1) << (bits - 1));
        store(b.centre[i] + at, centre);
        store(b.y[i] + at, z[i] - floats(centre));
    }
    store(b.cell + at, outside ? IntLanes{} : (found >> 2) + part);
    for (int j = 0; j < LANES; ++j) __builtin_prefetch(&index.cells[size_t(b.cell[at + j])]);
}

// Reads the positions of their candidates.
inline __attribute__((always_inline)) void read_cells(const Index& index, Block& b, int at) {
    const IntLanes cell = gather<1>(index.cells.data(), load(b.cell + at));
    const IntLanes first = cell >> Index::COUNT;
    store(b.first + at, first);
    store(b.last + at, first + (cell & ((1 << Index::COUNT) - 1)));
    for (int j = 0; j < LANES; ++j) {
        __builtin_prefetch(&index.candidates[2 * size_t(b.first[at + j])]);
        __builtin_prefetch(&index.candidates[2 * size_t(b.last[at + j])]);
    }
}

inline IntLanes component(IntLanes bytes, int c) { return bytes << (24 - 8 * c) >> 24; }

// Maps the codeword found for z back to x: (centre + bytes), rotated, times the unit. All are integers.
inline __attribute__((always_inline)) void put_word(const Index& index, Block& b, int at, IntLanes bytes) {
    Lanes z[4];
    for (int i = 0; i < 4; ++i) z[i] = floats(load(b.centre[i] + at) + component(bytes, i));
    if (index.conjugations) {
        const IntLanes rotation = load(b.rotation + at), p = -(rotation >> 1 & 1), q = -(rotation & 1), twice = rotation >= 8, once = (rotation >= 4) & ~twice;
        const Lanes v1 = flipped(z[1], sign_of(p)), v2 = flipped(z[2], sign_of(q)), v3 = flipped(z[3], sign_of(p ^ q));
        z[1] = twice ? v2 : once ? v3 : v1, z[2] = twice ? v3 : once ? v1 : v2, z[3] = twice ? v1 : once ? v2 : v3;
    }
    const Lanes p0 = load(b.unit[0] + at), p1 = load(b.unit[1] + at), p2 = load(b.unit[2] + at), p3 = load(b.unit[3] + at);
    store(b.word[0] + at, (p0 * z[0] - p1 * z[1] - p2 * z[2] - p3 * z[3]) * index.step);
    store(b.word[1] + at, (p0 * z[1] + p1 * z[0] + p2 * z[3] - p3 * z[2]) * index.step);
    store(b.word[2] + at, (p0 * z[2] - p1 * z[3] + p2 * z[0] + p3 * z[1]) * index.step);
    store(b.word[3] + at, (p0 * z[3] + p1 * z[2] - p2 * z[1] + p3 * z[0]) * index.step);
}

// Returns the code for x of the codeword a·base·b found for z; a << 5 | b is the group element.
inline IntLanes brought_back(const Index& index, IntLanes frame, IntLanes name) {
    const IntLanes a = gather<1>(index.product, (frame & 0x3e0) | (name >> 5 & 31));
    const IntLanes b = gather<1>(index.product, (name & 31) << 5 | (frame & 31));
    return a << 5 | b;
}

// Compares the candidates of LANES chunks, beginning at `at`.
template <bool WORDS>
inline __attribute__((always_inline)) void choose(const Index& index, Block& b, int at) {
    const Lanes y0 = load(b.y[0] + at), y1 = load(b.y[1] + at), y2 = load(b.y[2] + at), y3 = load(b.y[3] + at);
    const IntLanes first = load(b.first + at), last = load(b.last + at);
    int longest = 0;
    for (int j = 0; j < LANES; ++j) longest = std::max(longest, b.last[at + j] - b.first[at + j]);
    const int32_t* candidates = index.candidates.data();
    Lanes best = Lanes{} + LEAST;
    IntLanes where = first, k = first;
    for (int i = 0; i <= longest; ++i, ++k) {
        const IntLanes place = k < last ? k : last;
        const IntLanes bytes = gather<2>(candidates, place);
        const Lanes d0 = floats(component(bytes, 0)), d1 = floats(component(bytes, 1));
        const Lanes d2 = floats(component(bytes, 2)), d3 = floats(component(bytes, 3));
        // Half of |y|² - |y - d|².
        const Lanes score = d0 * (y0 - 0.5f * d0) + d1 * (y1 - 0.5f * d1) + (d2 * (y2 - 0.5f * d2) + d3 * (y3 - 0.5f * d3));
        const IntLanes better = score > best;
        best = better ? score : best;
        where = better ? place : where;
    }
    const IntLanes name = gather<2>(candidates + 1, where);
    const IntLanes orbit = gather<1>(index.orbit, brought_back(index, load(b.frame + at), name));
    store(b.code + at, gather<1>(index.rows.data(), (name >> 10) * index.row_count + (orbit >> 5)) + (orbit & 31));
    if constexpr (WORDS) put_word(index, b, at, gather<2>(candidates, where));
}

// The best product so far of each lane: a secondary with its best unit.
struct Best {
    Lanes score = Lanes{} + LEAST;
    IntLanes which = IntLanes{};

    // Returns the lanes in which the other is better.
    IntLanes take(Lanes other, IntLanes number) {
        const IntLanes better = other > score;
        score = better ? other : score;
        which = better ? number : which;
        return better;
    }

    int32_t one() const {
        int lane = 0;
        for (int j = 1; j < LANES; ++j)
            if (score[j] > score[lane] || (score[j] == score[lane] && which[j] < which[lane])) lane = j;
        return which[lane];
    }
};

inline IntLanes counting() {
    IntLanes numbers;
    for (int j = 0; j < LANES; ++j) numbers[j] = j;
    return numbers;
}

// Returns the largest inner product with any unit, of those with one component and those with halves.
inline Lanes projection(const Lanes (&y)[4]) {
    const Lanes a0 = magnitude(y[0]), a1 = magnitude(y[1]), a2 = magnitude(y[2]), a3 = magnitude(y[3]);
    return larger(larger(larger(a0, a1), larger(a2, a3)), (a0 + a1 + a2 + a3) * 0.5f);
}

// Returns the number of the best product for chunk j. For each secondary the best unit has a closed form, and products that are
// longer or shorter than the chunk by more than the distance to the best so far are skipped.
inline int32_t best_of_all(const Index& index, const Block& b, int j) {
    const float x0 = b.x[0][j] / index.step, x1 = b.x[1][j] / index.step, x2 = b.x[2][j] / index.step, x3 = b.x[3][j] / index.step;
    const float square = x0 * x0 + x1 * x1 + x2 * x2 + x3 * x3, length = std::sqrt(square);
    const float* lengths = index.secondary[5].data();
    const int count = int(index.secondary[5].size());
    int up = int(std::lower_bound(lengths, lengths + count, length) - lengths) / LANES * LANES, down = up - LANES;
    Best best;
    while (up < count || down >= 0) {
        const float above = up < count ? lengths[up] - length : -LEAST, below = down >= 0 ? length - lengths[down + LANES - 1] : -LEAST;
        const float gap = std::max(0.0f, std::min(above, below));
        if (gap * gap > square - 2 * largest(best.score) + 1e-5f * square) break;
        const bool rise = up < count && (down < 0 || !(above > below));
        const int s = rise ? up : down;
        if (rise) up += LANES;
        else down -= LANES;
        const Lanes w = load(index.secondary[0].data() + s), u = load(index.secondary[1].data() + s);
        const Lanes v = load(index.secondary[2].data() + s), t = load(index.secondary[3].data() + s);
        const Lanes y[4] = {w * x0 + u * x1 + v * x2 + t * x3, w * x1 - u * x0 + v * x3 - t * x2, w * x2 - u * x3 - v * x0 + t * x1,
                            w * x3 + u * x2 - v * x1 - t * x0};
        best.take(projection(y) - load(&index.secondary[4][size_t(s)]), s + counting());
    }
    const size_t s = size_t(best.one());
    const float w = index.secondary[0][s], u = index.secondary[1][s], v = index.secondary[2][s], t = index.secondary[3][s];
    const int unit = tessera::nearest_unit(w * x0 + u * x1 + v * x2 + t * x3, w * x1 - u * x0 + v * x3 - t * x2,
                                           w * x2 - u * x3 - v * x0 + t * x1, w * x3 + u * x2 - v * x1 - t * x0).number;
    return 24 * index.secondary_number[s] + unit;
}

// Tries all secondaries for LANES chunks, beginning at `at`.
template <bool WORDS>
inline __attribute__((always_inline)) void try_all(const Index& index, Block& b, int at) {
    const Lanes inverse = Lanes{} + 1.0f / index.step;
    const Lanes x0 = load(b.x[0] + at) * inverse, x1 = load(b.x[1] + at) * inverse;
    const Lanes x2 = load(b.x[2] + at) * inverse, x3 = load(b.x[3] + at) * inverse;
    Best best;
    Lanes rotated[4] = {};
    for (size_t s = 0; s < size_t(index.secondaries); ++s) {
        const float w = index.secondary[0][s], u = index.secondary[1][s], v = index.secondary[2][s], t = index.secondary[3][s];
        const Lanes y[4] = {w * x0 + u * x1 + v * x2 + t * x3, w * x1 - u * x0 + v * x3 - t * x2, w * x2 - u * x3 - v * x0 + t * x1,
                            w * x3 + u * x2 - v * x1 - t * x0};
        const IntLanes better = best.take(projection(y) - index.secondary[4][s], IntLanes{} + index.secondary_number[s]);
        for (int i = 0; i < 4; ++i) rotated[i] = better ? y[i] : rotated[i];
    }
    const IntLanes product = 24 * best.which + nearest_units(rotated[0], rotated[1], rotated[2], rotated[3]).number;
    store(b.code + at, gather<1>(index.codes.data(), product));
    if constexpr (WORDS) {
        const int32_t* words = reinterpret_cast<const int32_t*>(index.words.data());
        const IntLanes low = gather<2>(words, product), high = gather<2>(words + 1, product);
        store(b.word[0] + at, floats(low << 16 >> 16) * index.step), store(b.word[1] + at, floats(low >> 16) * index.step);
        store(b.word[2] + at, floats(high << 16 >> 16) * index.step), store(b.word[3] + at, floats(high >> 16) * index.step);
    }
}

template <bool WORDS>
inline void search_block(const Index& index, Block& b, int count) {
    if (index.few) {
        for (int at = 0; at < count; at += LANES) try_all<WORDS>(index, b, at);
        return;
    }
    for (int at = 0; at < count; at += LANES) locate(index, b, at);
    for (int at = 0; at < count; at += LANES) read_cells(index, b, at);
    for (int at = 0; at < count; at += LANES) choose<WORDS>(index, b, at);
    for (int j = 0; j < count; ++j) {
        if (b.first[j] != 0) continue;
        // Its cell has no list.
        const size_t product = size_t(best_of_all(index, b, j));
        b.code[j] = index.codes[product];
        for (size_t i = 0; i < 4; ++i) b.word[i][j] = float(index.words[4 * product + i]) * index.step;
    }
}

// Transposes chunks to one array per component.
inline void read_chunks(const float* x, int64_t chunk, int64_t component, int count, float (&to)[4][BLOCK]) {
    if (count == BLOCK && chunk == 4 && component == 1) {  // with constant strides
        for (int j = 0; j < BLOCK; ++j)
            for (int i = 0; i < 4; ++i) to[i][j] = x[4 * j + i];
        return;
    }
    if (chunk == 1) {  // already one array per component
        for (int i = 0; i < 4; ++i) std::memcpy(to[i], x + i * component, sizeof(float) * size_t(count));
        return;
    }
    for (int i = 0; i < 4; ++i)
        for (int j = 0; j < count; ++j) to[i][j] = x[j * chunk + i * component];
}

inline void search(const Search& s) {
    Block b;
    std::memset(b.x, 0, sizeof b.x);
    for (int64_t begin = 0; begin < s.count; begin += BLOCK) {
        const int count = int(std::min<int64_t>(BLOCK, s.count - begin));
        const float* x = s.x + begin * s.chunk;
        read_chunks(x, s.chunk, s.component, count, b.x);
        if (s.word) search_block<true>(*s.index, b, count);
        else search_block<false>(*s.index, b, count);
        std::memcpy(s.code + begin, b.code, sizeof(int32_t) * size_t(count));
        if (!s.word) continue;
        float* word = s.word + begin * s.chunk;
        for (int i = 0; i < 4; ++i)
            for (int j = 0; j < count; ++j) word[j * s.chunk + i * s.component] = b.word[i][j];
    }
}

}  // namespace
