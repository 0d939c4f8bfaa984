// The algorithm of attend.hpp, for an instruction set `Isa`. Included by one file for each, in a namespace of its own:
// code compiled for one instruction set must not be merged with another's by the linker.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "lanes.hpp"
#include "memory.hpp"
#include "rotation.hpp"
#include "threads.hpp"

namespace {

using namespace tessera;

constexpr float NONE = -std::numeric_limits<float>::infinity();

inline float largest(const float* x, int count, float start) {
    Lanes most = Lanes{} + start;
    int i = 0;
    for (; i + LANES <= count; i += LANES) {
        const Lanes y = load(x + i);
        most = y > most ? y : most;
    }
    for (; i < count; ++i) start = x[i] > start ? x[i] : start;
    for (int j = 0; j < LANES; ++j) start = most[j] > start ? most[j] : start;
    return start;
}

inline float inner(const float* x, const float* y, int count) {
    Lanes part[4] = {};  // additions need not wait for each other
    int i = 0;
    for (; i + 4 * LANES <= count; i += 4 * LANES)
        for (int j = 0; j < 4; ++j) part[j] += load(x + i + j * LANES) * load(y + i + j * LANES);
    for (; i + LANES <= count; i += LANES) part[0] += load(x + i) * load(y + i);
    float sum = total((part[0] + part[1]) + (part[2] + part[3]));
    for (; i < count; ++i) sum += x[i] * y[i];
    return sum;
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

// x becomes x · length + shift, for a multiple of LANES.
inline void stretch(float* x, const float* length, float shift, int count) {
    for (int i = 0; i < count; i += LANES) store(x + i, load(x + i) * load(length + i) + shift);
}

// x becomes e^(x - most), for a multiple of LANES; returns the sum.
inline float exponentials(float* x, int count, float most) {
    Lanes lanes = {};
    for (int i = 0; i < count; i += LANES) {
        const Lanes y = exp_negative(load(x + i) - most);
        store(x + i, y);
        lanes += y;
    }
    return total(lanes);
}

// A finite half-precision number: its bits, moved to a float's place, are too small by a factor of 2^112.
inline float half_to_float(uint16_t h) {
    const uint32_t bits = uint32_t(h & 0x7fff) << 13;
    float value;
    std::memcpy(&value, &bits, 4);
    value *= 5.192296858534828e33f;
    return h & 0x8000 ? -value : value;
}

// Means and factors of a group's channels, see codecs/precondition.py. Returns whether any factor is not 1.
inline bool read_centre(const uint8_t* words, int dim, float* mean, float* factor) {
    uint16_t word[MAX_DIM];
    std::memcpy(word, words, 2 * size_t(dim));
    uint16_t exponents = 0;
    for (int c = 0; c < dim; ++c) {
        mean[c] = half_to_float(word[c] & 0xfff0);
        factor[c] = float(1 << (word[c] & 15));
        exponents |= word[c] & 15;
    }
    return exponents != 0;
}

// Up to GROUP tokens of one page that share their centre.
struct Segment {
    const Page* page;
    int64_t token;  // within the page
    int64_t place;  // within the tier
    int count;
};

// Coded vectors of up to UNIT tokens, one after the other.
struct Unit {
    const uint8_t* codes;
    int count;
};

// Whether none of the rows sees any of the places, from positions alone.
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

// Scores of n tokens from `place` on that the rows do not see become NONE.
inline void hide(const Problem& p, int b, int head, int row, int rows, int64_t place, int n, float* scores) {
    if (!p.mask && !p.placed) return;
    const int group = p.q_heads / p.kv_heads;
    for (int r = 0; r < rows; ++r) {
        const int g = (row + r) / p.q_tokens, i = (row + r) % p.q_tokens;
        float* to = scores + r * BLOCK;
        if (p.placed) {
            const int64_t last = p.start + i, oldest = p.window > 0 ? last - p.window + 1 : 0;
            if (place + n - 1 > last || place < oldest)
                for (int j = 0; j < n; ++j)
                    if (place + j > last || place + j < oldest) to[j] = NONE;
        }
        if (p.mask) {
            const uint8_t* seen = p.mask + b * p.mask_batch + (head * group + g) * p.mask_head + i * p.mask_query + place;
            for (int j = 0; j < n; ++j)
                if (!seen[j]) to[j] = NONE;
        }
    }
}

template <class Isa>
struct Worker {
    const Problem& p;
    const Book& book;
    const int chunks, dim;
    Memory memory;
    typename Isa::Scratch isa;
    float* const query = memory.take<float>(size_t(TILE) * dim);
    float* const scores = memory.take<float>(size_t(TILE) * BLOCK);
    float* const turned = memory.take<float>(size_t(TILE) * dim);
    float* const mean = memory.take<float>(dim);
    float* const factor = memory.take<float>(dim);

    explicit Worker(const Problem& p) : p(p), book(*p.book), chunks(p.dim / 4), dim(p.dim), isa(book, p.dim / 4, p.limbs, memory) {}

    // Tokens [begin, end) of the tier for rows [row, row + rows) of key head `head` of batch row `b`. The result is not
    // normalised: sum (rows, dim), with `top` and `total` (rows,) the largest score and the sum of exponentials.
    void part(int b, int head, int row, int rows, int64_t begin, int64_t end, float* sum, float* top, float* total) {
        const int group = p.q_heads / p.kv_heads;
        for (int r = 0; r < rows; ++r) {
            const int g = (row + r) / p.q_tokens, i = (row + r) % p.q_tokens;
            const float* from = p.q + ((int64_t(b) * p.q_heads + head * group + g) * p.q_tokens + i) * dim;
            for (int c = 0; c < dim; ++c) query[r * dim + c] = from[c] * p.scale;
            top[r] = NONE;
            total[r] = 0;
        }
        std::fill(sum, sum + size_t(rows) * dim, 0.0f);
        std::memcpy(turned, query, sizeof(float) * rows * dim);
        for (int r = 0; r < rows; ++r) rotate(p.rotation, turned + size_t(r) * dim);
        isa.set_queries(turned, rows);
        bool plain = true;  // whether `isa` holds the queries without any channel's factor
        const int64_t line = int64_t(b) * p.kv_heads + head;
        float shift[TILE];
        Segment segments[BLOCK / UNIT];
        Unit units[BLOCK / UNIT];
        alignas(64) float k_length[BLOCK], v_length[BLOCK];
        const int64_t bytes = book.row_bytes(chunks);

        int64_t at = 0, page = 0;  // `at`: place of the page's first token
        while (page < p.page_count && at + p.pages[page].tokens <= begin) at += p.pages[page++].tokens;
        for (int64_t place = begin; place < end;) {
            // A block: segments until it is full.
            const int64_t first = place;
            int count = 0, width = 0;
            while (place < end && count < BLOCK / UNIT && width + UNIT <= BLOCK) {
                const Page& here = p.pages[page];
                const int64_t token = place - at;
                int64_t n = GROUP - (here.offset + token) % GROUP;
                n = std::min({n, here.tokens - token, end - place, int64_t(BLOCK - width)});
                segments[count++] = {&here, token, place, int(n)};
                width += int(n + UNIT - 1) / UNIT * UNIT;
                place += n;
                if (token + n == here.tokens) at += p.pages[page++].tokens;
            }
            if (hidden(p, row, rows, first, place)) continue;

            // Lengths of all vectors first: numbers written one by one and read back at once as a register would be waited for.
            for (int s = 0, column = 0; s < count; ++s) {
                const Segment& seg = segments[s];
                const Page& here = *seg.page;
                const uint8_t* k_scale = here.k_scale + line * here.k_scale_stride + seg.token;
                const uint8_t* v_scale = here.v_scale + line * here.v_scale_stride + seg.token;
                const uint8_t* v_codes = here.v_codes + line * here.v_codes_stride + seg.token * bytes;
                for (int t = 0; t < seg.count; t += UNIT, column += UNIT) {
                    const int n = std::min(UNIT, seg.count - t);
                    units[column / UNIT] = {v_codes + t * bytes, n};
                    isa.lengths(k_scale + t, n, k_length + column);
                    isa.lengths(v_scale + t, n, v_length + column);
                }
            }

            for (int s = 0, column = 0; s < count; ++s) {
                const Segment& seg = segments[s];
                std::fill(shift, shift + rows, 0.0f);
                bool wide = false;
                if (seg.page->k_centre) {
                    const uint8_t* words = seg.page->k_centre + line * seg.page->k_centre_stride +
                                           (seg.page->offset + seg.token) / GROUP * dim * 2;
                    wide = read_centre(words, dim, mean, factor);
                    for (int r = 0; r < rows; ++r) shift[r] = inner(query + size_t(r) * dim, mean, dim);
                }
                if (wide || !plain) {
                    for (int r = 0; r < rows; ++r) {
                        float* to = turned + size_t(r) * dim;
                        for (int c = 0; c < dim; ++c) to[c] = query[r * dim + c] * (wide ? factor[c] : 1.0f);
                        rotate(p.rotation, to);
                    }
                    isa.set_queries(turned, rows);
                    plain = !wide;
                }
                isa.dot(seg.page->k_codes + line * seg.page->k_codes_stride + seg.token * bytes, seg.count, rows, scores + column, BLOCK);
                const int whole = (seg.count + UNIT - 1) / UNIT * UNIT;
                for (int r = 0; r < rows; ++r) {
                    float* to = scores + r * BLOCK + column;
                    stretch(to, k_length + column, shift[r], whole);
                    std::fill(to + seg.count, to + whole, NONE);
                    if (p.softcap > 0)
                        for (int j = 0; j < seg.count; ++j) to[j] = p.softcap * std::tanh(to[j] / p.softcap);
                }
                hide(p, b, head, row, rows, seg.place, seg.count, scores + column);
                column += whole;
            }

            for (int r = 0; r < rows; ++r) {
                float* line_scores = scores + r * BLOCK;
                const float most = largest(line_scores, width, top[r]);
                if (most == NONE) {  // this row has seen nothing yet
                    std::fill(line_scores, line_scores + width, 0.0f);
                    continue;
                }
                const float keep = top[r] == NONE ? 0.0f : exp_negative(top[r] - most);
                total[r] = total[r] * keep + exponentials(line_scores, width, most);
                top[r] = most;
                if (keep != 1.0f)
                    for (int c = 0; c < dim; ++c) sum[size_t(r) * dim + c] *= keep;
            }

            for (int r = 0; r < rows; ++r) stretch(scores + r * BLOCK, v_length, 0.0f, width);
            isa.add(units, width / UNIT, scores, BLOCK, rows, sum);
        }
    }
};

template <class Isa>
void attend_with(const Problem& p) {
    const int all_rows = p.q_heads / p.kv_heads * p.q_tokens, dim = p.dim;
    const int tiles = (all_rows + TILE - 1) / TILE;
    const int64_t lines = int64_t(p.batch) * p.kv_heads;
    // Cut long sequences until every thread has a few tasks, for heads are few and cores are disturbed.
    int64_t splits = 1;
    const int64_t least = 1024;
    if (p.threads > 1) splits = std::max<int64_t>(1, std::min((p.tokens + least - 1) / least, (8 * p.threads + lines * tiles - 1) / (lines * tiles)));
    int64_t span = (p.tokens + splits - 1) / splits;
    span = std::max<int64_t>(BLOCK, (span + BLOCK - 1) / BLOCK * BLOCK);
    splits = std::max<int64_t>(1, (p.tokens + span - 1) / span);
    const int tile_rows = (all_rows + tiles - 1) / tiles;

    std::vector<float> sums(size_t(lines) * splits * all_rows * dim), tops(size_t(lines) * splits * all_rows), totals(tops.size());
    std::vector<Worker<Isa>*> workers(std::max(1, p.threads), nullptr);
    Threads::get().run(lines * tiles * splits, std::max(1, p.threads), [&](int64_t task, int who) {
        if (!workers[who]) workers[who] = new Worker<Isa>(p);
        const int64_t split = task % splits, tile = task / splits % tiles, line = task / splits / tiles;
        const int row = int(tile) * tile_rows, rows = std::min(tile_rows, all_rows - row);
        if (rows <= 0) return;
        const size_t at = (size_t(line) * splits + split) * all_rows + row;
        workers[who]->part(int(line / p.kv_heads), int(line % p.kv_heads), row, rows, split * span,
                           std::min(p.tokens, (split + 1) * span), &sums[at * dim], &tops[at], &totals[at]);
    });
    for (auto* worker : workers) delete worker;

    const int group = p.q_heads / p.kv_heads;
    for (int64_t line = 0; line < lines; ++line)
        for (int row = 0; row < all_rows; ++row) {
            const int64_t head = line % p.kv_heads * group + row / p.q_tokens;
            const int64_t to = ((line / p.kv_heads) * p.q_heads + head) * p.q_tokens + row % p.q_tokens;
            float* out = p.out + to * dim;
            if (!finite(p.q + to * dim, dim)) {  // kernels need not know what to do with it
                std::fill(out, out + dim, std::numeric_limits<float>::quiet_NaN());
                p.lse[to] = std::numeric_limits<float>::quiet_NaN();
                continue;
            }
            float most = NONE, total = 0;
            for (int64_t s = 0; s < splits; ++s) most = std::max(most, tops[(line * splits + s) * all_rows + row]);
            std::fill(out, out + dim, 0.0f);
            if (most == NONE) {
                p.lse[to] = NONE;
                continue;
            }
            for (int64_t s = 0; s < splits; ++s) {
                const size_t at = (line * splits + s) * all_rows + row;
                if (tops[at] == NONE) continue;
                const float weight = exp_negative(tops[at] - most);
                total += weight * totals[at];
                for (int c = 0; c < dim; ++c) out[c] += weight * sums[at * dim + c];
            }
            for (int c = 0; c < dim; ++c) out[c] *= p.value_gain / total;
            rotate_back(p.rotation, out);
            p.lse[to] = most + std::log(total);
        }
}

}  // namespace
