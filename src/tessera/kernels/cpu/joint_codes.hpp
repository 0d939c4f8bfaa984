// Encoding by a joint codebook, from vectors to stored bytes in one pass; codecs/hqmq_joint.py is the definition.
#pragma once

#include <cstdint>

#include "book.hpp"
#include "nearest.hpp"

namespace tessera {

struct JointCodes {
    const Index* index;
    const Book* book;      // the rotation, the scales and the width of a code
    const float* x;        // (lines, tokens, dim), finite; dim is a multiple of four
    const float* weights;  // (lines, dim), weights of each channel's squared error before the rotation; null: equal weights
    int64_t lines, tokens;
    int dim;
    uint16_t* centre;      // (lines, ceil(tokens / GROUP), dim), words of codecs/precondition.py; null: vectors are not centred
    uint8_t* scale;        // (lines, tokens), bytes of codecs/logscale.py
    uint8_t* codes;        // (lines, tokens, bytes)
    int threads;
};

// Returns false if the weights are not positive; nothing is encoded then.
bool encode_joint_portable(const JointCodes& s);
#if defined(TESSERA_X86)
bool encode_joint_avx2(const JointCodes& s);
bool encode_joint_avx512(const JointCodes& s);
#endif

}  // namespace tessera
