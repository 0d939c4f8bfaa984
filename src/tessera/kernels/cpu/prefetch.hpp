// Codes are fetched before they are needed.

namespace {

constexpr int AHEAD = 4;  // units

inline void prefetch(const uint8_t* from, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch(reinterpret_cast<const char*>(from + i), _MM_HINT_T0);
}

}  // namespace
