// Forward of grid.hpp, for the instruction set of lanes.hpp. Each sequence is processed by one thread. The channels of a cell
// are contiguous and padded with zeros to whole registers: every loop is over registers of channels.

#include <algorithm>
#include <cmath>
#include <cstring>

#include "lanes.hpp"
#include "memory.hpp"
#include "threads.hpp"

namespace {

using namespace tessera;

inline Lanes all(float x) { return x - Lanes{}; }  // compilers fold x - 0 to x; x + 0 they keep, because of -0

inline Lanes magnitude(Lanes x) { return x < 0.0f ? -x : x; }

inline Lanes sigmoid(Lanes x) {
    const Lanes e = exp_negative(-magnitude(x)), s = 1.0f / (1.0f + e);
    return x < 0.0f ? e * s : s;
}

inline Lanes hyperbolic(Lanes x) {
    const Lanes y = magnitude(x), e = exp_negative(-2.0f * y), far = (1.0f - e) / (1.0f + e), z = x * x;
    Lanes p = z * -5.70498872745e-3f + 2.06390887954e-2f;
    p = p * z - 5.37397155531e-2f;
    p = p * z + 1.33314422036e-1f;
    p = p * z - 3.33332819422e-1f;
    // Near zero the quotient would cancel digits.
    return y < 0.625f ? p * z * x + x : (x < 0.0f ? -far : far);
}

// Adds the sum over k of in[p * stride + k] · b[k * row + v] to acc[p][v]; v counts registers.
template <int P, int V>
__attribute__((always_inline)) inline void multiply(Lanes (&acc)[P][V], const float* in, int64_t stride, int64_t count,
                                                    const float* b, int64_t row) {
    for (int64_t k = 0; k < count; ++k) {
        Lanes w[V];
        for (int v = 0; v < V; ++v) w[v] = load(b + k * row + v * LANES);
        for (int p = 0; p < P; ++p) {
            const Lanes x = all(in[p * stride + k]);
            for (int v = 0; v < V; ++v) acc[p][v] += x * w[v];
        }
    }
}

// Cells computed together: as many as their four gates fit in registers.
constexpr int CELLS = LANES == 16 ? 6 : LANES == 8 ? 3 : 2;

struct GridWeights {
    int channels, wide, groups, inputs;  // `wide`: channels rounded up; `inputs`: of the gates, wide or 2 wide
    float *gates, *bias, *back, *taps;   // (groups, inputs, 4, LANES), (groups, 4, LANES), (4 wide, inputs), (3, 3, wide)

    GridWeights(const GridSteps& s, Memory& memory) {
        channels = s.channels;
        groups = (channels + LANES - 1) / LANES;
        wide = groups * LANES;
        const int halves = s.gated_by_state ? 2 : 1;
        inputs = halves * wide;
        gates = zeros(memory, size_t(4) * wide * inputs), back = zeros(memory, size_t(4) * wide * inputs);
        bias = zeros(memory, size_t(4) * wide);
        for (int gate = 0; gate < 4; ++gate)
            for (int o = 0; o < channels; ++o) {
                const int place = out_place(gate, o);
                bias[place] = s.bias[gate * channels + o];
                for (int half = 0; half < halves; ++half)
                    for (int k = 0; k < channels; ++k) {
                        const float w = s.weight[size_t(gate * channels + o) * halves * channels + half * channels + k];
                        const int from = half * wide + k;
                        gates[(size_t(o / LANES) * inputs + from) * 4 * LANES + place % (4 * LANES)] = w;
                        back[size_t(place) * inputs + from] = w;
                    }
            }
        taps = nullptr;
        if (!s.taps) return;
        taps = zeros(memory, size_t(9) * wide);
        for (int axis = 0; axis < 3; ++axis)
            for (int o = 0; o < channels; ++o)
                for (int k = 0; k < 3; ++k) taps[(axis * 3 + k) * wide + o] = s.taps[(axis * channels + o) * 3 + k];
    }

    // Returns the index of a gate of a channel within a cell: registers of the four gates alternate.
    int out_place(int gate, int channel) const { return (channel / LANES * 4 + gate) * LANES + channel % LANES; }

    static float* zeros(Memory& memory, size_t count) {
        float* x = memory.take<float>(count);
        std::fill(x, x + count, 0.0f);
        return x;
    }
};

// The log of a step for its backward pass, for the cells of its box in order.
struct Log {
    float* inputs;  // (cells, inputs), what the gates see
    float* gates;   // (cells, groups, 5, LANES): i, f, o, g after their functions, and tanh(c')
    float *h, *c;   // (cells, wide), before the step
};

class GridSequence {
  public:
    GridSequence(const GridSteps& s, const GridWeights& w, int64_t row, Memory& memory) : s(s), w(w), row(row), wide(w.wide) {
        cells = int64_t(s.size[0]) * s.size[1] * s.size[2];
        h = memory.take<float>(cells * wide), c = memory.take<float>(cells * wide);
        for (int d = 0; d < 3; ++d) {
            x[d] = GridWeights::zeros(memory, size_t(s.size[d]) * wide);
            m[d] = memory.take<float>(s.size[d]);
        }
        place = memory.take<int64_t>(cells);
        mask = memory.take<float>(cells);
        empty = GridWeights::zeros(memory, size_t(s.size[2] + 2) * wide);
        const int64_t around = int64_t(s.size[0]) * (s.size[1] + 2) * (s.size[2] + 2) * wide;
        first = memory.take<float>(around), second = memory.take<float>(around);
    }

    static Log log(const GridWeights& w, int64_t cells, Memory& memory) {
        return {memory.take<float>(cells * w.inputs), memory.take<float>(cells * 5 * w.wide), memory.take<float>(cells * w.wide),
                memory.take<float>(cells * w.wide)};
    }

    void run() {
        Memory memory;
        const Log scratch = log(w, cells, memory);
        widen(s.h, h), widen(s.c, c);
        for (int64_t t = 0; t < s.steps; ++t) {
            if (s.kept && t % s.every == 0) {
                std::memcpy(kept(t), h, sizeof(float) * cells * wide);
                std::memcpy(kept(t) + cells * wide, c, sizeof(float) * cells * wide);
            }
            for (int64_t r = 0; r < s.reads; ++r) read(t, r);
            step<false>(t, scratch);
        }
        narrow(h, s.h_out), narrow(c, s.c_out);
    }

  protected:
    float* kept(int64_t t) const {
        const int64_t segments = (s.steps + s.every - 1) / s.every, padded = (s.channels + 15) / 16 * 16;
        return s.kept + (row * segments + t / s.every) * 2 * cells * padded;
    }

    // Transpose this sequence's state from (channels, cells) to (cells, wide), and back.
    void widen(const float* from, float* to) const {
        from += row * s.channels * cells;
        for (int64_t p = 0; p < cells; ++p)
            for (int o = 0; o < wide; ++o) to[p * wide + o] = o < s.channels ? from[o * cells + p] : 0.0f;
    }
    void narrow(const float* from, float* to) const {
        to += row * s.channels * cells;
        for (int o = 0; o < s.channels; ++o)
            for (int64_t p = 0; p < cells; ++p) to[o * cells + p] = from[p * wide + o];
    }

    // The eight cells around a position, and their weights along each axis.
    struct Corners {
        int64_t cell[8];
        float along[3][2], slope[3];

        Corners(const GridSteps& s, const float* at) {
            int low[3];
            for (int d = 0; d < 3; ++d) {
                const float last = float(s.size[d] - 1), p = at[d] > 0 ? std::min(at[d], last) : 0.0f;  // NaN becomes 0
                low[d] = std::max(0, std::min(int(p), s.size[d] - 2));
                along[d][1] = p - float(low[d]), along[d][0] = 1.0f - along[d][1];
                slope[d] = s.size[d] > 1;
            }
            for (int k = 0; k < 8; ++k) {
                const int bit[3] = {k >> 2, k >> 1 & 1, k & 1};
                int64_t at_cell = 0;
                for (int d = 0; d < 3; ++d) at_cell = at_cell * s.size[d] + std::min(low[d] + bit[d], s.size[d] - 1);
                cell[k] = at_cell;
            }
        }
        float weight(int k) const { return along[0][k >> 2] * along[1][k >> 1 & 1] * along[2][k & 1]; }
    };

    void read(int64_t t, int64_t r) const {
        const int64_t number = (row * s.steps + t) * s.reads + r;
        const Corners corners(s, s.read + 3 * number);
        float sum[LANES];
        for (int o = 0; o < wide; o += LANES) {
            Lanes y{};
            for (int k = 0; k < 8; ++k) y += all(corners.weight(k)) * load(h + corners.cell[k] * wide + o);
            store(sum, y);
            std::copy(sum, sum + std::min(LANES, s.channels - o), s.out + number * s.channels + o);
        }
    }

    // Loads the inputs of step t, and finds the box of the cells that it changes.
    void take(int64_t t) {
        for (int d = 0; d < 3; ++d) {
            const int64_t at = (row * s.steps + t) * s.size[d];
            for (int i = 0; i < s.size[d]; ++i) {
                const float* from = s.written[d] + (at + i) * s.channels;
                std::copy(from, from + s.channels, x[d] + i * wide);
            }
            low[d] = 0, count[d] = s.size[d];
            if (!s.mask[d]) continue;
            std::copy(s.mask[d] + at, s.mask[d] + at + s.size[d], m[d]);
            while (count[d] > 0 && m[d][low[d]] == 0) ++low[d], --count[d];
            while (count[d] > 0 && m[d][low[d] + count[d] - 1] == 0) --count[d];
        }
        box = int64_t(count[0]) * count[1] * count[2];
        int64_t i = 0;
        for (int a = 0; a < count[0] && box; ++a)
            for (int b = 0; b < count[1]; ++b)
                for (int e = 0; e < count[2]; ++e, ++i) {
                    place[i] = (int64_t(low[0] + a) * s.size[1] + low[1] + b) * s.size[2] + low[2] + e;
                    if (s.mask[0]) mask[i] = m[0][low[0] + a] * m[1][low[1] + b] * m[2][low[2] + e];
                }
    }

    template <bool RECORD>
    void step(int64_t t, const Log& log) {
        take(t);
        if (!box) return;
        float* to = log.inputs;
        for (int a = 0; a < count[0]; ++a)
            for (int b = 0; b < count[1]; ++b)
                for (int e = 0; e < count[2]; ++e, to += w.inputs)
                    for (int o = 0; o < wide; o += LANES)
                        store(to + o, load(x[0] + (low[0] + a) * wide + o) * load(x[1] + (low[1] + b) * wide + o) *
                                          load(x[2] + (low[2] + e) * wide + o));
        if (s.gated_by_state && w.taps) {
            along_depth_and_height();
            for (int64_t line = 0; line < int64_t(count[0]) * count[1]; ++line) {
                const float* from = second + line * (count[2] + 2) * wide;
                weigh(log.inputs + line * count[2] * w.inputs + wide, w.inputs, from, from + wide, from + 2 * wide, 2, count[2]);
            }
        }
        for (int64_t i = 0; i < box; ++i) {
            std::memcpy(log.h + i * wide, h + place[i] * wide, sizeof(float) * wide);
            std::memcpy(log.c + i * wide, c + place[i] * wide, sizeof(float) * wide);
            if (s.gated_by_state && !w.taps) std::memcpy(log.inputs + i * w.inputs + wide, log.h + i * wide, sizeof(float) * wide);
        }
        int64_t i = 0;
        for (; i + CELLS <= box; i += CELLS) update<RECORD, CELLS>(i, log);
        for (; i < box; ++i) update<RECORD, 1>(i, log);
    }

    // Computes the sum of three cells times their taps, for n cells of a line.
    void weigh(float* to, int64_t stride, const float* before, const float* own, const float* behind, int axis, int n) const {
        for (int o = 0; o < wide; o += LANES) {
            const float* tap = w.taps + axis * 3 * wide + o;
            const Lanes a = load(tap), b = load(tap + wide), e = load(tap + 2 * wide);
            for (int i = 0; i < n; ++i)
                store(to + i * stride + o, a * load(before + i * wide + o) + b * load(own + i * wide + o) + e * load(behind + i * wide + o));
        }
    }

    // Computes the first two passes of the stencil over the box and a margin of one cell, which is zero outside the grid:
    // `first` (count, count + 2, count + 2), `second` (count, count, count + 2).
    void along_depth_and_height() {
        const int line = (count[2] + 2) * wide, left = low[2] > 0, right = low[2] + count[2] < s.size[2], n = count[2] + left + right;
        for (int a = 0; a < count[0]; ++a) {
            for (int b = -1; b <= count[1]; ++b) {
                float* to = first + (int64_t(a) * (count[1] + 2) + b + 1) * line;
                const int y = low[1] + b, z = low[0] + a;
                if (y < 0 || y >= s.size[1]) {
                    std::fill(to, to + line, 0.0f);
                    continue;
                }
                if (!left) std::fill(to, to + wide, 0.0f);
                if (!right) std::fill(to + line - wide, to + line, 0.0f);
                const int64_t layer = int64_t(s.size[1]) * s.size[2] * wide;
                const float* own = h + z * layer + (int64_t(y) * s.size[2] + low[2] - left) * wide;
                weigh(to + (1 - left) * wide, wide, z > 0 ? own - layer : empty, own, z + 1 < s.size[0] ? own + layer : empty, 0, n);
            }
            for (int b = 0; b < count[1]; ++b) {
                const float* from = first + (int64_t(a) * (count[1] + 2) + b) * line;
                weigh(second + (int64_t(a) * count[1] + b) * line, wide, from, from + line, from + 2 * line, 1, count[2] + 2);
            }
        }
    }

    template <bool RECORD, int P>
    void update(int64_t i, const Log& log) {
        for (int group = 0; group < w.groups; ++group) {
            const int o = group * LANES;
            Lanes acc[P][4];
            for (int p = 0; p < P; ++p)
                for (int v = 0; v < 4; ++v) acc[p][v] = load(w.bias + 4 * o + v * LANES);
            multiply<P, 4>(acc, log.inputs + i * w.inputs, w.inputs, w.inputs, w.gates + size_t(group) * w.inputs * 4 * LANES, 4 * LANES);
            for (int p = 0; p < P; ++p) {
                const Lanes in = sigmoid(acc[p][0]), forget = sigmoid(acc[p][1]), open = sigmoid(acc[p][2]), g = hyperbolic(acc[p][3]);
                const Lanes past = load(log.c + (i + p) * wide + o), now = forget * past + in * g, shown = hyperbolic(now);
                const int64_t to = place[i + p] * wide + o;
                if (s.mask[0]) {
                    const Lanes share = all(mask[i + p]), before = load(log.h + (i + p) * wide + o);
                    store(c + to, past + share * (now - past));
                    store(h + to, before + share * (open * shown - before));
                } else {
                    store(c + to, now);
                    store(h + to, open * shown);
                }
                if (RECORD) {
                    float* gates = log.gates + (i + p) * 5 * wide + 5 * o;
                    store(gates, in), store(gates + LANES, forget), store(gates + 2 * LANES, open);
                    store(gates + 3 * LANES, g), store(gates + 4 * LANES, shown);
                }
            }
        }
    }

    const GridSteps& s;
    const GridWeights& w;
    const int64_t row;
    const int wide;
    int64_t cells, box = 0;
    float *h, *c;        // (cells, wide)
    float *x[3], *m[3];  // of the step: V's vectors (size, wide), the mask's
    int low[3], count[3];
    int64_t* place;  // of the cells of the box
    float* mask;     // of the cells of the box
    float *empty, *first, *second;
};

}  // namespace
