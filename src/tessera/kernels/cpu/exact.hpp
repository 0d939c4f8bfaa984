// Attention over unquantised keys and values, for the few rows of a decoding step. See attend_impl.hpp.

namespace {

// Returns `dim` numbers as floats: in place, or converted into `buffer`.
inline const float* floats(const uint8_t* from, bool bfloat, int dim, float* buffer) {
    if (!bfloat) return reinterpret_cast<const float*>(from);
    uint32_t* bits = reinterpret_cast<uint32_t*>(buffer);
    const uint16_t* halves = reinterpret_cast<const uint16_t*>(from);
    for (int c = 0; c < dim; ++c) bits[c] = uint32_t(halves[c]) << 16;
    return buffer;
}

inline void attend_exact(const Problem& p, const Exact& x) {
    const int rows = p.q_heads / p.kv_heads * p.q_tokens, dim = p.dim;
    Threads::get().run(int64_t(p.batch) * p.kv_heads, p.threads, [&](int64_t line, int) {
        const int b = int(line / p.kv_heads), head = int(line % p.kv_heads);
        Memory memory;
        float* scores = memory.take<float>(size_t(rows) * BLOCK);
        float* query = memory.take<float>(size_t(rows) * dim);
        float* sum = memory.take<float>(size_t(rows) * dim);
        float* top = memory.take<float>(rows);
        float* weight = memory.take<float>(rows);
        alignas(64) float buffer[MAX_DIM];
        const int64_t place = ((int64_t(b) * p.q_heads) + int64_t(head) * (p.q_heads / p.kv_heads)) * p.q_tokens;
        for (int c = 0; c < rows * dim; ++c) query[c] = p.q[place * dim + c] * p.scale;
        std::fill(sum, sum + size_t(rows) * dim, 0.0f);
        std::fill(top, top + rows, NONE);
        std::fill(weight, weight + rows, 0.0f);
        const uint8_t *k = x.k + b * x.k_batch + head * x.k_head, *v = x.v + b * x.v_batch + head * x.v_head;
        for (int64_t first = 0; first < p.tokens; first += BLOCK) {
            const int n = int(std::min<int64_t>(BLOCK, p.tokens - first)), width = (n + LANES - 1) / LANES * LANES;
            if (hidden(p, 0, rows, first, first + n)) continue;
            for (int j = 0; j < n; ++j) {
                const float* key = floats(k + (first + j) * x.k_token, x.bfloat, dim, buffer);
                for (int r = 0; r < rows; ++r) scores[r * BLOCK + j] = inner(query + size_t(r) * dim, key, dim);
            }
            if (p.softcap > 0)
                for (int r = 0; r < rows; ++r)
                    for (int j = 0; j < n; ++j) scores[r * BLOCK + j] = p.softcap * std::tanh(scores[r * BLOCK + j] / p.softcap);
            hide(p, b, head, 0, rows, first, n, scores);
            for (int r = 0; r < rows; ++r) {
                float* row = scores + r * BLOCK;
                std::fill(row + n, row + width, NONE);
                const float most = largest(row, width, top[r]);
                if (most == NONE) {
                    std::fill(row, row + width, 0.0f);
                    continue;
                }
                const float keep = top[r] == NONE ? 0.0f : exp_negative(top[r] - most);
                weight[r] = weight[r] * keep + exponentials(row, width, most);
                top[r] = most;
                for (int c = 0; c < dim; ++c) sum[size_t(r) * dim + c] *= keep;
            }
            for (int j = 0; j < n; ++j) {
                const float* value = floats(v + (first + j) * x.v_token, x.bfloat, dim, buffer);
                for (int r = 0; r < rows; ++r) {
                    const float w = scores[r * BLOCK + j];
                    float* to = sum + size_t(r) * dim;
                    int c = 0;
                    for (; c + LANES <= dim; c += LANES) store(to + c, load(to + c) + load(value + c) * w);
                    for (; c < dim; ++c) to[c] += value[c] * w;
                }
            }
        }
        for (int r = 0; r < rows; ++r) {
            const bool broken = !finite(p.q + (place + r) * dim, dim);
            const float share = broken ? std::numeric_limits<float>::quiet_NaN() : weight[r] > 0 ? 1.0f / weight[r] : 0.0f;
            for (int c = 0; c < dim; ++c) p.out[(place + r) * dim + c] = sum[size_t(r) * dim + c] * share;
            p.lse[place + r] = broken ? share : top[r] == NONE ? NONE : top[r] + std::log(weight[r]);
        }
    });
}

}  // namespace
