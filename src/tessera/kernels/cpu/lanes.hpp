// TESSERA_LANES numbers side by side. Included by one file for each instruction set, in a namespace of its own: code compiled
// for one must not be merged with another's by the linker.

#include <cstdint>
#include <cstring>

namespace {

// Numbers side by side, of compilers' own vector types, as many as the instruction set has room for in a register.
constexpr int LANES = TESSERA_LANES;
typedef float Lanes __attribute__((vector_size(4 * LANES)));
typedef int32_t IntLanes __attribute__((vector_size(4 * LANES)));

inline Lanes load(const float* x) {
    Lanes lanes;
    std::memcpy(&lanes, x, sizeof lanes);
    return lanes;
}

inline void store(float* x, Lanes lanes) { std::memcpy(x, &lanes, sizeof lanes); }

inline float total(Lanes lanes) {
    float x[LANES];
    store(x, lanes);
    for (int width = LANES / 2; width > 0; width /= 2)
        for (int j = 0; j < width; ++j) x[j] += x[j + width];
    return x[0];
}

// e^x for x <= 0, to 2 units in the last place; 0 below -87.
inline Lanes exp_negative(Lanes x) {
    const Lanes y = x < -87.0f ? Lanes{} - 87.0f : x;
    const IntLanes n = __builtin_convertvector(y * 1.44269504f - 0.5f, IntLanes);  // to the nearest: conversion cuts off
    const Lanes whole = __builtin_convertvector(n, Lanes);
    const Lanes r = (y - whole * 0.693359375f) + whole * 2.12194440e-4f;
    Lanes p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const IntLanes bits = (n + 127) << 23;
    Lanes power;
    std::memcpy(&power, &bits, sizeof power);
    return x < -87.0f ? Lanes{} : p * power;
}

}  // namespace
