// Nearest codeword of a joint codebook: the tables that the search reads, see nearest_index.cpp, and the search,
// nearest_impl.hpp. A chunk is rotated by a group element, which permutes codewords, into a region that is 1/24 or 1/288 of
// space, see kernels/nearest.py. The region is divided into cubes, whose edges are powers of two of the codebook's step; the
// cells of each cube are halved as long as this shortens the lists. A cell lists the codewords that are nearest to any of its
// points, as bytes relative to its centre, so that one load fetches a candidate.
#pragma once

#include <cstdint>
#include <vector>

namespace tessera {

struct Group {
    uint8_t product[24][24];
    uint8_t inverse[24];
    uint8_t reduction_unit[12];      // for each outcome of the reduction by rotations the unit g of z = conj(g)·v·g
    uint8_t rotation_unit[12];  // the order of rotations u·s·conj(u) in the codebook,
    uint8_t unit_rotation[24];  // and the number of each unit's
};

struct Index {
    static constexpr int MOST = 3;    // maximum number of halvings of a cube
    static constexpr int COUNT = 5;  // bits of a list's length minus one; cells with more candidates have no list

    // words: (24 S, 4) integers, those of product 24 s + p; codes: (24 S,), of each product.
    Index(const int16_t* words, const int32_t* codes, int secondaries, bool conjugations, float step, const Group& group);

    bool conjugations;
    bool few;  // whether secondaries are few enough to try all, without lists
    int secondaries;
    float step;
    int edge;                     // log2 of the smallest cells' edges, in steps
    int32_t origin[4], dims[4];   // the first cube along each axis, and their number
    std::vector<int32_t> cubes;   // first cell << 2 | halvings; cell 0: no list
    std::vector<int32_t> cells;   // first candidate << COUNT | number less one; 0 where there is no list
    // Pairs of words: the four components minus the cell's centre, as bytes, then base << 10 | a << 5 | b, which identifies the
    // codeword a·base·b, where a and b are units.
    std::vector<int32_t> candidates;

    // A chunk x = p·g·z·conj(g), where a·base·b was found for z: its codeword is (p·g·a)·base·(b·conj(g)).
    int32_t frames[24 * 12];   // p·g << 5 | conj(g), for each p and outcome of the reduction by rotations
    int32_t product[24 << 5];  // of the group
    int32_t orbit[24 << 5];    // of a << 5 | b: which of a base's codewords that is: row << 5 | move
    std::vector<int32_t> rows; // code of move 0, for each base and row
    int row_count;

    std::vector<int16_t> words;      // (24 S, 4)
    // For each secondary, shortest first, padded to a multiple of sixteen: four components, half the squared length, and the
    // length, in steps; then its number.
    std::vector<float> secondary[6];
    std::vector<int32_t> secondary_number;
    std::vector<int32_t> codes;      // of each product

  private:
    void set_group(const Group& group);
    void set_orbits(const Group& group);
    std::vector<int32_t> names(const Group& group) const;
};

// A search for the codes of chunks, and optionally the codewords, in units of 1.
struct Search {
    const Index* index;
    const float* x;      // component c of chunk i is x[i * chunk + c * component]
    int64_t chunk, component, count;
    int32_t* code;       // (count,)
    float* word;         // laid out as x; null if not needed
};

// Vectors coded from the last chunk to the first: the target of chunk i is y_i minus the sum over later chunks j of block (i,
// j) of the matrix times the error of chunk j, which is its decoded value minus y_j.
struct Feedback {
    const Index* index;
    const float* y;       // (heads, vectors, dim)
    const float* matrix;  // (heads, dim, dim), of which the blocks above the diagonal are read
    int64_t vectors;
    int dim;              // a multiple of four
    int32_t* code;        // (heads, vectors, dim / 4)
    static constexpr int64_t BLOCK = 64;  // vectors that are coded together
};

void nearest_portable(const Search& s);
// Encodes BLOCK vectors of a head, or those up to the last, beginning at `begin`.
void feedback_portable(const Feedback& s, int64_t head, int64_t begin);
#if defined(TESSERA_X86)
void nearest_avx2(const Search& s);
void nearest_avx512(const Search& s);
void feedback_avx2(const Feedback& s, int64_t head, int64_t begin);
void feedback_avx512(const Feedback& s, int64_t head, int64_t begin);
#endif

// Encodes vectors `begin` to `end`, divided by their scales, as packed codes of the nearest codewords.
struct VectorCodes {
    const float* x;      // (vectors, dim); the last chunk is padded with zeros
    const float* scale;  // (vectors,); the codes are zero where the scale is not positive
    int64_t dim;
    int bits;
    uint8_t* out;        // (vectors, bytes)
};

// Finds nearest codewords by one of the functions above.
using Nearest = void (*)(const Search& s);
void vector_codes(const Index& index, Nearest nearest, const VectorCodes& s, int64_t begin, int64_t end);

// Finds for n chunks (n, 4) the product 24 s + p with the largest projection, and returns both.
// matrices: (size, 4, 4), of x·conj(s), see kernels/directions.py.
void nearest_product(const float* matrices, int size, const float* x, int64_t n, int32_t* code, float* projection);

}  // namespace tessera
