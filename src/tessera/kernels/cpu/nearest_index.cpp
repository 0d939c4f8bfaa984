// Builds the candidate lists of the nearest-codeword search.
//
// A codeword is left out of a cell's list only where another is nearer in the whole cell, inflated by MARGIN, and cells without a
// list are searched in full: so the search is exact. All coordinates here are integers in units of the codebook's step, and all
// sums of them are exact in float.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>

#include "clones.hpp"
#include "nearest.hpp"

namespace tessera {
namespace {

// Steps by which cells are inflated in every comparison: far above the rounding of a chunk's coordinates, at most 1e-4.
constexpr float MARGIN = 1.0f / 32;
// Mean candidates per cell above which the cells of a cube are halved: where most chunks are, and beyond FAR, in units of a
// component's root mean square.
constexpr float FEW = 6.0f, FEW_FAR = 12.0f, FAR = 3.4f;
// Rivals that every codeword of a list is compared with, for lists up to LONG and for longer, intermediate ones.
constexpr size_t RIVALS = 24, RIVALS_OF_LONG = 4, LONG = 1000;
// Radius that lists cover, in lengths of the longest codeword.
constexpr float REACH = 1.25f;
// Minimum of the smallest cells' edge times the fourth root of the number of codewords.
constexpr float EDGE = 0.9f;

// Codewords near a cube, relative to its centre.
struct Near {
    std::vector<int32_t> product;
    std::vector<float> at[4], square;
    std::vector<uint8_t> keep;

    void resize(size_t n) {
        product.resize(n), square.resize(n), keep.resize(n);
        for (auto& a : at) a.resize(n);
    }
};

TESSERA_CLONES float measure(const int16_t* words, const int32_t* list, size_t n, const int32_t* centre, Near& near) {
    const float c0 = float(centre[0]), c1 = float(centre[1]), c2 = float(centre[2]), c3 = float(centre[3]);
    float *a0 = near.at[0].data(), *a1 = near.at[1].data(), *a2 = near.at[2].data(), *a3 = near.at[3].data(), *square = near.square.data();
    for (size_t i = 0; i < n; ++i) {
        const int16_t* w = words + 4 * size_t(list[i]);
        a0[i] = w[0] - c0, a1[i] = w[1] - c1, a2[i] = w[2] - c2, a3[i] = w[3] - c3;
    }
    float least = std::numeric_limits<float>::infinity();
    for (size_t i = 0; i < n; ++i) {
        square[i] = a0[i] * a0[i] + a1[i] * a1[i] + a2[i] * a2[i] + a3[i] * a3[i];
        least = square[i] < least ? square[i] : least;
    }
    return least;
}

// |x - word|² - |x - rival|² is linear in x: its value at the centre minus its largest decrease within the cube.
TESSERA_CLONES void compare(Near& near, size_t n, size_t rival, float edge) {
    const float *a0 = near.at[0].data(), *a1 = near.at[1].data(), *a2 = near.at[2].data(), *a3 = near.at[3].data();
    const float* square = near.square.data();
    const float r0 = a0[rival], r1 = a1[rival], r2 = a2[rival], r3 = a3[rival], best = square[rival];
    uint8_t* keep = near.keep.data();
    for (size_t i = 0; i < n; ++i) {
        const float fall = std::fabs(a0[i] - r0) + std::fabs(a1[i] - r1) + std::fabs(a2[i] - r2) + std::fabs(a3[i] - r3);
        keep[i] = square[i] - best <= edge * fall ? keep[i] : 0;
    }
}

class Builder {
  public:
    Builder(Index& index, std::vector<int32_t> names, float radius) : index_(index), names_(std::move(names)), radius_(radius) {}

    void build() {
        const int top = 1 << (index_.edge + Index::MOST);
        for (int i = 0; i < 4; ++i) {
            const bool positive = i == 0 || (index_.conjugations && i < 3);
            const float most = i == 0 ? radius_ : 0.7072f * radius_;  // no other component is larger than the first
            index_.origin[i] = positive ? 0 : -int(most / top) - 1;
            index_.dims[i] = int(most / top) + 1 - index_.origin[i];
        }
        size_t count = 1;
        for (int32_t d : index_.dims) count *= size_t(d);
        index_.cubes.assign(count, 0);
        index_.cells.assign(1, 0);
        index_.candidates.assign(2, 0);
        // Refine from a few large cubes to those of the grid.
        int size = top;
        while (size < radius_ / 2) size *= 2;
        std::vector<int32_t> all(names_.size());
        for (size_t i = 0; i < all.size(); ++i) all[i] = int32_t(i);
        int begin[4], end[4];
        for (int i = 0; i < 4; ++i) {
            const int low = index_.origin[i] * top, high = (index_.origin[i] + index_.dims[i]) * top;
            begin[i] = low < 0 ? -((-low + size - 1) / size) : 0;
            end[i] = (high + size - 1) / size;
        }
        int at[4];
        for (at[0] = begin[0]; at[0] < end[0]; ++at[0])
            for (at[1] = begin[1]; at[1] < end[1]; ++at[1])
                for (at[2] = begin[2]; at[2] < end[2]; ++at[2])
                    for (at[3] = begin[3]; at[3] < end[3]; ++at[3]) {
                        const int low[4] = {at[0] * size, at[1] * size, at[2] * size, at[3] * size};
                        descend(low, size, all);
                    }
    }

  private:
    using List = std::vector<int32_t>;

    struct Cell {
        int place[4];
        List list;
    };

    // Whether a cube may meet the region.
    bool touches(const int* low, int size) const {
        float from[4], to[4], least[4], square = 0;
        for (int i = 0; i < 4; ++i) {
            from[i] = float(low[i]) - MARGIN, to[i] = float(low[i] + size) + MARGIN;
            least[i] = from[i] < 0 && to[i] > 0 ? 0.0f : std::min(std::fabs(from[i]), std::fabs(to[i]));
            square += least[i] * least[i];
        }
        if (least[1] + least[2] + least[3] > to[0] || square > radius_ * radius_) return false;
        return !index_.conjugations || (to[1] >= from[2] && to[2] >= 0 && to[1] >= least[3]);
    }

    List prune(const List& list, const int* low, int size) {
        const int32_t centre[4] = {low[0] + size / 2, low[1] + size / 2, low[2] + size / 2, low[3] + size / 2};
        size_t n = list.size();
        near_.resize(n);
        const float edge = float(size) + 2 * MARGIN, least = std::sqrt(measure(index_.words.data(), list.data(), n, centre, near_));
        // A word is kept if its smallest distance to the cube is at most the best's largest; in 4-D half the diagonal is the
        // edge.
        const float farthest = least + 2 * edge, limit = farthest * farthest * 1.0001f;
        size_t kept = 0;
        for (size_t i = 0; i < n; ++i) {
            if (near_.square[i] > limit) continue;
            near_.product[kept] = list[i], near_.square[kept] = near_.square[i];
            for (auto& a : near_.at) a[kept] = a[i];
            ++kept;
        }
        n = kept;
        std::fill(near_.keep.begin(), near_.keep.begin() + long(n), uint8_t{1});
        order_.resize(n);
        for (size_t i = 0; i < n; ++i) order_[i] = int32_t(i);
        const auto nearer = [&](int32_t a, int32_t b) { return near_.square[size_t(a)] < near_.square[size_t(b)]; };
        const size_t rivals = std::min(n, n > LONG ? RIVALS_OF_LONG : RIVALS);
        std::partial_sort(order_.begin(), order_.begin() + long(rivals), order_.end(), nearer);
        for (size_t r = 0; r < rivals; ++r)
            if (near_.keep[size_t(order_[r])]) compare(near_, n, size_t(order_[r]), edge);
        List out;
        for (size_t i = 0; i < n; ++i)
            if (near_.keep[i]) out.push_back(near_.product[i]);
        return out;
    }

    void descend(const int* low, int size, const List& list) {
        if (!touches(low, size)) return;
        List kept = prune(list, low, size);
        const int top = 1 << (index_.edge + Index::MOST);
        if (size == top) return finish(low, std::move(kept));
        const int half = size / 2;
        for (int part = 0; part < 16; ++part) {
            int corner[4];
            for (int i = 0; i < 4; ++i) corner[i] = low[i] + (part >> (3 - i) & 1) * half;
            descend(corner, half, kept);
        }
    }

    // Makes the cells of a cube of the grid, halved as long as lists become shorter.
    void finish(const int* low, List list) {
        const int top = 1 << (index_.edge + Index::MOST);
        size_t cube = 0;
        float square = 0;
        for (int i = 0; i < 4; ++i) {
            const int at = (low[i] >= 0 ? low[i] / top : -(-low[i] / top)) - index_.origin[i];
            if (at < 0 || at >= index_.dims[i]) return;
            cube = cube * size_t(index_.dims[i]) + size_t(at);
            square += float(low[i] + top / 2) * float(low[i] + top / 2);
        }
        const float few = square * index_.step * index_.step > FAR * FAR ? FEW_FAR : FEW;
        std::vector<Cell> cells(1);
        cells[0] = {{0, 0, 0, 0}, std::move(list)};
        int halvings = 0, size = top;
        for (; halvings < Index::MOST; ++halvings) {
            size_t sum = 0;
            for (const Cell& cell : cells) sum += cell.list.size();
            if (float(sum) <= few * float(cells.size())) break;
            size /= 2;
            std::vector<Cell> parts;
            for (const Cell& cell : cells)
                for (int part = 0; part < 16; ++part) {
                    Cell to{{}, {}};
                    int corner[4];
                    for (int i = 0; i < 4; ++i) {
                        to.place[i] = 2 * cell.place[i] + (part >> (3 - i) & 1);
                        corner[i] = low[i] + to.place[i] * size;
                    }
                    if (!touches(corner, size)) continue;
                    to.list = prune(cell.list, corner, size);
                    parts.push_back(std::move(to));
                }
            cells = std::move(parts);
        }
        const size_t first = index_.cells.size();
        index_.cubes[cube] = int32_t(first << 2 | size_t(halvings));
        index_.cells.resize(first + (size_t{1} << 4 * halvings), 0);
        for (const Cell& cell : cells) {
            size_t place = 0;
            int centre[4];
            for (int i = 0; i < 4; ++i) {
                place = place << halvings | size_t(cell.place[i]);
                centre[i] = low[i] + cell.place[i] * size + size / 2;
            }
            index_.cells[first + place] = put(cell.list, centre);
        }
    }

    // Appends a list if it is short enough, and returns its position.
    int32_t put(const List& list, const int* centre) {
        const size_t first = index_.candidates.size() / 2;
        if (list.size() > size_t{1} << Index::COUNT || first >= size_t{1} << (31 - Index::COUNT)) return 0;
        std::vector<int32_t> pairs;
        for (int32_t product : list) {
            uint32_t bytes = 0;
            for (size_t c = 0; c < 4; ++c) {
                const int away = index_.words[4 * size_t(product) + c] - centre[c];
                if (away < -128 || away > 127) return 0;
                bytes |= uint32_t(uint8_t(away)) << (8 * c);
            }
            pairs.push_back(int32_t(bytes));
            pairs.push_back(names_[size_t(product)]);
        }
        index_.candidates.insert(index_.candidates.end(), pairs.begin(), pairs.end());
        return int32_t(first << Index::COUNT | (list.size() - 1));
    }

    Index& index_;
    const std::vector<int32_t> names_;
    const float radius_;
    Near near_;
    List order_;
};

}  // namespace

Index::Index(const int16_t* from, const int32_t* numbers, int size, bool conj, float step, const Group& group)
    : conjugations(conj), few(size <= 16), secondaries(size), step(step), words(from, from + 96 * size_t(size)),
      codes(numbers, numbers + 24 * size_t(size)) {
    if (secondaries < 1 || (conj && secondaries % 12) || !(step > 0)) throw std::invalid_argument("no such codebook");
    set_group(group);
    set_orbits(group);
    std::vector<float> squares;
    for (size_t s = 0; s < size_t(secondaries); ++s) {
        const int16_t* w = &words[96 * s];  // unit 0 is 1
        squares.push_back(float(w[0]) * w[0] + float(w[1]) * w[1] + float(w[2]) * w[2] + float(w[3]) * w[3]);
        secondary_number.push_back(int32_t(s));
    }
    const auto shorter = [&](int32_t a, int32_t b) { return squares[size_t(a)] < squares[size_t(b)]; };
    std::stable_sort(secondary_number.begin(), secondary_number.end(), shorter);
    for (int32_t s : secondary_number) {
        for (size_t c = 0; c < 4; ++c) secondary[c].push_back(float(words[96 * size_t(s) + c]));
        secondary[4].push_back(squares[size_t(s)] / 2);
        secondary[5].push_back(std::sqrt(squares[size_t(s)]));
    }
    const float most = secondary[5].back();
    const size_t whole = (size_t(size) + 15) / 16 * 16;
    for (size_t c = 0; c < 6; ++c) secondary[c].resize(whole, c < 4 ? 0.0f : std::numeric_limits<float>::infinity());
    secondary_number.resize(whole, 0);
    edge = 1;
    std::fill(origin, origin + 4, 0), std::fill(dims, dims + 4, 0);
    if (few) return;
    while (float(1 << edge) * step * std::pow(24.0f * float(secondaries), 0.25f) < EDGE) ++edge;
    Builder(*this, names(group), most * REACH).build();
}

void Index::set_group(const Group& group) {
    for (int p = 0; p < 24; ++p) {
        for (int t = 0; t < 12; ++t) {
            const int g = conjugations ? group.reduction_unit[t] : 0;
            frames[12 * p + t] = group.product[p][g] << 5 | group.inverse[g];
        }
        for (int q = 0; q < 24; ++q) product[p << 5 | q] = group.product[p][q];
    }
}

// For each product, base << 10 | a << 5 | b.
std::vector<int32_t> Index::names(const Group& group) const {
    std::vector<int32_t> names(words.size() / 4);
    for (size_t n = 0; n < names.size(); ++n) {
        const size_t s = n / 24, unit = n % 24;
        const int u = conjugations ? group.rotation_unit[s % 12] : 0;
        const size_t base = conjugations ? s / 12 : s;
        names[n] = int32_t(base) << 10 | group.product[unit][u] << 5 | group.inverse[u];
    }
    return names;
}

void Index::set_orbits(const Group& group) {
    // The codes of a base's codewords form rows with one code per move; the row and the move of a
    // codeword has is the same for all bases.
    const int orbit_size = conjugations ? 288 : 24;
    const int moves = conjugations ? 32 : 8;
    row_count = orbit_size / moves;
    std::vector<int32_t> row(static_cast<size_t>(orbit_size)), seen;
    for (int e = 0; e < orbit_size; ++e) {
        const int32_t start = codes[size_t(e)] / moves;
        const auto found = std::find(seen.begin(), seen.end(), start);
        row[size_t(e)] = int32_t(found - seen.begin());
        if (found == seen.end()) seen.push_back(start);
    }
    if (int(seen.size()) != row_count) throw std::invalid_argument("codes that are no points and moves");
    const size_t size = size_t(orbit_size), count = size_t(row_count);
    rows.assign(codes.size() / size * count, 0);
    for (size_t n = 0; n < codes.size(); ++n) rows[n / size * count + size_t(row[n % size])] = codes[n] / moves * moves;
    for (size_t n = 0; n < codes.size(); ++n)
        if (codes[n] != rows[n / size * count + size_t(row[n % size])] + codes[n % size] % moves)
            throw std::invalid_argument("codes that are no points and moves");
    for (int a = 0; a < 24; ++a)
        for (int b = 0; b < 24; ++b) {
            const int rotation = conjugations ? group.unit_rotation[group.inverse[b]] : 0, unit = conjugations ? group.product[a][b] : a;
            const int e = 24 * rotation + unit;
            orbit[a << 5 | b] = row[size_t(e)] << 5 | codes[size_t(e)] % moves;
        }
}

}  // namespace tessera
