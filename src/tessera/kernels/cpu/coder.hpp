// How vectors are coded, as the kernels read it; one kind for each of the formats of kernels/.
#pragma once

#include <cstdint>

namespace tessera {

// y = R x: signs, then the Kronecker product of a small DCT and a Hadamard matrix, see codecs/rotation.py.
struct Rotation {
    int dim = 0, odd = 0;
    const float* dct = nullptr;    // (odd, odd)
    const float* signs = nullptr;  // (dim,), null for no rotation at all
};

struct Coder {
    enum Kind { JOINT, PRODUCT, SCALAR };  // Book, Products, Scalars

    const Kind kind;
    Rotation rotation;  // of what is coded

    explicit Coder(Kind kind) : kind(kind) {}
    virtual ~Coder() = default;
    Coder(const Coder&) = delete;
    Coder& operator=(const Coder&) = delete;

    // Of the codes of a vector of so many chunks of four numbers.
    virtual int64_t row_bytes(int chunks) const = 0;
};

}  // namespace tessera
