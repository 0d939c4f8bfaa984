// The recurrence of a grid of cells, defined by kernels/recurrent_grid.py. All arrays are contiguous floats, the last index
// fastest.
#pragma once

#include <cstdint>

namespace tessera {

struct GridSteps {
    int64_t batch, steps, reads;
    int channels, size[3];
    bool gated_by_state;
    const float *h, *c;         // (batch, channels, cells) before the first step
    const float* written[3];    // (batch, steps, size, channels)
    const float* mask[3];       // (batch, steps, size), or null: all cells are updated
    const float* read;          // (batch, steps, reads, 3), in cells
    const float *weight, *bias; // (4 channels, inputs), (4 channels)
    const float* taps;          // (3, channels, 3), or null
    float *out, *h_out, *c_out; // (batch, steps, reads, channels); as h and c
    float* kept;                // (batch, segments, 2, cells, channels rounded up to 16), the state before each segment; or null
    int64_t every;              // steps in a segment
    int threads;
};

struct GridGradients {
    const float *out, *h, *c;     // of the results
    float *h_in, *c_in;           // of what is there before, and so on, as in GridSteps
    float *written[3], *mask[3], *read;
    float *weight, *bias, *taps;  // with a leading batch dimension, which the caller sums over
};

void advance_portable(const GridSteps&);
void retreat_portable(const GridSteps&, const GridGradients&);
#if defined(TESSERA_X86)
void advance_avx2(const GridSteps&);
void retreat_avx2(const GridSteps&, const GridGradients&);
void advance_avx512(const GridSteps&);
void retreat_avx512(const GridSteps&, const GridGradients&);
#endif

}  // namespace tessera
