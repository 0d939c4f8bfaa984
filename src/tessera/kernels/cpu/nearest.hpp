// Nearest codeword of a joint codebook, by the index of kernels/nearest.py, which explains it.
#pragma once

#include <cstdint>
#include <vector>

namespace tessera {

constexpr int CANDIDATES = 8;  // that are compared side by side

struct Index {
    int64_t dims[4], origin[4];  // cubes along each axis, and the first of them
    std::vector<int32_t> roots;
    std::vector<int32_t> children;  // (n, 16)
    int depth;                      // halvings at the most
    // Lists of candidates in blocks: of each list the first block and their number.
    std::vector<int32_t> first, blocks;
    std::vector<float> points;   // (blocks, 5, CANDIDATES): four components and half the squared length, infinite for none
    std::vector<int32_t> codes;  // (blocks, CANDIDATES), product numbers
    float root, radius;
    bool conjugations;
    std::vector<float> words[5];  // every codeword: four components and half the squared length
    std::vector<int32_t> number;  // code of each product

    uint8_t product[24][24];   // of the group
    uint8_t inverse[24];
    uint8_t turn_unit[12];     // for each outcome of the reduction by rotations the unit that does it
    uint8_t rotation_unit[12]; // the codebook's order of rotations,
    uint8_t unit_rotation[24]; // and the number of each unit's

    // Where the secondaries are few enough to try them all: what turns a chunk for each of them, (S, 4, 4), and half the squared
    // length of each.
    std::vector<float> turns, halves;
    void set_turns();

    // Puts lists one behind the other, `count` candidates each of `points` (entries, 5), into blocks.
    void set_lists(const int32_t* count, int64_t lists, const float* points, const int32_t* codes);

    // Codes of n chunks (n, 4).
    void nearest(const float* x, int64_t n, int32_t* code) const;
};

// The best product 24 s + p of n chunks (n, 4): the one of the largest projection less halves[s]; that projection, and it, are
// given back. turns: (size, 4, 4), of x·conj(s), see kernels/nearest_directions.py.
void nearest_product(const float* turns, const float* halves, int size, const float* x, int64_t n, int32_t* code, float* projection);

}  // namespace tessera
