// Partial attention over packed keys and values; kernels/reference.py is the definition.
// The algorithm, for one key head and a tile of the query rows that read it (query heads of a group times query
// tokens): tokens come in blocks; a block's key codes become small integers by table lookup, 16 tokens at a time, and are
// multiplied with all rows; the online softmax is updated; value codes become integers and are added up by weight.
// A codeword is looked up once for all rows of the tile, and dense keys or values are never stored.
#pragma once

#include <cstdint>

#include "book.hpp"
#include "products.hpp"
#include "scalars.hpp"

namespace tessera {

constexpr int UNIT = 16;      // tokens looked up together
constexpr int GROUP = 64;     // tokens that share the means of their key channels
constexpr int BLOCK = 256;    // tokens between two updates of the softmax
constexpr int TILE = 64;      // query rows that share a lookup
constexpr int MAX_DIM = 512;  // of a head

enum Role { KEY, VALUE };

// A field of packed keys or values. The rows of a head are contiguous; heads are `stride` bytes apart, within and across batch
// rows.
struct Field {
    const uint8_t* data;  // null if the format has no such field
    int64_t stride;

    const uint8_t* row(int64_t line, int64_t token, int64_t bytes) const { return data + line * stride + token * bytes; }
};

// Keys or values of one page of a packed tier; `line`, batch row · kv_heads + head, selects the row and head.
struct Side {
    Role role;
    Field codes, scale;
    Field centre;               // 16-bit words, or none
    Field low;                  // added to each number, or none
    Field flags;                // bitmap of the chunks that are kept unquantised, or none
    const uint8_t* kept;        // the unquantised chunks, ordered by token, line, chunk: four half-precision numbers each
    int64_t offset;             // of the first token within its group
    Field before;               // number of unquantised chunks before each token: 32-bit words; made on demand
};

struct Page {
    Side side[2];    // by role
    int64_t tokens;
    int64_t offset;  // of the first token within its group
};

struct Problem {
    const Coder *key, *value;
    const Page* pages;
    int64_t page_count, tokens;
    int batch, q_heads, kv_heads, q_tokens, dim;
    const float* q;  // (batch, q_heads, q_tokens, dim)
    float scale;             // of the scores
    float value_gain;        // of the values
    float softcap;           // 0: none
    const uint8_t* mask;     // 1 where a query sees a key, or null; tokens lie next to each other
    int64_t mask_batch, mask_head, mask_query;  // strides
    bool placed;             // query i sees no key after start + i
    int64_t start;
    int64_t window;          // 0: none; else query i sees no key before start + i - window + 1
    int limbs;               // 8-bit limbs of a query and of a weight: 1, 2 or 3; not used by the portable loops
    float* out;              // (batch, q_heads, q_tokens, dim)
    float* lse;              // (batch, q_heads, q_tokens)
    int threads;
};

// Coded vectors of consecutive tokens of a line, up to UNIT unless up to GROUP is stated.
struct Unit {
    const Side* side;
    int64_t line, token;
    const uint8_t* codes;  // of the first
    int count;
};

void attend_portable(const Problem&);
void attend_neon(const Problem&);
void attend_dotprod(const Problem&);
void attend_avx2(const Problem&);
void attend_avxvnni(const Problem&);
void attend_avx512(const Problem&);

// Unquantised keys and values in float or bfloat16: the numbers of a vector are contiguous; strides in bytes.
struct Exact {
    const uint8_t *k, *v;
    bool bfloat;
    int64_t k_batch, k_head, k_token, v_batch, v_head, v_token;
};

// Attention over unquantised keys and values, for at most TILE rows per key head; `key`, `value` and `pages` are not used.
void attend_exact_portable(const Problem&, const Exact&);
void attend_exact_avx2(const Problem&, const Exact&);
void attend_exact_avx512(const Problem&, const Exact&);

// Packed vectors to decode: those of side[role] of one page.
struct Vectors {
    const Coder* coder;
    const Page* page;
    Role role;
    int batch, heads;
    int dim;
    float gain;
    float* out;  // (lines, tokens, dim)
    int threads;
};

void decode_portable(const Vectors&);
void decode_avx2(const Vectors&);
void decode_avx512(const Vectors&);

}  // namespace tessera
