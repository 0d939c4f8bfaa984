// Encodes whole vectors: divides them by their scales, searches the codewords, and packs the codes.
#include <algorithm>
#include <cstring>
#include <vector>

#include "clones.hpp"
#include "nearest.hpp"
#include "packing.hpp"

namespace tessera {
namespace {

TESSERA_CLONES void divide(const float* x, int64_t dim, float scale, float* to) {
    for (int64_t c = 0; c < dim; ++c) to[c] = x[c] / scale;
}

}  // namespace

void vector_codes(const Index& index, Nearest nearest, const VectorCodes& s, int64_t begin, int64_t end) {
    constexpr int64_t MANY = 512;  // chunks that are searched together
    const int64_t chunks = (s.dim + 3) / 4, bytes = packed_bytes(chunks, s.bits), some = std::max<int64_t>(1, MANY / chunks);
    std::vector<float> x(size_t(some * chunks * 4), 0.0f);
    std::vector<int32_t> codes(size_t(some * chunks));
    std::vector<int64_t> row(static_cast<size_t>(some));
    for (int64_t at = begin; at < end;) {
        int64_t count = 0;
        for (; at < end && count < some; ++at) {
            if (s.scale[at] > 0) {
                divide(s.x + at * s.dim, s.dim, s.scale[at], &x[size_t(count * chunks * 4)]);
                row[size_t(count++)] = at;
            } else {
                std::memset(s.out + at * bytes, 0, size_t(bytes));  // any code is valid, and the search is slow at the origin
            }
        }
        nearest({&index, x.data(), 4, 1, count * chunks, codes.data(), nullptr});
        for (int64_t i = 0; i < count; ++i) pack_words(&codes[size_t(i * chunks)], chunks, s.bits, s.out + row[size_t(i)] * bytes);
    }
}

}  // namespace tessera
