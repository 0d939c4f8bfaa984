// absorb.hpp for the instruction set of lanes.hpp. Forward, the columns of the matrix are independent: a few registers of
// columns process all tokens, with one pass over the rows per token, which decays, writes, reads, and computes what the delta
// rule subtracts from the next token's value. Backward, each head is processed by one thread. For each segment, from the last,
// the matrix is recomputed for every token from what forward kept; then gradients are computed from the last token to the
// first. The matrix is transposed here, (d_v, d_k), so that sums over values, of which there are most, are sums of registers.

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <utility>

#include "absorb.hpp"
#include "lanes.hpp"
#include "memory.hpp"
#include "threads.hpp"

namespace {

using namespace tessera;

// Registers of columns that are processed together.
constexpr int BLOCK = 4;

inline int registers(int count) { return (count + LANES - 1) / LANES; }

// Loads the first `count` numbers, followed by zeros.
inline Lanes load_some(const float* x, int count) {
    if (count >= LANES) return load(x);
    Lanes lanes{};
    if (count > 0) std::memcpy(&lanes, x, sizeof(float) * count);
    return lanes;
}

inline void store_some(float* x, Lanes lanes, int count) {
    if (count > 0) std::memcpy(x, &lanes, sizeof(float) * std::min(count, LANES));
}

// Calls work with an integral constant: BLOCK while so many registers remain, then the remaining number.
template <class Work>
inline void in_blocks(int count, const Work& work) {
    int first = 0;
    for (; first + BLOCK <= count; first += BLOCK) work(std::integral_constant<int, BLOCK>{}, first);
    switch (count - first) {
        case 3: return work(std::integral_constant<int, 3>{}, first);
        case 2: return work(std::integral_constant<int, 2>{}, first);
        case 1: return work(std::integral_constant<int, 1>{}, first);
    }
}

// Returns a register whose lane j is lane j ^ FLIP of b where j & WIDTH, else of a.
template <int WIDTH, int FLIP, int... J>
inline Lanes mix(Lanes a, Lanes b, std::integer_sequence<int, J...>) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, ((J ^ FLIP) + (J & WIDTH ? LANES : 0))...);
#else
    return __builtin_shuffle(a, b, IntLanes{((J ^ FLIP) + (J & WIDTH ? LANES : 0))...});
#endif
}

// Sums LANES registers, halving their number at each step: lane j of the result is the total of x[j]. Overwrites x.
template <int WIDTH = 1>
inline Lanes totals(Lanes (&x)[LANES]) {
    if constexpr (WIDTH == LANES) return x[0];
    else {
        const std::make_integer_sequence<int, LANES> lanes;
#pragma GCC unroll 16
        for (int r = 0; r < LANES; r += 2 * WIDTH) {
            const Lanes a = x[r], b = x[r + WIDTH];
            x[r] = mix<WIDTH, 0>(a, b, lanes) + mix<WIDTH, WIDTH>(a, b, lanes);
        }
        return totals<2 * WIDTH>(x);
    }
}

// Processes all tokens for V registers of columns of a head, beginning at `first`.
template <int V, bool DELTA, bool READ_FIRST>
void absorb_columns(const Absorb& s, int64_t head, int first, Memory& memory) {
    const int rows = s.d_k, width = V * LANES, padded = (s.d_v + 15) / 16 * 16;
    const int64_t segments = (s.tokens + s.every - 1) / s.every;
    float* a = memory.take<float>(size_t(rows) * width);
    const auto left = [&](int v) { return s.d_v - first - v * LANES; };
    const float* begin = s.state + head * rows * s.d_v + first;
    for (int i = 0; i < rows; ++i)
        for (int v = 0; v < V; ++v) store(a + i * width + v * LANES, load_some(begin + int64_t(i) * s.d_v + v * LANES, left(v)));

    const auto look_up = [&](const float* x, Lanes (&found)[V]) {
        for (int v = 0; v < V; ++v) found[v] = Lanes{};
        for (int i = 0; i < rows; ++i)
            for (int v = 0; v < V; ++v) found[v] += x[i] * load(a + i * width + v * LANES);
    };
    const auto put = [&](int member, int64_t t, const Lanes (&x)[V]) {
        float* to = s.read + ((head * s.group + member) * s.tokens + t) * s.d_v + first;
        for (int v = 0; v < V; ++v) store_some(to + v * LANES, x[v], left(v));
    };
    const auto others = [&](int64_t t) {
        for (int member = 1; member < s.group; ++member) {
            Lanes out[V];
            look_up(s.q + ((head * s.group + member) * s.tokens + t) * rows, out);
            put(member, t, out);
        }
    };

    const float* k = s.k + head * s.tokens * rows;
    Lanes expected[V];
    if (DELTA) look_up(k, expected);
    for (int64_t t = 0; t < s.tokens; ++t, k += rows) {
        const int64_t at = head * s.tokens + t;
        if (s.kept && t % s.every == 0) {
            float* to = s.kept + (head * segments + t / s.every) * rows * padded + first;
            for (int i = 0; i < rows; ++i) std::memcpy(to + int64_t(i) * padded, a + i * width, sizeof(float) * width);
        }
        if (READ_FIRST) others(t);
        const float* q = s.q + (head * s.group * s.tokens + t) * rows;
        const float* next = t + 1 < s.tokens ? k + rows : k;
        const float decay = s.decay[at], rate = s.rate[at];
        Lanes u[V], out[V];
        for (int v = 0; v < V; ++v) {
            u[v] = load_some(s.v + at * s.d_v + first + v * LANES, left(v));
            if (DELTA) u[v] -= expected[v];
            if (s.fresh) store_some(s.fresh + at * s.d_v + first + v * LANES, u[v], left(v));
            u[v] *= rate, out[v] = Lanes{}, expected[v] = Lanes{};
        }
        for (int i = 0; i < rows; ++i)
            for (int v = 0; v < V; ++v) {
                Lanes x = load(a + i * width + v * LANES);
                if (READ_FIRST) out[v] += q[i] * x;
                x = decay * x + k[i] * u[v];
                store(a + i * width + v * LANES, x);
                if (!READ_FIRST) out[v] += q[i] * x;
                if (DELTA) expected[v] += next[i] * x;
            }
        put(0, t, out);
        if (!READ_FIRST) others(t);
    }
    float* end = s.end + head * rows * s.d_v + first;
    for (int i = 0; i < rows; ++i)
        for (int v = 0; v < V; ++v) store_some(end + int64_t(i) * s.d_v + v * LANES, load(a + i * width + v * LANES), left(v));
}

void absorb_heads(const Absorb& s) {
    const int all = registers(s.d_v), blocks = (all + BLOCK - 1) / BLOCK;
    Threads::get().run(s.heads * blocks, s.threads, [&](int64_t task, int) {
        Memory memory;
        const int64_t head = task / blocks;
        const int begin = int(task % blocks) * BLOCK;
        in_blocks(std::min(BLOCK, all - begin), [&](auto count, int) {
            constexpr int V = decltype(count)::value;
            const int first = begin * LANES;
            if (s.delta) s.read_first ? absorb_columns<V, true, true>(s, head, first, memory) : absorb_columns<V, true, false>(s, head, first, memory);
            else s.read_first ? absorb_columns<V, false, true>(s, head, first, memory) : absorb_columns<V, false, false>(s, head, first, memory);
        });
    });
}

class AbsorbedHead {
  public:
    AbsorbedHead(const Absorb& s, const AbsorbGradients& d, int64_t head, Memory& memory) : s(s), d(d), head(head) {
        wide = registers(s.d_k), width = wide * LANES, rows = registers(s.d_v) * LANES, size = int64_t(rows) * width;
        log = memory.take<float>((s.every + 1) * size), grad = memory.take<float>(size);
        q = memory.take<float>(width), k = memory.take<float>(width), d_k = memory.take<float>(width), fresh = memory.take<float>(rows);
    }

    void run() {
        const float* end = d.end + head * s.d_k * s.d_v;
        transpose(end, s.d_v, grad);
        const int64_t segments = (s.tokens + s.every - 1) / s.every;
        for (int64_t segment = segments - 1; segment >= 0; --segment) {
            const int64_t begin = segment * s.every, count = std::min(s.every, s.tokens - begin);
            const int padded = (s.d_v + 15) / 16 * 16;
            transpose(s.kept + (head * segments + segment) * s.d_k * padded, padded, log);
            for (int64_t t = 0; t < count; ++t) redo(begin + t, log + t * size);
            for (int64_t t = count - 1; t >= 0; --t) undo(begin + t, log + t * size);
        }
        float* out = d.state + head * s.d_k * s.d_v;
        for (int i = 0; i < s.d_k; ++i)
            for (int j = 0; j < s.d_v; ++j) out[int64_t(i) * s.d_v + j] = grad[int64_t(j) * width + i];
    }

  private:
    // Transposes (d_k, columns) to (rows, width), padded with zeros.
    void transpose(const float* from, int columns, float* to) const {
        std::fill(to, to + size, 0.0f);
        for (int i = 0; i < s.d_k; ++i)
            for (int j = 0; j < s.d_v; ++j) to[int64_t(j) * width + i] = from[int64_t(i) * columns + j];
    }

    static void widen(const float* from, int count, float* to, int room) {
        std::memcpy(to, from, sizeof(float) * count);
        std::fill(to + count, to + room, 0.0f);
    }

    // Computes the matrix after token t, which is stored after the one before it.
    void redo(int64_t t, float* a) {
        const int64_t at = head * s.tokens + t;
        widen(s.k + at * s.d_k, s.d_k, k, width), widen(s.fresh + at * s.d_v, s.d_v, fresh, rows);
        in_blocks(wide, [&](auto count, int first) {
            write<decltype(count)::value>(a + first * LANES, a + size + first * LANES, k + first * LANES, fresh, s.decay[at], s.rate[at]);
        });
    }

    // Works on V registers of each row, as the functions below. Pointers are arguments, because compilers assume that stores
    // may change members.
    template <int V>
    void write(const float* from, float* to, const float* k, const float* fresh, float decay, float rate) const {
        Lanes key[V];
        for (int v = 0; v < V; ++v) key[v] = rate * load(k + v * LANES);
        for (int j = 0, n = rows, step = width; j < n; ++j, from += step, to += step)
            for (int v = 0; v < V; ++v) store(to + v * LANES, decay * load(from + v * LANES) + fresh[j] * key[v]);
    }

    // Adds the gradients of a token's reads from matrix a.
    void undo_reads(int64_t t, const float* a) {
        for (int member = 0; member < s.group; ++member) {
            const int64_t at = (head * s.group + member) * s.tokens + t;
            widen(s.q + at * s.d_k, s.d_k, q, width);
            in_blocks(wide, [&](auto count, int first) {
                const int place = first * LANES;
                undo_read<decltype(count)::value>(a + place, grad + place, q + place, d.read + at * s.d_v, d_k + place);
            });
            std::memcpy(d.q + at * s.d_k, d_k, sizeof(float) * s.d_k);
        }
    }

    template <int V>
    void undo_read(const float* a, float* grad, const float* q, const float* out, float* d_q) const {
        Lanes query[V], sum[V];
        for (int v = 0; v < V; ++v) query[v] = load(q + v * LANES), sum[v] = Lanes{};
        for (int j = 0, n = s.d_v, step = width; j < n; ++j, a += step, grad += step)
            for (int v = 0; v < V; ++v) {
                sum[v] += out[j] * load(a + v * LANES);
                store(grad + v * LANES, load(grad + v * LANES) + out[j] * query[v]);
            }
        for (int v = 0; v < V; ++v) store(d_q + v * LANES, sum[v]);
    }

    // a: the matrix before token t, followed in memory by the matrix after it.
    void undo(int64_t t, const float* a) {
        const int64_t at = head * s.tokens + t;
        const float decay = s.decay[at], rate = s.rate[at];
        if (!s.read_first) undo_reads(t, a + size);
        widen(s.k + at * s.d_k, s.d_k, k, width), widen(s.fresh + at * s.d_v, s.d_v, fresh, rows);
        std::fill(d_k, d_k + width, 0.0f);
        Lanes of_decay{}, of_rate{};
        for (int j = 0; j < rows; j += LANES) {
            const int64_t row = int64_t(j) * width;
            Lanes sums[LANES]{};
            in_blocks(wide, [&](auto count, int first) {
                along<decltype(count)::value>(grad + row + first * LANES, k + first * LANES, width, sums);
            });
            const Lanes d_u = totals(sums), w = load(fresh + j), d_w = rate * d_u;
            float written[LANES], expected[LANES];
            store(written, rate * w), store(expected, -d_w);
            of_rate += d_u * w;
            store_some(d.v + at * s.d_v + j, d_w, s.d_v - j);
            in_blocks(wide, [&](auto count, int first) {
                constexpr int V = decltype(count)::value;
                const int64_t place = row + first * LANES;
                const float *before = a + place, *key = k + first * LANES;
                float *own = grad + place, *sum = d_k + first * LANES;
                if (s.delta) undo_write<V, true>(before, own, key, written, expected, decay, width, sum, of_decay);
                else undo_write<V, false>(before, own, key, written, expected, decay, width, sum, of_decay);
            });
        }
        std::memcpy(d.k + at * s.d_k, d_k, sizeof(float) * s.d_k);
        d.decay[at] = total(of_decay), d.rate[at] = total(of_rate);
        if (s.read_first) undo_reads(t, a);
    }

    // Adds rows · k to sums, for LANES rows.
    template <int V>
    static void along(const float* grad, const float* k, int width, Lanes* sums) {
        Lanes key[V], found[LANES];
        for (int v = 0; v < V; ++v) key[v] = load(k + v * LANES);
#pragma GCC unroll 16
        for (int r = 0; r < LANES; ++r) {
            found[r] = sums[r];
            for (int v = 0; v < V; ++v) found[r] += key[v] * load(grad + r * width + v * LANES);
        }
        for (int r = 0; r < LANES; ++r) sums[r] = found[r];
    }

    template <int V, bool DELTA>
    static void undo_write(const float* a, float* grad, const float* k, const float* written, const float* expected, float decay,
                           int width, float* d_k, Lanes& of_decay) {
        Lanes key[V], sum[V], inner[V];
        for (int v = 0; v < V; ++v) key[v] = load(k + v * LANES), sum[v] = load(d_k + v * LANES), inner[v] = Lanes{};
        for (int r = 0; r < LANES; ++r, a += width, grad += width)
            for (int v = 0; v < V; ++v) {
                const Lanes g = load(grad + v * LANES), before = load(a + v * LANES);
                inner[v] += g * before;
                sum[v] += written[r] * g;
                if (DELTA) sum[v] += expected[r] * before;
                store(grad + v * LANES, DELTA ? decay * g + expected[r] * key[v] : decay * g);
            }
        for (int v = 0; v < V; ++v) store(d_k + v * LANES, sum[v]), of_decay += inner[v];
    }

    const Absorb& s;
    const AbsorbGradients& d;
    const int64_t head;
    int wide, width, rows;  // registers and numbers of a row; rows, whole registers too
    int64_t size;           // of a matrix
    float *log, *grad;      // the matrix before each token of a segment and after the last; the gradient of the matrix
    float *q, *k, *d_k, *fresh;  // of a token, filled up with zeros
};

void absorb_heads_backward(const Absorb& s, const AbsorbGradients& d) {
    Threads::get().run(s.heads, s.threads, [&](int64_t head, int) {
        Memory memory;
        AbsorbedHead(s, d, head, memory).run();
    });
}

}  // namespace
