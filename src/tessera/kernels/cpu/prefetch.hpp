// Prefetches codes a few units before they are read.

namespace {

constexpr int AHEAD = 4;  // units

inline void prefetch(const uint8_t* from, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i);
}

}  // namespace
