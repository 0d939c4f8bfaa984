// The recurrence of an associative matrix that absorbs pairs and is read, defined by tensor_cache/recurrence.py, for its outer and
// delta rules. All arrays are contiguous floats, the last index fastest.
#pragma once

#include <cstdint>

namespace tessera {

struct Absorb {
    int64_t heads, tokens;  // heads of all sequences
    int group, d_k, d_v;
    bool delta, read_first;
    const float *q, *k, *v;      // (heads, group, tokens, d_k), (heads, tokens, d_k), (heads, tokens, d_v)
    const float *decay, *rate;   // (heads, tokens)
    const float* state;          // (heads, d_k, d_v)
    float *read, *end;           // (heads, group, tokens, d_v); as state
    float* kept;                 // (heads, segments, d_k, d_v rounded up to 16), the matrix before each segment; or null
    float* fresh;                // (heads, tokens, d_v), values minus what the matrix returned for their keys; or null
    int64_t every;               // tokens in a segment
    int threads;
};

struct AbsorbGradients {
    const float *read, *end;                        // of the results
    float *q, *k, *v, *decay, *rate, *state;        // of what is given
};

void absorb_portable(const Absorb&);
void absorb_backward_portable(const Absorb&, const AbsorbGradients&);
#if defined(TESSERA_X86)
void absorb_avx2(const Absorb&);
void absorb_backward_avx2(const Absorb&, const AbsorbGradients&);
void absorb_avx512(const Absorb&);
void absorb_backward_avx512(const Absorb&, const AbsorbGradients&);
#endif

}  // namespace tessera
