// Copies unquantised vectors between the tokens of a step, the rings and the encoder. See paged.hpp.
#include "paged.hpp"

#include <algorithm>
#include <cstring>

#include "numbers.hpp"
#include "threads.hpp"

namespace tessera {

void collect_groups(const Paged& p, const int32_t* request, const int32_t* number, int64_t count, float* keys, float* values) {
    Threads::get().run(count * p.kv_heads, p.threads, [&](int64_t task, int) {
        const int64_t i = task / p.kv_heads, head = task % p.kv_heads, r = request[i];
        const int64_t begin = int64_t(p.lengths[r]) - (p.first[r + 1] - p.first[r]);  // the first token of the step
        for (int64_t t = 0; t < GROUP; ++t) {
            const int64_t at = int64_t(number[i]) * GROUP + t, to = (task * GROUP + t) * p.dim;
            const uint8_t *k = exact_key(p, r, head, at, begin), *v = exact_value(p, r, head, at, begin);
            to_floats(k, p.type, p.dim, keys + to);
            to_floats(v, p.type, p.dim, values + to);
        }
    });
}

void fill_rings(const Paged& p) {
    const size_t bytes = size_t(p.dim) * bytes_of(p.type);
    for (int64_t r = 0; r < p.requests; ++r) {
        const int64_t end = p.lengths[r], count = std::min<int64_t>(p.first[r + 1] - p.first[r], p.ring_tokens);
        for (int64_t at = end - count; at < end; ++at)
            for (int64_t head = 0; head < p.kv_heads; ++head) {
                const int64_t token = p.first[r + 1] - (end - at);
                uint8_t* to = p.ring + int64_t(p.ring_table[r * p.ring_width]) * p.ring_block + head * p.ring_head + at % p.ring_tokens * p.ring_token;
                std::memcpy(to, p.keys.data + token * p.keys.token + head * p.keys.head, bytes);
                std::memcpy(to + p.ring_value, p.values.data + token * p.values.token + head * p.values.head, bytes);
            }
    }
}

}  // namespace tessera
