// The Python module. Shapes are checked by kernels/cpu/__init__.py; functions here take addresses.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "absorb.hpp"
#include "attend.hpp"
#include "grid.hpp"
#include "joint_codes.hpp"
#include "levels.hpp"
#include "paged.hpp"
#include "quantise.hpp"
#include "threads.hpp"

namespace nb = nanobind;
using namespace tessera;

namespace {

using Rows4I16 = nb::ndarray<const int16_t, nb::shape<-1, 4>, nb::c_contig, nb::device::cpu>;
using Rows4I64 = nb::ndarray<const int64_t, nb::shape<-1, 4>, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<const float, nb::shape<-1>, nb::c_contig, nb::device::cpu>;
using Square = nb::ndarray<const float, nb::shape<-1, -1>, nb::c_contig, nb::device::cpu>;
using Ints = nb::ndarray<const int32_t, nb::shape<-1>, nb::c_contig, nb::device::cpu>;
using Longs = nb::ndarray<const int64_t, nb::shape<-1>, nb::c_contig, nb::device::cpu>;
// Numbers that describe a page: see `page_at`.
constexpr int COLUMNS = 24;
using Table = nb::ndarray<const int64_t, nb::shape<-1, COLUMNS>, nb::c_contig, nb::device::cpu>;

void make_book(Book* self, int bits, int move_bits, float step, Rows4I16 points, Rows4I64 permutation, Rows4I64 sign, Floats scale,
               Square dct, Floats signs) {
    if (dct.shape(0) != dct.shape(1)) throw nb::value_error("the DCT is no square matrix");
    if (permutation.shape(0) != size_t{1} << move_bits || sign.shape(0) != permutation.shape(0) || scale.shape(0) != 256)
        throw nb::value_error("moves or scales of another number than the codebook has");
    new (self) Book(bits, move_bits, step, points.data(), int64_t(points.shape(0)), permutation.data(), sign.data(),
                    scale.data(), dct.data(), int(dct.shape(0)), signs.data(), int(signs.shape(0)));
}

// Directions of each head, or shared by all: (heads or 1, count, 4).
using Words = nb::ndarray<const float, nb::shape<-1, -1, 4>, nb::c_contig, nb::device::cpu>;

void make_products(Products* self, int bits, int radius_bits, Floats levels, Words k_words, Words v_words, Square dct, Floats signs) {
    if (dct.shape(0) != dct.shape(1)) throw nb::value_error("the DCT is no square matrix");
    if (radius_bits < 1 || radius_bits > 24 || levels.shape(0) != size_t{1} << radius_bits || k_words.shape(1) != v_words.shape(1))
        throw nb::value_error("levels or directions of another number than codes have");
    new (self) Products(bits, radius_bits, levels.data(), k_words.data(), int64_t(k_words.shape(0)), v_words.data(),
                        int64_t(v_words.shape(0)), uint32_t(k_words.shape(1)), dct.data(), int(dct.shape(0)), signs.data(),
                        int(signs.shape(0)));
}

void make_scalars(Scalars* self, int form, int bits, float zero, float factor, Floats levels, Square dct, Floats signs) {
    if (dct.shape(0) != dct.shape(1)) throw nb::value_error("the DCT is no square matrix");
    new (self) Scalars(form, bits, zero, factor, levels.data(), int64_t(levels.shape(0)), dct.data(), int(dct.shape(0)), signs.data(),
                       int(signs.shape(0)));
}

// A row has, for keys and then for values, codes, scale, centre, low and flags with their strides, and kept; then tokens and
// offset.
Page page_at(const int64_t* row) {
    const auto at = [row](int j) { return reinterpret_cast<const uint8_t*>(uintptr_t(row[j])); };
    const auto field = [&](int j) { return Field{at(j), row[j + 1]}; };
    const auto side = [&](Role role, int j) { return Side{role, field(j), field(j + 2), field(j + 4), field(j + 6), field(j + 8), at(j + 10), row[23], {}}; };
    return {{side(KEY, 0), side(VALUE, 11)}, row[22], row[23]};
}

std::vector<Page> pages_of(const Table& table, int64_t& tokens) {
    std::vector<Page> list(table.shape(0));
    tokens = 0;
    for (size_t i = 0; i < list.size(); ++i) {
        list[i] = page_at(table.data() + COLUMNS * i);
        tokens += list[i].tokens;
    }
    return list;
}

// Whether this coding supports vectors of `dim` numbers.
bool fits(const Coder& coder, int dim) {
    return dim % 4 == 0 && dim <= MAX_DIM && dim >= 4 && (!coder.rotation.dim || coder.rotation.dim == dim);
}

void attend(const Coder& keys, const Coder& values, Table pages, const std::string& level, uintptr_t q, uintptr_t out,
            uintptr_t lse, int batch, int q_heads, int kv_heads, int q_tokens, int dim, float scale, float value_gain, float softcap, uintptr_t mask,
            int64_t mask_batch, int64_t mask_head, int64_t mask_query, bool placed, int64_t start, int64_t window, int limbs,
            int threads) {
    if (!fits(keys, dim) || !fits(values, dim) || limbs < 1 || limbs > 3)
        throw nb::value_error("shapes that this kernel does not know");
    Problem p{};
    const std::vector<Page> list = pages_of(pages, p.tokens);
    p.key = &keys, p.value = &values;
    p.pages = list.data();
    p.page_count = int64_t(list.size());
    p.batch = batch, p.q_heads = q_heads, p.kv_heads = kv_heads, p.q_tokens = q_tokens, p.dim = dim;
    p.q = reinterpret_cast<const float*>(q);
    p.scale = scale, p.value_gain = value_gain, p.softcap = softcap;
    p.mask = reinterpret_cast<const uint8_t*>(mask);
    p.mask_batch = mask_batch, p.mask_head = mask_head, p.mask_query = mask_query;
    p.placed = placed, p.start = start, p.window = window, p.limbs = limbs, p.threads = threads;
    p.out = reinterpret_cast<float*>(out);
    p.lse = reinterpret_cast<float*>(lse);
    nb::gil_scoped_release release;
    run(level, p);
}

void attend_exact(const std::string& level, uintptr_t q, uintptr_t out, uintptr_t lse, int batch, int q_heads, int kv_heads,
                  int q_tokens, int dim, int64_t tokens, float scale, float softcap, uintptr_t mask, int64_t mask_batch,
                  int64_t mask_head, int64_t mask_query, bool placed, int64_t start, int64_t window, bool bfloat, uintptr_t k,
                  int64_t k_batch, int64_t k_head, int64_t k_token, uintptr_t v, int64_t v_batch, int64_t v_head, int64_t v_token,
                  int threads) {
    if (dim > MAX_DIM || q_heads / kv_heads * q_tokens > TILE) throw nb::value_error("shapes that this kernel does not know");
    Problem p{};
    p.tokens = tokens;
    p.batch = batch, p.q_heads = q_heads, p.kv_heads = kv_heads, p.q_tokens = q_tokens, p.dim = dim;
    p.q = reinterpret_cast<const float*>(q);
    p.scale = scale, p.softcap = softcap;
    p.mask = reinterpret_cast<const uint8_t*>(mask);
    p.mask_batch = mask_batch, p.mask_head = mask_head, p.mask_query = mask_query;
    p.placed = placed, p.start = start, p.window = window, p.threads = threads;
    p.out = reinterpret_cast<float*>(out);
    p.lse = reinterpret_cast<float*>(lse);
    const Exact x{reinterpret_cast<const uint8_t*>(k), reinterpret_cast<const uint8_t*>(v), bfloat, k_batch, k_head, k_token, v_batch, v_head, v_token};
    nb::gil_scoped_release release;
    run(level, p, x);
}

// The arguments of an engine's layer that stay the same at every step. pool: address, blocks, bytes of a block, of a head in
// it, of a page; pages of a head in a block; offsets of codes, scales, centres, lows and sinks, of keys and of values each;
// sinks. ring: address, blocks, bytes of a block, of a head in it, of a token; where values lie behind keys; tokens. shape:
// kv_heads, head_dim, type of exact numbers; narrowing: its address, or 0.
struct Pool {
    Paged paged{};
};

void make_pool(Pool* self, const std::vector<int64_t>& pool, const std::vector<int64_t>& ring, const std::vector<int64_t>& shape,
               uintptr_t narrowing) {
    if (pool.size() != 17 || ring.size() != 7 || shape.size() != 3) throw nb::value_error("a pool of another make");
    Paged p{};
    p.pool = reinterpret_cast<uint8_t*>(uintptr_t(pool[0]));
    p.blocks = pool[1], p.block_bytes = pool[2], p.head_bytes = pool[3], p.page_bytes = pool[4], p.groups = int(pool[5]);
    for (int role = 0; role < 2; ++role) p.codes[role] = pool[6 + role], p.lengths_at[role] = pool[8 + role], p.centre[role] = pool[10 + role], p.low[role] = pool[12 + role], p.sink[role] = pool[14 + role];
    p.sinks = int(pool[16]);
    p.ring = reinterpret_cast<uint8_t*>(uintptr_t(ring[0]));
    p.ring_blocks = ring[1], p.ring_block = ring[2], p.ring_head = ring[3], p.ring_token = ring[4], p.ring_value = ring[5], p.ring_tokens = int(ring[6]);
    p.kv_heads = int(shape[0]), p.dim = int(shape[1]), p.type = Number(shape[2]);
    p.narrowing = reinterpret_cast<const float*>(narrowing);
    if (p.dim % 4 || p.dim > MAX_DIM || p.dim < 4 || p.kv_heads < 1 || p.groups < 1 || p.ring_tokens < GROUP || p.sinks > GROUP || shape[2] < 0 || shape[2] > 2)
        throw nb::value_error("shapes that this kernel does not know");
    new (self) Pool{p};
}

// requests: their number; addresses of where each begins in the step, of lengths, of the table of blocks; its width; address of
// the rings' table; its width. vectors: address and strides in bytes over tokens and heads, of keys and of values.
Paged step_of(const Pool& pool, const std::vector<int64_t>& requests, const std::vector<int64_t>& vectors) {
    if (requests.size() != 7 || vectors.size() != 6) throw nb::value_error("a step of another make");
    Paged p = pool.paged;
    const auto table = [&](int i) { return reinterpret_cast<const int32_t*>(uintptr_t(requests[i])); };
    const auto rows = [&](int i) { return Rows{reinterpret_cast<uint8_t*>(uintptr_t(vectors[i])), vectors[i + 1], vectors[i + 2]}; };
    p.requests = int(requests[0]);
    p.first = table(1), p.lengths = table(2), p.table = table(3), p.table_width = requests[4], p.ring_table = table(5), p.ring_width = requests[6];
    p.keys = rows(0), p.values = rows(3);
    for (int r = 0; r < p.requests; ++r) {
        const int64_t tokens = p.first[r + 1] - p.first[r], blocks = p.lengths[r] / GROUP / p.groups;
        if (tokens < 0 || p.lengths[r] < tokens || blocks > p.table_width) throw nb::value_error("a request whose lengths do not fit");
        for (int64_t i = 0; i < blocks; ++i)
            if (p.table[r * p.table_width + i] < 0 || p.table[r * p.table_width + i] >= p.blocks) throw nb::value_error("a table that names no block of the pool");
        if (p.ring_table[r * p.ring_width] < 0 || p.ring_table[r * p.ring_width] >= p.ring_blocks) throw nb::value_error("a table that names no ring of the pool");
    }
    return p;
}

// rows: address and strides in bytes over tokens and heads, of queries and of results.
void attend_paged(const Coder& keys, const Coder& values, const Pool& pool, const std::string& level, const std::vector<int64_t>& requests,
                  const std::vector<int64_t>& vectors, const std::vector<int64_t>& rows, int q_heads, float scale, float value_gain, float softcap, int64_t window, uintptr_t drains,
                  int limbs, int threads) {
    Paged p = step_of(pool, requests, vectors);
    if (rows.size() != 6 || q_heads % p.kv_heads || !fits(keys, p.dim) || !fits(values, p.dim) || limbs < 1 || limbs > 3)
        throw nb::value_error("shapes that this kernel does not know");
    p.key = &keys, p.value = &values;
    const auto at = [&](int i) { return Rows{reinterpret_cast<uint8_t*>(uintptr_t(rows[i])), rows[i + 1], rows[i + 2]}; };
    p.q = at(0), p.out = at(3);
    p.q_heads = q_heads, p.scale = scale, p.value_gain = value_gain, p.softcap = softcap, p.window = window;
    p.drains = reinterpret_cast<const float*>(drains);
    p.limbs = limbs, p.threads = threads;
    nb::gil_scoped_release release;
#if defined(TESSERA_X86)
    if (at_least(level, AVX512)) attend_paged_avx512(p);
    else if (at_least(level, AVX2)) attend_paged_avx2(p);
    else
#endif
        attend_paged_portable(p);
    fill_rings(p);
}

// groups: (2, count) int32, the request and the number of each; keys, values: (count, kv_heads, GROUP, dim) float.
void collect(const Pool& pool, const std::vector<int64_t>& requests, const std::vector<int64_t>& vectors, uintptr_t groups, int64_t count,
             uintptr_t keys, uintptr_t values, int threads) {
    Paged p = step_of(pool, requests, vectors);
    p.threads = threads;
    const int32_t* numbers = reinterpret_cast<const int32_t*>(groups);
    nb::gil_scoped_release release;
    collect_groups(p, numbers, numbers + count, count, reinterpret_cast<float*>(keys), reinterpret_cast<float*>(values));
}

// One softmax over the keys of all parts: outs and lses of (rows, dim) and (rows,). lse may be null.
void merge_rows(const float* const* outs, const float* const* lses, size_t parts, int64_t rows, int dim, float* out, float* lse) {
    constexpr float NONE = -std::numeric_limits<float>::infinity();
    for (int64_t r = 0; r < rows; ++r) {
        float most = NONE, total = 0;
        for (size_t i = 0; i < parts; ++i) most = std::max(most, std::isnan(lses[i][r]) ? NONE : lses[i][r]);
        const float base = most == NONE ? 0.0f : most;
        for (size_t i = 0; i < parts; ++i) total += std::exp(lses[i][r] - base);
        float* to = out + r * dim;
        std::fill(to, to + dim, 0.0f);
        for (size_t i = 0; i < parts; ++i) {
            const float weight = total == 0 ? 0.0f : std::exp(lses[i][r] - base) / total;
            const float* from = outs[i] + r * dim;
            for (int c = 0; c < dim; ++c) to[c] += weight * from[c];
        }
        if (lse) lse[r] = total == 0 ? NONE : base + std::log(total);
    }
}

void merge(const std::vector<uintptr_t>& outs, const std::vector<uintptr_t>& lses, int64_t rows, int dim, uintptr_t out, uintptr_t lse) {
    std::vector<const float*> from, logs;
    for (uintptr_t x : outs) from.push_back(reinterpret_cast<const float*>(x));
    for (uintptr_t x : lses) logs.push_back(reinterpret_cast<const float*>(x));
    merge_rows(from.data(), logs.data(), from.size(), rows, dim, reinterpret_cast<float*>(out), reinterpret_cast<float*>(lse));
}

// Multiplies the channels of queries by the decoded bytes of their channels; there are bytes for each batch row and key head.
void narrow_rows(const float* from, const uint8_t* code, const float* table, float* to, int64_t lines, int64_t queries, int64_t dim) {
    for (int64_t line = 0; line < lines; ++line, code += dim)
        for (int64_t query = 0; query < queries; ++query, from += dim, to += dim)
            for (int64_t i = 0; i < dim; ++i) to[i] = from[i] * table[code[i]];
}

void narrow(uintptr_t q, uintptr_t bytes, uintptr_t table, uintptr_t out, int64_t lines, int64_t queries, int64_t dim) {
    narrow_rows(reinterpret_cast<const float*>(q), reinterpret_cast<const uint8_t*>(bytes), reinterpret_cast<const float*>(table),
                reinterpret_cast<float*>(out), lines, queries, dim);
}

// Attention of a step over all its sources. shape: batch, query heads, key heads, query tokens, head_dim, threads. exact: 13
// numbers for each source: address of keys and their strides in bytes over batch rows, heads and tokens, the same of values,
// tokens, whether bfloat16, whether queries have places, the first one's, and the window. `packed`: the quantised source, or
// null; its queries are narrowed by the bytes of `sizes`, which stand for numbers of `table`, where there are any.
void attend_all(const std::string& level, const float* q, float* out, const std::vector<int64_t>& shape, float scale, float softcap,
                const std::vector<int64_t>& exact, Problem* packed, const uint8_t* sizes, const float* table) {
    constexpr size_t FIELDS = 13;
    if (shape.size() != 6 || exact.size() % FIELDS) throw nb::value_error("shapes that this kernel does not know");
    Problem p{};
    p.batch = int(shape[0]), p.q_heads = int(shape[1]), p.kv_heads = int(shape[2]), p.q_tokens = int(shape[3]), p.dim = int(shape[4]);
    p.threads = int(shape[5]);
    if (p.dim > MAX_DIM || p.kv_heads < 1 || p.q_heads % p.kv_heads || (!exact.empty() && p.q_heads / p.kv_heads * p.q_tokens > TILE))
        throw nb::value_error("shapes that this kernel does not know");
    nb::gil_scoped_release release;
    const size_t parts = exact.size() / FIELDS + (packed ? 1 : 0), rows = size_t(p.batch) * p.q_heads * p.q_tokens, dim = size_t(p.dim);
    const bool one = parts == 1;
    std::vector<float> scratch(parts * rows + (one ? 0 : parts * rows * dim) + (packed && sizes ? rows * dim : 0));
    float *const logs = scratch.data(), *const sums = one ? out : logs + parts * rows, *const narrowed = logs + parts * rows + (one ? 0 : parts * rows * dim);
    std::vector<const float*> outs, lses;
    const auto next = [&](Problem& problem) {
        problem.out = sums + outs.size() * rows * dim, problem.lse = logs + lses.size() * rows;
        outs.push_back(problem.out), lses.push_back(problem.lse);
    };
    p.q = q, p.scale = scale, p.softcap = softcap;
    if (packed) {
        Problem own = *packed;
        own.batch = p.batch, own.q_heads = p.q_heads, own.kv_heads = p.kv_heads, own.q_tokens = p.q_tokens, own.dim = p.dim;
        own.threads = p.threads, own.q = q, own.scale = scale, own.softcap = softcap;
        if (sizes) {
            narrow_rows(q, sizes, table, narrowed, int64_t(p.batch) * p.kv_heads, p.q_heads / p.kv_heads * p.q_tokens, p.dim);
            own.q = narrowed;
        }
        next(own);
        run(level, own);
    }
    for (size_t i = 0; i < exact.size(); i += FIELDS) {
        const int64_t* x = exact.data() + i;
        const Exact source{reinterpret_cast<const uint8_t*>(uintptr_t(x[0])), reinterpret_cast<const uint8_t*>(uintptr_t(x[4])), x[9] != 0, x[1], x[2], x[3], x[5], x[6], x[7]};
        p.tokens = x[8], p.placed = x[10] != 0, p.start = x[11], p.window = x[12];
        next(p);
        run(level, p, source);
    }
    if (!one) merge_rows(outs.data(), lses.data(), parts, int64_t(rows), p.dim, out, nullptr);
}

void attend_exact_sources(const std::string& level, uintptr_t q, uintptr_t out, const std::vector<int64_t>& shape, float scale, float softcap,
                          const std::vector<int64_t>& exact) {
    attend_all(level, reinterpret_cast<const float*>(q), reinterpret_cast<float*>(out), shape, scale, softcap, exact, nullptr, nullptr, nullptr);
}

// rule: whether queries have places among the packed tokens, the first one's, the window; limbs. narrowing: addresses, or zeros.
void attend_sources(const std::string& level, uintptr_t q, uintptr_t out, const std::vector<int64_t>& shape, float scale, float softcap,
                    const std::vector<int64_t>& exact, const Coder& keys, const Coder& values, Table pages, float value_gain,
                    const std::vector<int64_t>& rule, const std::vector<uintptr_t>& narrowing) {
    if (shape.size() != 6 || rule.size() != 4 || narrowing.size() != 2 || !fits(keys, int(shape[4])) || !fits(values, int(shape[4])) || rule[3] < 1 || rule[3] > 3)
        throw nb::value_error("shapes that this kernel does not know");
    Problem p{};
    const std::vector<Page> list = pages_of(pages, p.tokens);
    p.key = &keys, p.value = &values, p.pages = list.data(), p.page_count = int64_t(list.size()), p.value_gain = value_gain;
    p.placed = rule[0] != 0, p.start = rule[1], p.window = rule[2], p.limbs = int(rule[3]);
    attend_all(level, reinterpret_cast<const float*>(q), reinterpret_cast<float*>(out), shape, scale, softcap, exact, &p,
               reinterpret_cast<const uint8_t*>(narrowing[0]), reinterpret_cast<const float*>(narrowing[1]));
}

void decode(const Coder& coder, Table pages, const std::string& level, bool values, float gain, int batch, int heads, int dim,
            uintptr_t out, int threads) {
    if (pages.shape(0) != 1 || !fits(coder, dim))
        throw nb::value_error("shapes that this kernel does not know");
    const Page page = page_at(pages.data());
    Vectors p{};
    p.coder = &coder;
    p.page = &page, p.role = values ? VALUE : KEY;
    p.batch = batch, p.heads = heads, p.dim = dim, p.gain = gain, p.threads = threads;
    p.out = reinterpret_cast<float*>(out);
    nb::gil_scoped_release release;
#if defined(TESSERA_X86)
    if (at_least(level, AVX512)) return decode_avx512(p);
    if (at_least(level, AVX2)) return decode_avx2(p);
#endif
    decode_portable(p);
}

template <class T>
void fill(T* to, const Longs& from, size_t count, const char* what) {
    if (from.size() != count) throw nb::value_error(what);
    std::copy(from.data(), from.data() + count, to);
}

void make_index(Index* self, Rows4I16 words, Ints codes, bool conjugations, float step, Longs product, Longs inverse, Longs reduction_unit,
                Longs rotation_unit, Longs unit_rotation) {
    if (words.shape(0) % 24 || words.shape(0) != codes.shape(0)) throw nb::value_error("words and codes need 24 rows for each secondary");
    Group group;
    fill(&group.product[0][0], product, 576, "product");
    fill(group.inverse, inverse, 24, "inverse");
    fill(group.reduction_unit, reduction_unit, 12, "reduction_unit");
    fill(group.rotation_unit, rotation_unit, 12, "rotation_unit");
    fill(group.unit_rotation, unit_rotation, 24, "unit_rotation");
    nb::gil_scoped_release release;
    new (self) Index(words.data(), codes.data(), int(words.shape(0) / 24), conjugations, step, group);
}

// Calls work(begin, end) for parts of n rows in parallel.
template <class Work>
void in_parts(int64_t n, int64_t part, int threads, const Work& work) {
    Threads::get().run((n + part - 1) / part, threads, [&](int64_t i, int) { work(i * part, std::min(n, (i + 1) * part)); });
}

// Finds the codes of n chunks (n, 4), and their codewords (n, 4) if `words` is not 0.
void nearest(const Index& index, const std::string& level, uintptr_t x, int64_t n, uintptr_t codes, uintptr_t words, int threads) {
    nb::gil_scoped_release release;
    const Nearest search = nearest_at(level);
    in_parts(n, 1024, threads, [&](int64_t begin, int64_t end) {
        search({&index, reinterpret_cast<const float*>(x) + 4 * begin, 4, 1, end - begin, reinterpret_cast<int32_t*>(codes) + begin,
                words ? reinterpret_cast<float*>(words) + 4 * begin : nullptr});
    });
}

void pack_nearest(const Index& index, const std::string& level, uintptr_t x, uintptr_t scale, int64_t n, int64_t dim, int bits,
                  uintptr_t out, int threads) {
    if (bits < 8 || bits > 24 || dim < 1) throw nb::value_error("shapes that this kernel does not know");
    nb::gil_scoped_release release;
    const VectorCodes s{reinterpret_cast<const float*>(x), reinterpret_cast<const float*>(scale), dim, bits, reinterpret_cast<uint8_t*>(out)};
    const Nearest search = nearest_at(level);
    in_parts(n, std::max<int64_t>(1, 4096 / dim), threads, [&](int64_t begin, int64_t end) { vector_codes(index, search, s, begin, end); });
}

void encode_feedback(const Index& index, const std::string& level, uintptr_t y, uintptr_t matrix, int64_t heads, int64_t vectors,
                     int dim, uintptr_t codes, int threads) {
    if (dim % 4 || dim < 4) throw nb::value_error("shapes that this kernel does not know");
    nb::gil_scoped_release release;
    const Feedback s{&index, reinterpret_cast<const float*>(y), reinterpret_cast<const float*>(matrix), vectors, dim, reinterpret_cast<int32_t*>(codes)};
    const int64_t blocks = (vectors + Feedback::BLOCK - 1) / Feedback::BLOCK;
    auto run = feedback_portable;
#if defined(TESSERA_X86)
    if (at_least(level, AVX2)) run = feedback_avx2;
    if (at_least(level, AVX512)) run = feedback_avx512;
#endif
    Threads::get().run(heads * blocks, threads, [&](int64_t i, int) { run(s, i / blocks, i % blocks * Feedback::BLOCK); });
}

// shape: lines, tokens, dim, threads; weights and centre may be 0. Returns whether the weights are positive. See struct JointCodes.
bool encode_joint(const Index& index, const Book& book, const std::string& level, const std::vector<int64_t>& shape, uintptr_t x, uintptr_t weights,
                  uintptr_t centre, uintptr_t scale, uintptr_t codes) {
    if (shape.size() != 4 || shape[0] < 0 || shape[1] < 0 || shape[2] < 4 || shape[2] > MAX_DIM || !fits(book, int(shape[2])) || book.bits < 8)
        throw nb::value_error("shapes that this kernel does not know");
    const JointCodes s{&index, &book, reinterpret_cast<const float*>(x), reinterpret_cast<const float*>(weights), shape[0], shape[1], int(shape[2]),
                       reinterpret_cast<uint16_t*>(centre), reinterpret_cast<uint8_t*>(scale), reinterpret_cast<uint8_t*>(codes), int(shape[3])};
    nb::gil_scoped_release release;
#if defined(TESSERA_X86)
    if (at_least(level, AVX512)) return encode_joint_avx512(s);
    if (at_least(level, AVX2)) return encode_joint_avx2(s);
#endif
    return encode_joint_portable(s);
}

void pack_linear(const std::vector<uintptr_t>& given, const std::vector<int64_t>& shape, float least, float most, int bits, uintptr_t out,
                 int threads) {
    if (given.size() != 3 || shape.size() != 5 || bits < 1 || bits > 8 || *std::min_element(shape.begin(), shape.end()) < 1 || (!given[1] && shape[4] == 1))
        throw nb::value_error("shapes that this kernel does not know");
    nb::gil_scoped_release release;
    const auto at = [&](size_t i) { return reinterpret_cast<const float*>(given[i]); };
    const LinearCodes s{at(0), at(1), at(2), shape[0], shape[1], shape[2], shape[3], shape[4], least, most, bits, reinterpret_cast<uint8_t*>(out)};
    in_parts(s.lines * s.tokens, 64, threads, [&](int64_t begin, int64_t end) { linear_codes(s, begin, end); });
}

void pack_levels(const std::vector<uintptr_t>& given, int64_t rows, int64_t dim, float factor, int bits, uintptr_t out, uintptr_t chosen,
                 int threads) {
    if (given.size() != 4 || dim < 1 || bits < 1 || bits > 8) throw nb::value_error("shapes that this kernel does not know");
    nb::gil_scoped_release release;
    const auto at = [&](size_t i) { return reinterpret_cast<const float*>(given[i]); };
    const LevelCodes s{at(0), at(1), at(2), at(3), rows, dim, factor, bits, reinterpret_cast<uint8_t*>(out), reinterpret_cast<float*>(chosen)};
    in_parts(rows, 64, threads, [&](int64_t begin, int64_t end) { level_codes(s, begin, end); });
}

void pack_blocks(uintptr_t x, uintptr_t ratio, uintptr_t scale, int64_t blocks, int bits, uintptr_t out, int threads) {
    if (bits != 4 && bits != 8) throw nb::value_error("shapes that this kernel does not know");
    nb::gil_scoped_release release;
    const BlockCodes s{reinterpret_cast<const float*>(x), reinterpret_cast<const float*>(ratio), reinterpret_cast<const uint16_t*>(scale), blocks, bits, reinterpret_cast<uint8_t*>(out)};
    in_parts(blocks, 256, threads, [&](int64_t begin, int64_t end) { block_codes(s, begin, end); });
}

// Searches lines of `chunks` chunks, line i with the matrices of head i % heads; matrices: (heads, size, 4, 4).
void nearest_directions(uintptr_t matrices, int64_t heads, int size, uintptr_t x, int64_t lines, int64_t chunks, uintptr_t codes,
                        uintptr_t projections, int threads) {
    nb::gil_scoped_release release;
    constexpr int64_t PART = 1024;
    const int64_t parts = (chunks + PART - 1) / PART;
    Threads::get().run(lines * parts, threads, [&](int64_t task, int) {
        const int64_t line = task / parts, begin = task % parts * PART, at = line * chunks + begin;
        nearest_product(reinterpret_cast<const float*>(matrices) + line % heads * size * 16, size, reinterpret_cast<const float*>(x) + 4 * at,
                          std::min(PART, chunks - begin), reinterpret_cast<int32_t*>(codes) + at, reinterpret_cast<float*>(projections) + at);
    });
}

GridSteps grid_steps(const std::vector<int64_t>& shape, const std::vector<uintptr_t>& given) {
    if (shape.size() != 10 || given.size() != 12) throw nb::value_error("shapes that this kernel does not know");
    const auto at = [&](int i) { return reinterpret_cast<const float*>(given[i]); };
    GridSteps s{};
    s.batch = shape[0], s.steps = shape[1], s.reads = shape[2], s.channels = int(shape[3]);
    for (int i = 0; i < 3; ++i) s.size[i] = int(shape[4 + i]), s.written[i] = at(2 + i), s.mask[i] = at(5 + i);
    s.gated_by_state = shape[7], s.every = shape[8], s.threads = int(shape[9]);
    s.h = at(0), s.c = at(1), s.read = at(8), s.weight = at(9), s.bias = at(10), s.taps = at(11);
    return s;
}

// given: h, c, written (3), mask (3), read, weight, bias, taps; results: out, h, c, kept. See struct GridSteps.
void advance(const std::string& level, const std::vector<int64_t>& shape, const std::vector<uintptr_t>& given,
             const std::vector<uintptr_t>& results) {
    if (results.size() != 4) throw nb::value_error("shapes that this kernel does not know");
    const auto at = [&](int i) { return reinterpret_cast<float*>(results[i]); };
    GridSteps s = grid_steps(shape, given);
    s.out = at(0), s.h_out = at(1), s.c_out = at(2), s.kept = at(3);
    nb::gil_scoped_release release;
#if defined(TESSERA_X86)
    if (at_least(level, AVX512)) return advance_avx512(s);
    if (at_least(level, AVX2)) return advance_avx2(s);
#endif
    advance_portable(s);
}

// kept: as returned by `advance`; grads: of out, h, c; results: gradients of `given`.
void retreat(const std::string& level, const std::vector<int64_t>& shape, const std::vector<uintptr_t>& given, uintptr_t kept,
             const std::vector<uintptr_t>& grads, const std::vector<uintptr_t>& results) {
    if (grads.size() != 3 || results.size() != 12) throw nb::value_error("shapes that this kernel does not know");
    const auto from = [&](int i) { return reinterpret_cast<const float*>(grads[i]); };
    const auto at = [&](int i) { return reinterpret_cast<float*>(results[i]); };
    GridSteps s = grid_steps(shape, given);
    s.kept = reinterpret_cast<float*>(kept);
    const GridGradients d{from(0), from(1), from(2), at(0), at(1), {at(2), at(3), at(4)}, {at(5), at(6), at(7)}, at(8), at(9), at(10), at(11)};
    nb::gil_scoped_release release;
#if defined(TESSERA_X86)
    if (at_least(level, AVX512)) return retreat_avx512(s, d);
    if (at_least(level, AVX2)) return retreat_avx2(s, d);
#endif
    retreat_portable(s, d);
}

// given: q, k, v, decay, rate, state. See struct Absorb.
Absorb absorb_given(const std::vector<int64_t>& shape, const std::vector<uintptr_t>& given, uintptr_t kept, uintptr_t fresh) {
    if (shape.size() != 9 || given.size() != 6) throw nb::value_error("shapes that this kernel does not know");
    const auto at = [&](int i) { return reinterpret_cast<const float*>(given[i]); };
    Absorb s{};
    s.heads = shape[0], s.tokens = shape[1], s.group = int(shape[2]), s.d_k = int(shape[3]), s.d_v = int(shape[4]);
    s.delta = shape[5], s.read_first = shape[6], s.every = shape[7], s.threads = int(shape[8]);
    s.q = at(0), s.k = at(1), s.v = at(2), s.decay = at(3), s.rate = at(4), s.state = at(5);
    s.kept = reinterpret_cast<float*>(kept), s.fresh = reinterpret_cast<float*>(fresh);
    return s;
}

// results: read, end.
void absorb(const std::string& level, const std::vector<int64_t>& shape, const std::vector<uintptr_t>& given, uintptr_t kept,
            uintptr_t fresh, const std::vector<uintptr_t>& results) {
    if (results.size() != 2) throw nb::value_error("shapes that this kernel does not know");
    Absorb s = absorb_given(shape, given, kept, fresh);
    s.read = reinterpret_cast<float*>(results[0]), s.end = reinterpret_cast<float*>(results[1]);
    nb::gil_scoped_release release;
#if defined(TESSERA_X86)
    if (at_least(level, AVX512)) return absorb_avx512(s);
    if (at_least(level, AVX2)) return absorb_avx2(s);
#endif
    absorb_portable(s);
}

// kept, fresh: as returned by `absorb`; grads: of read and end; results: gradients of `given`.
void absorb_backward(const std::string& level, const std::vector<int64_t>& shape, const std::vector<uintptr_t>& given,
                     uintptr_t kept, uintptr_t fresh, const std::vector<uintptr_t>& grads, const std::vector<uintptr_t>& results) {
    if (grads.size() != 2 || results.size() != 6) throw nb::value_error("shapes that this kernel does not know");
    const auto from = [&](int i) { return reinterpret_cast<const float*>(grads[i]); };
    const auto at = [&](int i) { return reinterpret_cast<float*>(results[i]); };
    const Absorb s = absorb_given(shape, given, kept, fresh);
    const AbsorbGradients d{from(0), from(1), at(0), at(1), at(2), at(3), at(4), at(5)};
    nb::gil_scoped_release release;
#if defined(TESSERA_X86)
    if (at_least(level, AVX512)) return absorb_backward_avx512(s, d);
    if (at_least(level, AVX2)) return absorb_backward_avx2(s, d);
#endif
    absorb_backward_portable(s, d);
}

}  // namespace

NB_MODULE(_cpu, m) {
    m.doc() = "Tessera's kernels for CPUs.";
    nb::class_<Coder>(m, "Coder");
    nb::class_<Book, Coder>(m, "Book")
        .def("__init__", &make_book)
        .def_ro("blocks", &Book::blocks, "Tables that codewords are picked from in registers; 0: they are looked up in memory.");
    m.def("use_openmp", [](uintptr_t parallel, uintptr_t number) {
        Threads::use(reinterpret_cast<Threads::Parallel>(parallel), reinterpret_cast<Threads::Number>(number));
    });
    m.def("levels", &levels, "Names of the instruction sets that this processor and this build have, the best last.");
    nb::class_<Products, Coder>(m, "Products").def("__init__", &make_products);
    nb::class_<Scalars, Coder>(m, "Scalars").def("__init__", &make_scalars);
    m.def("attend", &attend);
    m.def("attend_exact", &attend_exact);
    m.def("attend_exact_sources", &attend_exact_sources);
    m.def("attend_sources", &attend_sources);
    m.def("merge", &merge);
    m.def("narrow", &narrow);
    nb::class_<Pool>(m, "Pool").def("__init__", &make_pool);
    m.def("attend_paged", &attend_paged);
    m.def("collect", &collect);
    m.def("decode", &decode);
    nb::class_<Index>(m, "Index").def("__init__", &make_index);
    m.def("nearest", &nearest);
    m.def("pack_nearest", &pack_nearest);
    m.def("encode_feedback", &encode_feedback);
    m.def("encode_joint", &encode_joint);
    m.def("pack_linear", &pack_linear);
    m.def("pack_levels", &pack_levels);
    m.def("pack_blocks", &pack_blocks);
    m.def("nearest_directions", &nearest_directions);
    m.def("advance", &advance);
    m.def("retreat", &retreat);
    m.def("absorb", &absorb);
    m.def("absorb_backward", &absorb_backward);
}
