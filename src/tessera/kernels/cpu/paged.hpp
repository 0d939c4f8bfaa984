// Attention of an engine's step by block table: many requests of different lengths, each with packed pages in one pool, its
// newest tokens unquantised in a ring, and the tokens of the step as the model computes them. See kernels/paged.py.
#pragma once

#include <cstdint>

#include "attend.hpp"

namespace tessera {

enum class Number : int { FLOAT = 0, BFLOAT = 1, HALF = 2 };

inline int64_t bytes_of(Number type) { return type == Number::FLOAT ? 4 : 2; }

// Unquantised keys or values: the numbers of a vector are contiguous; strides in bytes.
struct Rows {
    uint8_t* data;
    int64_t token, head;
};

struct Paged {
    const Coder *key, *value;
    const float* narrowing;  // (kv_heads, dim), factors of queries that read packed keys, or null

    // The pool: blocks of `groups` pages of GROUP tokens for each key head. Offsets are of fields within a head's part of a
    // block, for its first page; -1: there is no such field.
    uint8_t* pool;
    int64_t block_bytes, head_bytes, page_bytes, blocks;
    int groups;
    int64_t codes[2], lengths_at[2], centre[2], low[2];  // by role
    int64_t sink[2];                        // of the unquantised first tokens, once per block
    int sinks;                              // how many these are

    // Requests: tokens [first[r], first[r + 1]) of the step are the newest of lengths[r].
    int requests;
    const int32_t *first, *lengths;
    const int32_t* table;  // (requests, table_width) numbers of blocks
    int64_t table_width;

    // A ring for each request: token t lies at t % ring_tokens of block ring_table[r * ring_width].
    uint8_t* ring;
    int64_t ring_block, ring_head, ring_token, ring_value, ring_blocks;  // bytes; offset of values from keys; number of blocks
    int ring_tokens;
    const int32_t* ring_table;
    int64_t ring_width;

    Number type;  // of all exact vectors, of queries and of the result
    Rows keys, values;
    Rows q, out;
    int q_heads, kv_heads, dim;
    float scale, value_gain;
    float softcap;         // 0: none
    int64_t window;        // 0: none; else a query sees this many newest tokens, itself included
    const float* drains;   // (q_heads,) attention sink logits, which count in the softmax without a value, or null
    int limbs, threads;
};

void attend_paged_portable(const Paged&);
void attend_paged_avx2(const Paged&);
void attend_paged_avx512(const Paged&);

// Copies keys and values of `count` groups, (count, kv_heads, GROUP, dim) float each: group i is group number[i] of request
// request[i], taken from the ring and from the tokens of the step.
void collect_groups(const Paged&, const int32_t* request, const int32_t* number, int64_t count, float* keys, float* values);

// Stores the newest tokens of the step in each ring.
void fill_rings(const Paged&);

}  // namespace tessera
