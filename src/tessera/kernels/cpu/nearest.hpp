// Nearest codeword of a joint codebook, by the index of kernels/nearest.py, which explains it.
#pragma once

#include <cstdint>
#include <vector>

namespace tessera {

struct Index {
    int64_t dims[4], origin[4];  // cubes along each axis, and the first of them
    std::vector<int32_t> roots;
    std::vector<int32_t> children;  // (n, 16)
    std::vector<int32_t> first, count;  // of each list its place in `points` and its length
    std::vector<float> points;          // of all lists, one behind the other: four components and half the squared length
    std::vector<int32_t> codes;         // product numbers of the points
    float root, radius;
    bool conjugations;
    std::vector<float> words[5];  // every codeword: four components and half the squared length
    std::vector<int32_t> number;  // code of each product

    float units[24][4];
    uint8_t product[24][24];   // of the group
    uint8_t inverse[24];
    uint8_t turn_unit[12];     // for each outcome of the reduction by rotations the unit that does it
    uint8_t rotation_unit[12]; // the codebook's order of rotations,
    uint8_t unit_rotation[24]; // and the number of each unit's

    // Codes of n chunks (n, 4).
    void nearest(const float* x, int64_t n, int32_t* code) const;
};

}  // namespace tessera
