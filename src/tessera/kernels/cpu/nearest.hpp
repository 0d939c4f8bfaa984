// Nearest codeword of a joint codebook: the tables that the search reads, see nearest_index.cpp, and the search, nearest_impl.hpp.
//
// A chunk is rotated by an element of the group, which permutes codewords, into a region of space that is 1/24 or 1/288 of it, see
// kernels/nearest.py. The region is cut into cubes, whose edges are powers of two of the codebook's step; of each the cube's cells
// are halved as often as pays. A cell lists the codewords that are nearest for any of its points, as bytes relative to its centre,
// so that one load fetches a candidate.
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
    static constexpr int MOST = 3;    // halvings of a cube at the most
    static constexpr int COUNT = 5;  // bits of a list's length, less one; cells with more candidates have no list

    // words: (24 S, 4) integers, those of product 24 s + p; codes: (24 S,), of each product.
    Index(const int16_t* words, const int32_t* codes, int secondaries, bool conjugations, float step, const Group& group);

    bool conjugations;
    bool few;  // so few secondaries that all are tried, and there are no lists
    int secondaries;
    float step;
    int edge;                     // log2 of the smallest cells' edges, in steps
    int32_t origin[4], dims[4];   // the first cube along each axis, and their number
    std::vector<int32_t> cubes;   // first cell << 2 | halvings; cell 0 has no list
    std::vector<int32_t> cells;   // first candidate << COUNT | number less one; 0 where there is no list
    // Pairs: the four components less those of the cell's centre, as bytes, then the name base << 10 | a << 5 | b of the codeword
    // a·base·b, where a and b are units.
    std::vector<int32_t> candidates;

    // A chunk x = p·g·z·conj(g), where a·base·b was found for z: its codeword is (p·g·a)·base·(b·conj(g)).
    int32_t frames[24 * 12];   // p·g << 5 | conj(g), for each p and outcome of the reduction by rotations
    int32_t product[24 << 5];  // of the group
    int32_t orbit[24 << 5];    // of a << 5 | b: which of a base's codewords that is: row << 5 | move
    std::vector<int32_t> rows; // code of move 0, for each base and row
    int row_count;

    std::vector<int16_t> words;      // (24 S, 4)
    // Of each secondary, shortest first, and up to a multiple of sixteen of none: four components, half the squared length, and the
    // length, in steps; then its number.
    std::vector<float> secondary[6];
    std::vector<int32_t> secondary_number;
    std::vector<int32_t> codes;      // of each product

  private:
    void set_group(const Group& group);
    void set_orbits(const Group& group);
    std::vector<int32_t> names(const Group& group) const;
};

// What is to be found: codes of chunks, and if wanted the codewords, in units of 1.
struct Search {
    const Index* index;
    const float* x;      // component c of chunk i is x[i * chunk + c * component]
    int64_t chunk, component, count;
    int32_t* code;       // (count,)
    float* word;         // placed as x; null: not wanted
};

// Vectors coded from the last chunk to the first: of chunk i what is coded is y_i less the sum over later chunks j of block (i, j)
// of the matrix times the error of chunk j, which is what was decoded less y_j.
struct Feedback {
    const Index* index;
    const float* y;       // (heads, vectors, dim)
    const float* matrix;  // (heads, dim, dim), of which the blocks above the diagonal are read
    int64_t vectors;
    int dim;              // a multiple of four
    int32_t* code;        // (heads, vectors, dim / 4)
    static constexpr int64_t BLOCK = 64;  // vectors that are coded side by side
};

void nearest_portable(const Search& s);
// BLOCK vectors of a head, or up to the last, from `begin` on.
void feedback_portable(const Feedback& s, int64_t head, int64_t begin);
#if defined(TESSERA_X86)
void nearest_avx2(const Search& s);
void nearest_avx512(const Search& s);
void feedback_avx2(const Feedback& s, int64_t head, int64_t begin);
void feedback_avx512(const Feedback& s, int64_t head, int64_t begin);
#endif

// Codes of the nearest codewords of vectors divided by their scales, packed: one vector after another from `begin` to `end`.
struct VectorCodes {
    const float* x;      // (vectors, dim); the last chunk is filled up with zeros
    const float* scale;  // (vectors,); of a vector whose scale is not positive the codes are zero
    int64_t dim;
    int bits;
    uint8_t* out;        // (vectors, bytes)
};

// Finds the nearest codewords, which is done by one of the functions above.
using Nearest = void (*)(const Search& s);
void vector_codes(const Index& index, Nearest nearest, const VectorCodes& s, int64_t begin, int64_t end);

// The best product 24 s + p of n chunks (n, 4): the one of the largest projection; that projection, and it, are given back.
// matrices: (size, 4, 4), of x·conj(s), see kernels/directions.py.
void nearest_product(const float* matrices, int size, const float* x, int64_t n, int32_t* code, float* projection);

}  // namespace tessera
