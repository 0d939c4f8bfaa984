// The algorithm of attend.hpp, for `Keys` and `Values` of an instruction set. Included once per instruction set, in a separate
// namespace: the linker must not merge code compiled for different instruction sets.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "centre.hpp"
#include "half.hpp"
#include "lanes.hpp"
#include "memory.hpp"
#include "rotation.hpp"
#include "threads.hpp"

namespace {

using namespace tessera;

constexpr float NONE = -std::numeric_limits<float>::infinity();

// Returns the largest of n numbers and `least`; n is a multiple of LANES.
inline float largest(const float* x, int count, float least) {
    Lanes most = Lanes{} + least;
    for (int i = 0; i < count; i += LANES) {
        const Lanes y = load(x + i);
        most = y > most ? y : most;
    }
    return largest(most);
}

inline float inner(const float* x, const float* y, int count) {
    Lanes part[4] = {};  // independent sums, so that additions overlap
    int i = 0;
    for (; i + 4 * LANES <= count; i += 4 * LANES)
        for (int j = 0; j < 4; ++j) part[j] += load(x + i + j * LANES) * load(y + i + j * LANES);
    for (; i + LANES <= count; i += LANES) part[0] += load(x + i) * load(y + i);
    float sum = total((part[0] + part[1]) + (part[2] + part[3]));
    for (; i < count; ++i) sum += x[i] * y[i];
    return sum;
}

// Computes the inner products of x with four consecutive vectors.
inline void inner_of_four(const float* x, const float* y, int count, float* to) {
    Lanes part[4] = {};
    int i = 0;
    for (; i + LANES <= count; i += LANES) {
        const Lanes a = load(x + i);
        for (int j = 0; j < 4; ++j) part[j] += a * load(y + j * count + i);
    }
    for (int j = 0; j < 4; ++j) {
        float sum = total(part[j]);
        for (int k = i; k < count; ++k) sum += x[k] * y[j * count + k];
        to[j] = sum;
    }
}

inline bool finite(const float* x, int count) {
    int32_t broken = 0;
    for (int i = 0; i < count; ++i) {
        int32_t bits;
        std::memcpy(&bits, x + i, 4);
        broken |= (bits & 0x7f800000) == 0x7f800000;
    }
    return !broken;
}

inline float exp_negative(float x) { return exp_negative(Lanes{} + x)[0]; }

// Replaces x by x · length + shift, for a multiple of LANES numbers; `most` is the running maximum of each lane.
inline void stretch(float* x, const float* length, float shift, int count, Lanes& most) {
    for (int i = 0; i < count; i += LANES) {
        const Lanes y = load(x + i) * load(length + i) + shift;
        store(x + i, y);
        most = y > most ? y : most;
    }
}

// Replaces x by e^(x - most), for a multiple of LANES numbers, and returns the sum.
inline float exponentials(float* x, int count, float most) {
    Lanes lanes = {};
    for (int i = 0; i < count; i += LANES) {
        const Lanes y = exp_negative(load(x + i) - most);
        store(x + i, y);
        lanes += y;
    }
    return total(lanes);
}

// Does the same, then multiplies each by a non-negative length; `high` becomes the largest result.
inline float exponentials(float* x, const float* length, int count, float most, float& high) {
    Lanes lanes = {}, highest = {};
    for (int i = 0; i < count; i += LANES) {
        const Lanes y = exp_negative(load(x + i) - most), z = y * load(length + i);
        store(x + i, z);
        lanes += y;
        highest = z > highest ? z : highest;
    }
    high = largest(highest);
    return total(lanes);
}

// A segment: up to GROUP tokens of one page that share a centre.
struct Segment {
    const Page* page;
    int64_t token;  // within the page
    int64_t place;  // within the tier
    int count;
};

// Whether none of the rows sees any of the positions, by causality and window alone.
inline bool hidden(const Problem& p, int row, int rows, int64_t first, int64_t end) {
    if (!p.placed) return false;
    int64_t low = p.q_tokens, high = -1;
    for (int r = 0; r < rows; ++r) {
        const int64_t i = (row + r) % p.q_tokens;
        low = std::min(low, i);
        high = std::max(high, i);
    }
    return first > p.start + high || (p.window > 0 && end - 1 < p.start + low - p.window + 1);
}

// Sets the scores of hidden tokens among n from `place` on to NONE. Returns whether any may be hidden.
inline bool hide(const Problem& p, int b, int head, int row, int rows, int64_t place, int n, float* scores) {
    bool some = p.mask != nullptr;
    if (!some && !p.placed) return false;
    const int group = p.q_heads / p.kv_heads;
    for (int r = 0; r < rows; ++r) {
        const int g = (row + r) / p.q_tokens, i = (row + r) % p.q_tokens;
        float* to = scores + r * BLOCK;
        if (p.placed) {
            const int64_t last = p.start + i, oldest = p.window > 0 ? last - p.window + 1 : 0;
            if (place + n - 1 > last || place < oldest) {
                some = true;
                for (int j = 0; j < n; ++j)
                    if (place + j > last || place + j < oldest) to[j] = NONE;
            }
        }
        if (p.mask) {
            const uint8_t* seen = p.mask + b * p.mask_batch + (head * group + g) * p.mask_head + i * p.mask_query + place;
            for (int j = 0; j < n; ++j)
                if (!seen[j]) to[j] = NONE;
        }
    }
    return some;
}

// Whether the mask hides tokens [place, place + n) from all rows.
inline bool masked_out(const Problem& p, int b, int head, int row, int rows, int64_t place, int64_t n) {
    if (!p.mask) return false;
    const int group = p.q_heads / p.kv_heads;
    for (int r = row; r < row + rows; ++r) {
        const uint8_t* seen = p.mask + b * p.mask_batch + (head * group + r / p.q_tokens) * p.mask_head + r % p.q_tokens * p.mask_query + place;
        if (std::memchr(seen, 1, size_t(n))) return false;
    }
    return true;
}

template <class Keys, class Values>
struct Worker {
    const Problem& p;
    const Rotation& rotation;  // of keys
    const int dim;
    const int64_t key_bytes, value_bytes;  // of a vector's codes
    Memory memory;
    Keys keys;
    Values values;
    float* const query = memory.take<float>(size_t(TILE) * dim);
    float* const scores = memory.take<float>(size_t(TILE) * BLOCK);
    float* const shifted = memory.take<float>(size_t(TILE) * dim);
    float* const mean = memory.take<float>(dim);
    float* const factor = memory.take<float>(dim);

    int64_t set = -1;  // line and first row of the queries that `keys` holds without channel factors; -1 if none

    explicit Worker(const Problem& p)
        : p(p),
          rotation(p.key->rotation),
          dim(p.dim),
          key_bytes(p.key->row_bytes(p.dim / 4)),
          value_bytes(p.value->row_bytes(p.dim / 4)),
          keys(static_cast<const typename Keys::Book&>(*p.key), p.dim / 4, p.limbs, p.kv_heads, memory),
          values(static_cast<const typename Values::Book&>(*p.value), p.dim / 4, p.limbs, p.kv_heads, memory) {}

    // Computes attention of rows [row, row + rows) of key head `head` of batch row `b` to tokens [begin, end). The result is
    // not normalised: sum (rows, dim), with `top` and `total` (rows,) the largest score and the sum of exponentials.
    void part(int b, int head, int row, int rows, int64_t begin, int64_t end, float* sum, float* top, float* total) {
        const int group = p.q_heads / p.kv_heads;
        // Rows of a key head are contiguous: its query heads, each with its tokens.
        const float* from = p.q + (int64_t(b) * p.q_heads + head * group) * p.q_tokens * dim + int64_t(row) * dim;
        for (int i = 0; i < rows * dim; ++i) query[i] = from[i] * p.scale;
        std::fill(top, top + rows, NONE);
        std::fill(total, total + rows, 0.0f);
        std::fill(sum, sum + size_t(rows) * dim, 0.0f);
        const int64_t line = int64_t(b) * p.kv_heads + head, wanted = line * group * p.q_tokens + row;
        if (set != wanted) set_queries(rows, nullptr);
        set = wanted;
        float shift[TILE], high[TILE];  // high: largest weight of each row
        Segment segments[BLOCK / UNIT];
        Unit units[BLOCK / UNIT];
        alignas(64) float k_length[BLOCK], v_length[BLOCK];

        int64_t at = 0, page = 0;  // `at`: position of the page's first token
        while (page < p.page_count && at + p.pages[page].tokens <= begin) at += p.pages[page++].tokens;
        for (int64_t place = begin; place < end;) {
            // Collects segments until the block is full.
            const int64_t first = place;
            int count = 0, width = 0;
            while (place < end && count < BLOCK / UNIT && width + UNIT <= BLOCK) {
                const Page& here = p.pages[page];
                const int64_t token = place - at;
                int64_t n = GROUP - (here.offset + token) % GROUP;
                n = std::min({n, here.tokens - token, end - place, int64_t(BLOCK - width)});
                if (masked_out(p, b, head, row, rows, place, n)) {  // masks of sparse reading hide most segments
                    place += n;
                    if (token + n == here.tokens) at += p.pages[page++].tokens;
                    continue;
                }
                segments[count++] = {&here, token, place, int(n)};
                width += int(n + UNIT - 1) / UNIT * UNIT;
                place += n;
                if (token + n == here.tokens) at += p.pages[page++].tokens;
            }
            if (!count || hidden(p, row, rows, first, place)) continue;

            // Compute the lengths of all vectors first: reading single stores back immediately as a register would stall.
            for (int s = 0, column = 0; s < count; ++s) {
                const Segment& seg = segments[s];
                const Side *coded_keys = &seg.page->side[KEY], *coded_values = &seg.page->side[VALUE];
                for (int t = 0; t < seg.count; t += UNIT, column += UNIT) {
                    const int n = std::min(UNIT, seg.count - t);
                    const int64_t token = seg.token + t;
                    units[column / UNIT] = {coded_values, line, token, coded_values->codes.row(line, token, value_bytes), n};
                    keys.lengths(*coded_keys, line, token, n, k_length + column);
                    values.lengths(*coded_values, line, token, n, v_length + column);
                }
            }

            Lanes highest[TILE];
            for (int r = 0; r < rows; ++r) highest[r] = Lanes{} + top[r];
            bool sure = true;  // whether these are exact maxima, not only upper bounds
            for (int s = 0, column = 0; s < count; ++s) {
                const Segment& seg = segments[s];
                std::fill(shift, shift + rows, 0.0f);
                bool wide = false;
                const Side* coded = &seg.page->side[KEY];
                if (coded->centre.data) {
                    wide = read_centre(coded->centre.row(line, (seg.page->offset + seg.token) / GROUP, dim * 2), dim, mean, factor);
                    for (int r = 0; r < rows; ++r) shift[r] = inner(query + size_t(r) * dim, mean, dim);
                }
                if (wide || set != wanted) {
                    set_queries(rows, wide ? factor : nullptr);
                    set = wide ? -1 : wanted;
                }
                keys.dot({coded, line, seg.token, coded->codes.row(line, seg.token, key_bytes), seg.count}, rows, scores + column, BLOCK);
                const int whole = (seg.count + UNIT - 1) / UNIT * UNIT;
                for (int r = 0; r < rows; ++r) {
                    float* to = scores + r * BLOCK + column;
                    stretch(to, k_length + column, shift[r], whole, highest[r]);
                    std::fill(to + seg.count, to + whole, NONE);
                    if (p.softcap > 0)
                        for (int j = 0; j < seg.count; ++j) to[j] = p.softcap * std::tanh(to[j] / p.softcap);
                }
                const bool some = hide(p, b, head, row, rows, seg.place, seg.count, scores + column);
                sure = sure && !some && seg.count == whole && p.softcap <= 0;
                column += whole;
            }

            for (int r = 0; r < rows; ++r) {
                float* line_scores = scores + r * BLOCK;
                const float most = sure ? largest(highest[r]) : largest(line_scores, width, top[r]);
                if (most == NONE) {  // the row has seen no token yet
                    std::fill(line_scores, line_scores + width, 0.0f);
                    high[r] = 0;
                    continue;
                }
                const float keep = top[r] == NONE ? 0.0f : exp_negative(top[r] - most);
                total[r] = total[r] * keep + exponentials(line_scores, v_length, width, most, high[r]);
                top[r] = most;
                if (keep != 1.0f)
                    for (int c = 0; c < dim; ++c) sum[size_t(r) * dim + c] *= keep;
            }

            values.add(units, width / UNIT, scores, BLOCK, high, rows, sum);
        }
    }

    // Loads the queries into `keys`: each channel times its factor, rotated.
    void set_queries(int rows, const float* factors) {
        for (int r = 0; r < rows; ++r) {
            float* to = shifted + size_t(r) * dim;
            for (int c = 0; c < dim; ++c) to[c] = query[r * dim + c] * (factors ? factors[c] : 1.0f);
            rotate(rotation, to);
        }
        keys.set_queries(shifted, rows);
    }
};

// Merges the parts of one row into p.out at `at`, rotating values back. Parts of `sums` (dim), `tops` and `totals` are `stride`
// rows apart.
inline void finish(const Problem& p, const Rotation& rotation, int64_t at, const float* sums, const float* tops, const float* totals, int64_t parts, int64_t stride) {
    const int dim = p.dim;
    float* out = p.out + at * dim;
    if (!finite(p.q + at * dim, dim)) {  // kernels then need no special case for it
        std::fill(out, out + dim, std::numeric_limits<float>::quiet_NaN());
        p.lse[at] = std::numeric_limits<float>::quiet_NaN();
        return;
    }
    float most = NONE, total = 0;
    for (int64_t s = 0; s < parts; ++s) most = std::max(most, tops[s * stride]);
    std::fill(out, out + dim, 0.0f);
    if (most == NONE) {
        p.lse[at] = NONE;
        return;
    }
    for (int64_t s = 0; s < parts; ++s) {
        if (tops[s * stride] == NONE) continue;
        const float weight = exp_negative(tops[s * stride] - most);
        total += weight * totals[s * stride];
        for (int c = 0; c < dim; ++c) out[c] += weight * sums[s * stride * dim + c];
    }
    for (int c = 0; c < dim; ++c) out[c] *= p.value_gain / total;
    rotate_back(rotation, out);
    p.lse[at] = most + std::log(total);
}

template <class Keys, class Values>
void attend_with(const Problem& p) {
    const int all_rows = p.q_heads / p.kv_heads * p.q_tokens, dim = p.dim;
    const int tiles = (all_rows + TILE - 1) / TILE;
    const int64_t lines = int64_t(p.batch) * p.kv_heads;
    // Split long sequences until every thread has a few tasks: there are few heads, and other processes disturb cores.
    int64_t splits = 1;
    const int64_t least = 1024;
    if (p.threads > 1) splits = std::max<int64_t>(1, std::min((p.tokens + least - 1) / least, (8 * p.threads + lines * tiles - 1) / (lines * tiles)));
    int64_t span = (p.tokens + splits - 1) / splits;
    span = std::max<int64_t>(BLOCK, (span + BLOCK - 1) / BLOCK * BLOCK);
    splits = std::max<int64_t>(1, (p.tokens + span - 1) / span);
    const int tile_rows = (all_rows + tiles - 1) / tiles;

    const int64_t results = lines * splits * all_rows;
    Memory memory;
    float* const sums = memory.take<float>(size_t(results) * dim);
    float* const tops = memory.take<float>(size_t(results));
    float* const totals = memory.take<float>(size_t(results));
    std::vector<std::atomic<int64_t>> left(size_t(lines * tiles));  // unfinished splits of each tile
    for (auto& count : left) count.store(splits, std::memory_order_relaxed);
    std::vector<std::unique_ptr<Worker<Keys, Values>>> workers(size_t(std::max(1, p.threads)));
    Threads::get().run(lines * tiles * splits, std::max(1, p.threads), [&](int64_t task, int who) {
        if (!workers[who]) workers[who].reset(new Worker<Keys, Values>(p));
        const int64_t split = task % splits, tile = task / splits % tiles, line = task / splits / tiles;
        const int row = int(tile) * tile_rows, rows = std::min(tile_rows, all_rows - row);
        if (rows <= 0) return;
        const int64_t first = line * splits * all_rows + row, at = first + split * all_rows;
        workers[who]->part(int(line / p.kv_heads), int(line % p.kv_heads), row, rows, split * span,
                           std::min(p.tokens, (split + 1) * span), sums + at * dim, tops + at, totals + at);
        // The thread that finishes the last split of a tile merges its parts.
        if (left[line * tiles + tile].fetch_sub(1) > 1) return;
        for (int r = 0; r < rows; ++r)
            finish(p, p.value->rotation, line * all_rows + row + r, sums + (first + r) * dim, tops + first + r, totals + first + r, splits, all_rows);
    });
}

}  // namespace
