// Vectors of TESSERA_LANES numbers. Included once per instruction set, in a separate namespace: the linker must not merge code
// compiled for different instruction sets.

#pragma once

#include <cstdint>
#include <cstring>

namespace {

// Vector types of the compiler, as wide as a register of the instruction set.
constexpr int LANES = TESSERA_LANES;
typedef float Lanes __attribute__((vector_size(4 * LANES)));
typedef int32_t IntLanes __attribute__((vector_size(4 * LANES)));
typedef float Quarter __attribute__((vector_size(16)));

inline Lanes load(const float* x) {
    Lanes lanes;
    std::memcpy(&lanes, x, sizeof lanes);
    return lanes;
}

inline void store(float* x, Lanes lanes) { std::memcpy(x, &lanes, sizeof lanes); }

// Reduces all lanes to one number, halving the width at each step.
template <int WIDTH, class Join>
inline float joined(Lanes x, Join join) {
    Lanes other;
#pragma GCC unroll 16
    for (int j = 0; j < LANES; ++j) other[j] = x[j ^ WIDTH];
    if constexpr (WIDTH == 1) return join(x, other)[0];
    else return joined<WIDTH / 2>(join(x, other), join);
}

inline float total(Lanes lanes) {
    return joined<LANES / 2>(lanes, [](Lanes a, Lanes b) { return a + b; });
}

inline float largest(Lanes lanes) {
    return joined<LANES / 2>(lanes, [](Lanes a, Lanes b) { return a > b ? a : b; });
}

// Computes e^x for x <= 0 with relative error 1e-7 (1 + |x|); 0 below -87. It is 2^n times a polynomial
// for 2^r that is 1 at r = 0.
inline Lanes exp_negative(Lanes x) {
    const Lanes t = (x > -87.0f ? x : Lanes{} - 87.0f) * 1.44269504f;
    const IntLanes n = __builtin_convertvector(t - 0.5f, IntLanes);  // rounds to the nearest: conversion truncates
    const Lanes r = t - __builtin_convertvector(n, Lanes);
    Lanes p = r * 1.3264727029e-3f + 9.6715128780e-3f;
    p = p * r + 5.5507337459e-2f;
    p = p * r + 2.4022242082e-1f;
    p = p * r + 6.9314697760e-1f;
    p = p * r + 1.0f;
    const IntLanes bits = (n + 127) << 23;
    Lanes power;
    std::memcpy(&power, &bits, sizeof power);
    return x < -87.0f ? Lanes{} : p * power;
}

}  // namespace
