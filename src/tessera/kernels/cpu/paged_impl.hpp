// The algorithm of paged.hpp. Included once per instruction set, after attend_impl.hpp.
// Tokens of a step are processed by group of GROUP positions: all of a group see the same earlier groups in packed form,
// and their own group unquantised. So a token's result does not depend on the other tokens of the step.

#include "numbers.hpp"
#include "paged.hpp"

namespace {

// Tokens of one request and one group in this step.
struct Item {
    int request;
    int64_t group;   // number of the group
    int64_t begin;   // position of the first of the tokens; they are `count`
    int count;
    int64_t token;   // number of the first one in the step
    int64_t offset;  // of its queries among all: (q_heads, count, dim) for each item
    int64_t from;    // packed tokens [from, 64 · group) are read
    int tiles, tile_rows, splits;
    int64_t span;    // packed tokens of a split
    int64_t task;    // number of its first task
    int64_t results; // first row of its splits' results; -1 if it has one split, which needs none
};

inline std::vector<Item> items_of(const Paged& p) {
    std::vector<Item> items;
    int64_t offset = 0;
    for (int r = 0; r < p.requests; ++r) {
        const int64_t tokens = p.first[r + 1] - p.first[r], end = p.lengths[r], start = end - tokens;
        for (int64_t at = start; at < end;) {
            const int64_t group = at / GROUP, stop = std::min(end, (group + 1) * GROUP);
            Item item{};
            item.request = r, item.group = group, item.begin = at, item.count = int(stop - at);
            item.token = p.first[r] + (at - start), item.offset = offset;
            item.from = std::min<int64_t>(p.sinks, group * GROUP);
            if (p.window > 0) item.from = std::min(group * GROUP, std::max(item.from, at - p.window + 1));
            offset += int64_t(item.count) * p.q_heads * p.dim;
            items.push_back(item);
            at = stop;
        }
    }
    return items;
}

// The unquantised keys and values that a tile of rows sees: the sinks, and the rows' own group up to themselves.
inline void attend_own(const Paged& p, const Item& item, int head, int row, int rows, const float* query, float* scores, float* vector,
                       float* sum, float* top, float* total) {
    const int dim = p.dim;
    const int64_t begin = int64_t(p.lengths[item.request]) - (p.first[item.request + 1] - p.first[item.request]);
    const int64_t low = item.group * GROUP, high = item.begin + item.count;  // positions of the own group that exist
    const int32_t first_block = p.table[item.request * p.table_width];
    // Sinks are stored in the first block; in the first group they are among the group's own tokens.
    int64_t sinks = item.group > 0 ? p.sinks : 0;
    if (p.window > 0 && item.begin - p.window >= sinks - 1) sinks = 0;  // the block may have been reassigned
    const uint8_t* block = p.pool + int64_t(first_block) * p.block_bytes + head * p.head_bytes;
    const int64_t bytes = dim * bytes_of(p.type);
    const int count = int(sinks + high - low), width = (count + LANES - 1) / LANES * LANES;
    const auto position = [&](int j) { return j < sinks ? int64_t(j) : low + (j - sinks); };
    for (int j = 0; j < count; ++j) {
        const int64_t at = position(j);
        to_floats(j < sinks ? block + p.sink[KEY] + j * bytes : exact_key(p, item.request, head, at, begin), p.type, dim, vector);
        for (int r = 0; r < rows; ++r) {
            const int64_t self = item.begin + (row + r) % item.count;
            const bool seen = at <= self && (p.window <= 0 || at > self - p.window);
            float score = NONE;
            if (seen) {
                score = inner(query + size_t(r) * dim, vector, dim) * p.scale;
                if (p.softcap > 0) score = p.softcap * std::tanh(score / p.softcap);
            }
            scores[r * BLOCK + j] = score;
        }
    }
    for (int r = 0; r < rows; ++r) {
        float* line = scores + r * BLOCK;
        std::fill(line + count, line + width, NONE);
        top[r] = largest(line, width, NONE);  // a token sees at least itself
        total[r] = exponentials(line, width, top[r]);
    }
    std::fill(sum, sum + size_t(rows) * dim, 0.0f);
    for (int j = 0; j < count; ++j) {
        to_floats(j < sinks ? block + p.sink[VALUE] + j * bytes : exact_value(p, item.request, head, position(j), begin), p.type, dim, vector);
        for (int r = 0; r < rows; ++r) {
            const float weight = scores[r * BLOCK + j];
            if (weight == 0) continue;
            float* to = sum + size_t(r) * dim;
            int c = 0;
            for (; c + LANES <= dim; c += LANES) store(to + c, load(to + c) + load(vector + c) * weight);
            for (; c < dim; ++c) to[c] += vector[c] * weight;
        }
    }
}

template <class Keys, class Values>
void attend_paged_with(const Paged& p) {
    const int dim = p.dim, group = p.q_heads / p.kv_heads, threads = std::max(1, p.threads);
    std::vector<Item> items = items_of(p);
    if (items.empty()) return;

    // The pages of each request, up to the last group that is read in packed form.
    std::vector<std::vector<Page>> pages(size_t(p.requests));
    for (const Item& item : items) {
        std::vector<Page>& list = pages[size_t(item.request)];
        for (int64_t page = int64_t(list.size()); page < item.group; ++page) {
            const int64_t block = p.table[item.request * p.table_width + page / p.groups];
            const uint8_t* at = p.pool + block * p.block_bytes + page % p.groups * p.page_bytes;
            const auto field = [&](int64_t offset) { return offset < 0 ? Field{nullptr, 0} : Field{at + offset, p.head_bytes}; };
            const auto side = [&](Role role) { return Side{role, field(p.codes[role]), field(p.lengths_at[role]), field(p.centre[role]), field(p.low[role]), {}, nullptr, 0, {}}; };
            list.push_back({{side(KEY), side(VALUE)}, GROUP, 0});
        }
    }

    // Split long contexts until every thread has a few tasks, since heads and requests may be few.
    int64_t whole = 0;
    for (const Item& item : items) whole += int64_t((group * item.count + TILE - 1) / TILE) * p.kv_heads;
    int64_t tasks = 0, results = 0;
    for (Item& item : items) {
        const int rows = group * item.count;
        const int64_t packed = item.group * GROUP - item.from;
        item.tiles = (rows + TILE - 1) / TILE;
        item.tile_rows = (rows + item.tiles - 1) / item.tiles;
        int64_t splits = 1;
        if (threads > 1 && whole < 8 * threads)
            splits = std::max<int64_t>(1, std::min((packed + 1023) / 1024, (8 * threads + whole - 1) / whole));
        item.span = std::max<int64_t>(BLOCK, ((packed + splits - 1) / splits + BLOCK - 1) / BLOCK * BLOCK);
        item.splits = int(std::max<int64_t>(1, (packed + item.span - 1) / item.span));
        item.task = tasks;
        tasks += int64_t(item.tiles) * p.kv_heads * item.splits;
        item.results = item.splits > 1 ? results : -1;
        if (item.splits > 1) results += int64_t(p.kv_heads) * item.splits * rows;
    }
    Memory memory;
    float* const sums = memory.take<float>(size_t(results) * dim + 1);
    float* const tops = memory.take<float>(size_t(results) + 1);
    float* const totals = memory.take<float>(size_t(results) + 1);
    const Item& last = items.back();
    const size_t numbers = size_t(last.offset) + size_t(last.count) * p.q_heads * dim;
    float* const queries = memory.take<float>(numbers);
    float* const narrowed = p.narrowing ? memory.take<float>(numbers) : queries;  // queries that read packed keys
    // Unfinished splits of each tile, indexed by its first task.
    std::unique_ptr<std::atomic<int>[]> left(new std::atomic<int>[size_t(tasks)]);
    for (const Item& item : items)
        for (int64_t i = 0; i < int64_t(item.tiles) * p.kv_heads; ++i) left[size_t(item.task + i * item.splits)].store(item.splits, std::memory_order_relaxed);

    // Converts queries to floats, those of a key head contiguous.
    Threads::get().run(int64_t(items.size()), threads, [&](int64_t i, int) {
        const Item& item = items[size_t(i)];
        for (int h = 0; h < p.q_heads; ++h)
            for (int t = 0; t < item.count; ++t) {
                const int64_t at = item.offset + (int64_t(h) * item.count + t) * dim;
                to_floats(p.q.data + (item.token + t) * p.q.token + h * p.q.head, p.type, dim, queries + at);
                if (!p.narrowing) continue;
                const float* factor = p.narrowing + int64_t(h / group) * dim;
                for (int c = 0; c < dim; ++c) narrowed[at + c] = queries[at + c] * factor[c];
            }
    });

    struct Mine {
        Problem problem{};
        Memory memory;
        std::unique_ptr<Worker<Keys, Values>> worker;
        float *sum, *top, *total, *own_sum, *own_top, *own_total, *vector, *scores, *row;
        const Item* item = nullptr;
    };
    std::vector<std::unique_ptr<Mine>> mine(static_cast<size_t>(threads));
    Threads::get().run(tasks, threads, [&](int64_t task, int who) {
        if (!mine[size_t(who)]) {
            mine[size_t(who)].reset(new Mine);
            Mine& m = *mine[size_t(who)];
            m.problem.key = p.key, m.problem.value = p.value;
            m.problem.batch = 1, m.problem.q_heads = p.q_heads, m.problem.kv_heads = p.kv_heads, m.problem.dim = dim;
            m.problem.scale = p.scale, m.problem.value_gain = p.value_gain, m.problem.softcap = p.softcap;
            m.problem.placed = p.window > 0, m.problem.window = p.window, m.problem.limbs = p.limbs;
            m.worker.reset(new Worker<Keys, Values>(m.problem));
            m.sum = m.memory.template take<float>(size_t(TILE) * dim), m.own_sum = m.memory.template take<float>(size_t(TILE) * dim);
            m.top = m.memory.template take<float>(TILE), m.total = m.memory.template take<float>(TILE);
            m.own_top = m.memory.template take<float>(TILE), m.own_total = m.memory.template take<float>(TILE);
            m.vector = m.memory.template take<float>(size_t(dim)), m.row = m.memory.template take<float>(size_t(dim));
            m.scores = m.memory.template take<float>(size_t(TILE) * BLOCK);
        }
        Mine& m = *mine[size_t(who)];
        const Item& item = *(std::upper_bound(items.begin(), items.end(), task, [](int64_t t, const Item& i) { return t < i.task; }) - 1);
        const int64_t number = task - item.task, split = number % item.splits, tile = number / item.splits % item.tiles;
        const int head = int(number / item.splits / item.tiles);
        const int all_rows = group * item.count, row = int(tile) * item.tile_rows, rows = std::min(item.tile_rows, all_rows - row);
        if (rows <= 0) return;
        if (m.item != &item) {
            const std::vector<Page>& list = pages[size_t(item.request)];
            m.item = &item, m.worker->set = -1;
            m.problem.pages = list.data(), m.problem.page_count = item.group, m.problem.tokens = item.group * GROUP;
            m.problem.q_tokens = item.count, m.problem.start = item.begin, m.problem.q = narrowed + item.offset;
        }
        const int64_t end = item.group * GROUP, from = item.from + split * item.span;
        // Results of a tile's splits are `all_rows` rows apart.
        const int64_t first = item.results < 0 ? 0 : item.results + int64_t(head) * item.splits * all_rows + row;
        float* sum = item.results < 0 ? m.sum : sums + (first + split * all_rows) * dim;
        float* top = item.results < 0 ? m.top : tops + first + split * all_rows;
        float* total = item.results < 0 ? m.total : totals + first + split * all_rows;
        if (from < end) m.worker->part(0, head, row, rows, from, std::min(end, from + item.span), sum, top, total);
        else std::fill(top, top + rows, NONE), std::fill(total, total + rows, 0.0f), std::fill(sum, sum + size_t(rows) * dim, 0.0f);
        // The thread that finishes the last split of a tile merges its parts.
        if (left[size_t(task - split)].fetch_sub(1) > 1) return;

        const float* query = queries + item.offset + (int64_t(head) * group * item.count + row) * dim;
        attend_own(p, item, head, row, rows, query, m.scores, m.vector, m.own_sum, m.own_top, m.own_total);
        const int64_t stride = item.results < 0 ? 0 : all_rows;
        const float* parts = item.results < 0 ? m.sum : sums + first * dim;
        const float* part_tops = item.results < 0 ? m.top : tops + first;
        const float* part_totals = item.results < 0 ? m.total : totals + first;
        for (int r = 0; r < rows; ++r) {
            const int h = head * group + (row + r) / item.count, t = (row + r) % item.count;
            float most = m.own_top[r];
            for (int s = 0; s < item.splits; ++s) most = std::max(most, part_tops[s * stride + r]);
            if (p.drains) most = std::max(most, p.drains[h]);
            float whole = m.own_total[r] * exp_negative(m.own_top[r] - most);
            if (p.drains) whole += exp_negative(p.drains[h] - most);
            std::fill(m.row, m.row + dim, 0.0f);
            for (int s = 0; s < item.splits; ++s) {
                if (part_tops[s * stride + r] == NONE) continue;
                const float weight = exp_negative(part_tops[s * stride + r] - most);
                whole += weight * part_totals[s * stride + r];
                const float* from_row = parts + (s * stride + r) * dim;
                for (int c = 0; c < dim; ++c) m.row[c] += weight * p.value_gain * from_row[c];
            }
            rotate_back(p.value->rotation, m.row);
            const float weight = exp_negative(m.own_top[r] - most);
            const bool broken = !finite(query + size_t(r) * dim, dim);
            for (int c = 0; c < dim; ++c) {
                const float value = (m.row[c] + weight * m.own_sum[size_t(r) * dim + c]) / whole;
                m.row[c] = broken ? std::numeric_limits<float>::quiet_NaN() : value;
            }
            from_floats(m.row, p.type, dim, p.out.data + (item.token + t) * p.out.token + h * p.out.head);
        }
    });
}

}  // namespace
