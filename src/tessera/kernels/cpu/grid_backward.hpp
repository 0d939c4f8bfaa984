// Backward of grid.hpp: for each segment, from the last, forward is repeated with a log, then gradients go back through it.

#include "grid_impl.hpp"

namespace {

class GridBackward : GridSequence {
  public:
    GridBackward(const GridSteps& s, const GridWeights& w, const GridGradients& d, int64_t row, Memory& memory)
        : GridSequence(s, w, row, memory), d(d) {
        dh = memory.take<float>(cells * wide), dc = memory.take<float>(cells * wide);
        d_gates = memory.take<float>(cells * 4 * wide), d_inputs = memory.take<float>(cells * w.inputs);
        d_mask = memory.take<float>(cells);
        for (int axis = 0; axis < 3; ++axis) dx[axis] = memory.take<float>(size_t(s.size[axis]) * wide);
        d_weight = GridWeights::zeros(memory, size_t(w.inputs) * 4 * wide), d_bias = GridWeights::zeros(memory, size_t(4) * wide);
        d_taps = GridWeights::zeros(memory, size_t(9) * wide);
        const int64_t around = int64_t(s.size[0]) * (s.size[1] + 2) * (s.size[2] + 2) * wide;
        d_first = memory.take<float>(around), d_second = memory.take<float>(around);
    }

    void run() {
        Memory memory;
        std::vector<Log> logs(std::min(s.every, s.steps));
        for (Log& one : logs) one = log(w, cells, memory);
        widen(d.h, dh), widen(d.c, dc);
        for (int64_t begin = (s.steps - 1) / s.every * s.every; begin >= 0; begin -= s.every) {
            std::memcpy(h, kept(begin), sizeof(float) * cells * wide);
            std::memcpy(c, kept(begin) + cells * wide, sizeof(float) * cells * wide);
            const int64_t end = std::min(begin + s.every, s.steps);
            for (int64_t t = begin; t < end; ++t) step<true>(t, logs[t - begin]);
            for (int64_t t = end - 1; t >= begin; --t) {
                back(t, logs[t - begin]);
                for (int64_t r = 0; r < s.reads; ++r) back_read(t, r);
            }
        }
        narrow(dh, d.h_in), narrow(dc, d.c_in);
        give_weights();
    }

  private:
    void back(int64_t t, const Log& log) {
        take(t);
        for (int axis = 0; axis < 3; ++axis) std::fill(dx[axis], dx[axis] + s.size[axis] * wide, 0.0f);
        if (box) {
            for (int64_t i = 0; i < box; ++i) {
                std::memcpy(h + place[i] * wide, log.h + i * wide, sizeof(float) * wide);
                std::memcpy(c + place[i] * wide, log.c + i * wide, sizeof(float) * wide);
            }
            back_update(log);
            back_weights(log);
            int o = 0;
            for (; o + 4 * LANES <= w.inputs; o += 4 * LANES) back_inputs<LANES == 16 ? 6 : 2, 4>(o);
            for (; o + 2 * LANES <= w.inputs; o += 2 * LANES) back_inputs<LANES == 16 ? 8 : 4, 2>(o);
            for (; o < w.inputs; o += LANES) back_inputs<8, 1>(o);
            if (s.gated_by_state) w.taps ? back_stencil() : back_hidden();
            back_written();
        }
        for (int axis = 0; axis < 3; ++axis) {
            const int64_t at = (row * s.steps + t) * s.size[axis];
            for (int i = 0; i < s.size[axis]; ++i)
                std::copy(dx[axis] + i * wide, dx[axis] + i * wide + s.channels, d.written[axis] + (at + i) * s.channels);
        }
        if (s.mask[0]) back_mask(t);
    }

    // Turns dh and dc after the step into those before it, except the part through the gates, which is written to `d_gates`.
    void back_update(const Log& log) {
        if (s.mask[0]) std::fill(d_mask, d_mask + box, 0.0f);
        for (int o = 0; o < wide; o += LANES) {
            Lanes sum[4] = {};
            for (int64_t i = 0; i < box; ++i) {
                const float* gates = log.gates + i * 5 * wide + 5 * o;
                const Lanes in = load(gates), forget = load(gates + LANES), open = load(gates + 2 * LANES);
                const Lanes g = load(gates + 3 * LANES), shown = load(gates + 4 * LANES), past = load(log.c + i * wide + o);
                float *to_h = dh + place[i] * wide + o, *to_c = dc + place[i] * wide + o;
                Lanes d_h = load(to_h), d_c = load(to_c), rest_h{}, rest_c{};
                if (s.mask[0]) {
                    const Lanes share = all(mask[i]), now = forget * past + in * g, before = load(log.h + i * wide + o);
                    d_mask[i] += total(d_h * (open * shown - before) + d_c * (now - past));
                    rest_h = d_h - share * d_h, rest_c = d_c - share * d_c;
                    d_h = share * d_h, d_c = share * d_c;
                }
                d_c += d_h * open * (1.0f - shown * shown);
                const Lanes gate[4] = {d_c * g * in * (1.0f - in), d_c * past * forget * (1.0f - forget),
                                       d_h * shown * open * (1.0f - open), d_c * in * (1.0f - g * g)};
                for (int v = 0; v < 4; ++v) {
                    sum[v] += gate[v];
                    store(d_gates + i * 4 * wide + 4 * o + v * LANES, gate[v]);
                }
                store(to_h, rest_h);
                store(to_c, rest_c + d_c * forget);
            }
            for (int v = 0; v < 4; ++v) {
                float* to = d_bias + 4 * o + v * LANES;
                store(to, load(to) + sum[v]);
            }
        }
    }

    void back_weights(const Log& log) {
        constexpr int P = LANES == 16 ? 4 : 2;
        for (int group = 0; group < w.groups; ++group)
            for (int k = 0; k < w.inputs; k += P) {
                Lanes acc[P][4];
                float* to = d_weight + size_t(k) * 4 * wide + group * 4 * LANES;
                for (int p = 0; p < P; ++p)
                    for (int v = 0; v < 4; ++v) acc[p][v] = load(to + p * 4 * wide + v * LANES);
                const float *in = log.inputs + k, *from = d_gates + group * 4 * LANES;
                for (int64_t i = 0; i < box; ++i, in += w.inputs, from += 4 * wide) {
                    Lanes y[4];
                    for (int v = 0; v < 4; ++v) y[v] = load(from + v * LANES);
                    for (int p = 0; p < P; ++p)
                        for (int v = 0; v < 4; ++v) acc[p][v] += all(in[p]) * y[v];
                }
                for (int p = 0; p < P; ++p)
                    for (int v = 0; v < 4; ++v) store(to + p * 4 * wide + v * LANES, acc[p][v]);
            }
    }

    template <int P, int V>
    void back_inputs(int o) {
        int64_t i = 0;
        for (; i + P <= box; i += P) back_tile<P, V>(i, o);
        for (; i < box; ++i) back_tile<1, V>(i, o);
    }

    template <int P, int V>
    void back_tile(int64_t i, int o) {
        Lanes acc[P][V] = {};
        multiply<P, V>(acc, d_gates + i * 4 * wide, 4 * wide, 4 * wide, w.back + o, w.inputs);
        for (int p = 0; p < P; ++p)
            for (int v = 0; v < V; ++v) store(d_inputs + (i + p) * w.inputs + o + v * LANES, acc[p][v]);
    }

    void back_hidden() {
        for (int64_t i = 0; i < box; ++i)
            for (int o = 0; o < wide; o += LANES) {
                float* to = dh + place[i] * wide + o;
                store(to, load(to) + load(d_inputs + i * w.inputs + wide + o));
            }
    }

    // Adds the gradients of `weigh`. A null pointer means that the gradient is zero.
    void back_weigh(const float* from, int64_t stride, const float* const value[3], float* const to[3], int axis, int n) {
        for (int o = 0; o < wide; o += LANES)
            for (int k = 0; k < 3; ++k) {
                if (!to[k]) continue;
                float* sum = d_taps + (axis * 3 + k) * wide + o;
                const Lanes tap = load(w.taps + (axis * 3 + k) * wide + o);
                Lanes own = load(sum);
                for (int i = 0; i < n; ++i) {
                    const Lanes y = load(from + i * stride + o);
                    float* at = to[k] + i * wide + o;
                    own += y * load(value[k] + i * wide + o);
                    store(at, load(at) + tap * y);
                }
                store(sum, own);
            }
    }

    void back_stencil() {
        along_depth_and_height();
        const int line = (count[2] + 2) * wide, left = low[2] > 0, right = low[2] + count[2] < s.size[2], n = count[2] + left + right;
        std::fill(d_first, d_first + int64_t(count[0]) * (count[1] + 2) * line, 0.0f);
        std::fill(d_second, d_second + int64_t(count[0]) * count[1] * line, 0.0f);
        for (int64_t i = 0; i < int64_t(count[0]) * count[1]; ++i) {
            const float *from = d_inputs + i * count[2] * w.inputs + wide, *v = second + i * line;
            float* to = d_second + i * line;
            const float* const value[3] = {v, v + wide, v + 2 * wide};
            float* const target[3] = {to, to + wide, to + 2 * wide};
            back_weigh(from, w.inputs, value, target, 2, count[2]);
        }
        const int64_t layer = int64_t(s.size[1]) * s.size[2] * wide;
        for (int a = 0; a < count[0]; ++a) {
            for (int b = 0; b < count[1]; ++b) {
                const int64_t at = (int64_t(a) * (count[1] + 2) + b) * line;
                const float* const value[3] = {first + at, first + at + line, first + at + 2 * line};
                float* const target[3] = {d_first + at, d_first + at + line, d_first + at + 2 * line};
                back_weigh(d_second + (int64_t(a) * count[1] + b) * line, wide, value, target, 1, count[2] + 2);
            }
            for (int b = -1; b <= count[1]; ++b) {
                const int y = low[1] + b, z = low[0] + a;
                if (y < 0 || y >= s.size[1]) continue;
                const int64_t at = z * layer + (int64_t(y) * s.size[2] + low[2] - left) * wide;
                const float* const value[3] = {h + at - layer, h + at, h + at + layer};
                float* const target[3] = {z > 0 ? dh + at - layer : nullptr, dh + at, z + 1 < s.size[0] ? dh + at + layer : nullptr};
                back_weigh(d_first + (int64_t(a) * (count[1] + 2) + b + 1) * line + (1 - left) * wide, wide, value, target, 0, n);
            }
        }
    }

    void back_written() {
        const float* from = d_inputs;
        for (int a = 0; a < count[0]; ++a)
            for (int b = 0; b < count[1]; ++b, from += count[2] * w.inputs)
                for (int o = 0; o < wide; o += LANES) {
                    const Lanes x0 = load(x[0] + (low[0] + a) * wide + o), x1 = load(x[1] + (low[1] + b) * wide + o), both = x0 * x1;
                    Lanes sum{};
                    for (int e = 0; e < count[2]; ++e) {
                        const Lanes y = load(from + e * w.inputs + o);
                        float* to = dx[2] + (low[2] + e) * wide + o;
                        sum += y * load(x[2] + (low[2] + e) * wide + o);
                        store(to, load(to) + y * both);
                    }
                    float *to0 = dx[0] + (low[0] + a) * wide + o, *to1 = dx[1] + (low[1] + b) * wide + o;
                    store(to0, load(to0) + sum * x1);
                    store(to1, load(to1) + sum * x0);
                }
    }

    void back_mask(int64_t t) {
        float* to[3];
        for (int axis = 0; axis < 3; ++axis) {
            to[axis] = d.mask[axis] + (row * s.steps + t) * s.size[axis];
            std::fill(to[axis], to[axis] + s.size[axis], 0.0f);
        }
        int64_t i = 0;
        for (int a = low[0]; a < low[0] + count[0] && box; ++a)
            for (int b = low[1]; b < low[1] + count[1]; ++b)
                for (int e = low[2]; e < low[2] + count[2]; ++e, ++i) {
                    to[0][a] += d_mask[i] * m[1][b] * m[2][e];
                    to[1][b] += d_mask[i] * m[0][a] * m[2][e];
                    to[2][e] += d_mask[i] * m[0][a] * m[1][b];
                }
    }

    void back_read(int64_t t, int64_t r) {
        const int64_t number = (row * s.steps + t) * s.reads + r;
        const Corners corners(s, s.read + 3 * number);
        const float* grad = d.out + number * s.channels;
        float slope[3] = {0, 0, 0};
        for (int k = 0; k < 8; ++k) {
            const int bit[3] = {k >> 2, k >> 1 & 1, k & 1};
            const float weight = corners.weight(k), *value = h + corners.cell[k] * wide;
            float *to = dh + corners.cell[k] * wide, dot = 0;
            for (int o = 0; o < s.channels; ++o) {
                dot += grad[o] * value[o];
                to[o] += weight * grad[o];
            }
            for (int axis = 0; axis < 3; ++axis) {
                const int a = (axis + 1) % 3, b = (axis + 2) % 3;
                slope[axis] += (bit[axis] ? dot : -dot) * corners.along[a][bit[a]] * corners.along[b][bit[b]] * corners.slope[axis];
            }
        }
        std::copy(slope, slope + 3, d.read + 3 * number);
    }

    void give_weights() const {
        const int halves = s.gated_by_state ? 2 : 1, all_inputs = halves * s.channels;
        for (int gate = 0; gate < 4; ++gate)
            for (int o = 0; o < s.channels; ++o) {
                const int64_t to = row * 4 * s.channels + gate * s.channels + o;
                const int from = w.out_place(gate, o);
                d.bias[to] = d_bias[from];
                for (int half = 0; half < halves; ++half)
                    for (int k = 0; k < s.channels; ++k)
                        d.weight[to * all_inputs + half * s.channels + k] = d_weight[size_t(half * wide + k) * 4 * wide + from];
            }
        if (!s.taps) return;
        for (int axis = 0; axis < 3; ++axis)
            for (int o = 0; o < s.channels; ++o)
                for (int k = 0; k < 3; ++k)
                    d.taps[((row * 3 + axis) * s.channels + o) * 3 + k] = d_taps[(axis * 3 + k) * wide + o];
    }

    const GridGradients& d;
    float *dh, *dc, *d_gates, *d_inputs, *d_mask, *dx[3];
    float *d_weight, *d_bias, *d_taps, *d_first, *d_second;  // d_weight: (inputs, 4 wide)
};

void advance_sequences(const GridSteps& s) {
    Memory memory;
    const GridWeights weights(s, memory);
    Threads::get().run(s.batch, s.threads, [&](int64_t row, int) {
        Memory own;
        GridSequence(s, weights, row, own).run();
    });
}

void retreat_sequences(const GridSteps& s, const GridGradients& d) {
    Memory memory;
    const GridWeights weights(s, memory);
    Threads::get().run(s.batch, s.threads, [&](int64_t row, int) {
        Memory own;
        GridBackward(s, weights, d, row, own).run();
    });
}

}  // namespace
