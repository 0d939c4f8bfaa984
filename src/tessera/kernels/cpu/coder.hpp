// Describes how vectors are coded, with one kind for each format of kernels/.
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

    // Returns the bytes of the codes of a vector of this many chunks of four numbers.
    virtual int64_t row_bytes(int chunks) const = 0;
};

}  // namespace tessera
