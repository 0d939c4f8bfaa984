// The product of a unit and a secondary quaternion that is nearest to a chunk's direction, see codecs/hqmq.py: only the
// secondaries are searched, for the best unit has a closed form.
#include <algorithm>

#include "clones.hpp"
#include "nearest.hpp"
#include "unit.hpp"

namespace tessera {
namespace {

// Chunks that are worked on together, component by component: loops over them become vector instructions.
constexpr int CHUNKS = 32;

TESSERA_CLONES void search(const float* turns, int size, const float* from, int count, int32_t* code, float* projection) {
    alignas(64) float x[4][CHUNKS] = {}, best[CHUNKS];
    alignas(64) int32_t found[CHUNKS] = {};
    for (int j = 0; j < count; ++j)
        for (int i = 0; i < 4; ++i) x[i][j] = from[4 * j + i];
    for (float& value : best) value = -1.0f;
    for (int s = 0; s < size; ++s) {
        const float* t = turns + 16 * s;
        for (int j = 0; j < CHUNKS; ++j) {
            float a[4];
            for (int i = 0; i < 4; ++i) {
                const float* row = t + 4 * i;
                a[i] = std::fabs(row[0] * x[0][j] + row[1] * x[1][j] + row[2] * x[2][j] + row[3] * x[3][j]);
            }
            const float p = a[0] > a[1] ? a[0] : a[1], q = a[2] > a[3] ? a[2] : a[3], axis = p > q ? p : q;
            const float halves = (a[0] + a[1] + a[2] + a[3]) * 0.5f, most = axis > halves ? axis : halves;
            const bool better = most > best[j];
            best[j] = better ? most : best[j];
            found[j] = better ? s : found[j];
        }
    }
    for (int j = 0; j < count; ++j) {
        const float* t = turns + 16 * found[j];
        float y[4];
        for (int i = 0; i < 4; ++i) y[i] = t[4 * i] * x[0][j] + t[4 * i + 1] * x[1][j] + t[4 * i + 2] * x[2][j] + t[4 * i + 3] * x[3][j];
        code[j] = 24 * found[j] + nearest_unit(y[0], y[1], y[2], y[3]).number;
        projection[j] = best[j];
    }
}

}  // namespace

void nearest_direction(const float* turns, int size, const float* x, int64_t n, int32_t* code, float* projection) {
    for (int64_t begin = 0; begin < n; begin += CHUNKS)
        search(turns, size, x + 4 * begin, int(std::min<int64_t>(CHUNKS, n - begin)), code + begin, projection + begin);
}

}  // namespace tessera
