// The product of a unit and a secondary quaternion that is nearest to a chunk, see kernels/directions.py: only the
// secondaries are tried, for the best unit has a closed form.
#include <algorithm>
#include <cstring>
#include <limits>

#include "clones.hpp"
#include "nearest.hpp"
#include "unit.hpp"

namespace tessera {
namespace {

// Chunks that are processed together, component by component, so that loops over them are vectorised.
constexpr int CHUNKS = 32;

TESSERA_CLONES void search(const float* matrices, int size, const float* from, int count, int32_t* code, float* projection) {
    alignas(64) float x[4][CHUNKS] = {}, rotated[4][CHUNKS] = {}, best[CHUNKS];
    alignas(64) int32_t found[CHUNKS] = {};
    for (int j = 0; j < count; ++j)
        for (int i = 0; i < 4; ++i) x[i][j] = from[4 * j + i];
    for (float& value : best) value = -std::numeric_limits<float>::infinity();
    for (int s = 0; s < size; ++s) {
        const float* t = matrices + 16 * s;
        for (int j = 0; j < CHUNKS; ++j) {
            float y[4], a[4];
            for (int i = 0; i < 4; ++i) {
                const float* row = t + 4 * i;
                y[i] = row[0] * x[0][j] + row[1] * x[1][j] + row[2] * x[2][j] + row[3] * x[3][j];
                a[i] = std::fabs(y[i]);
            }
            const float p = a[0] > a[1] ? a[0] : a[1], q = a[2] > a[3] ? a[2] : a[3], axis = p > q ? p : q;
            const float other = (a[0] + a[1] + a[2] + a[3]) * 0.5f, most = axis > other ? axis : other;
            const bool better = most > best[j];
            best[j] = better ? most : best[j];
            found[j] = better ? s : found[j];
            for (int i = 0; i < 4; ++i) rotated[i][j] = better ? y[i] : rotated[i][j];
        }
    }
    for (int j = 0; j < CHUNKS; ++j) found[j] = 24 * found[j] + nearest_unit(rotated[0][j], rotated[1][j], rotated[2][j], rotated[3][j]).number;
    std::memcpy(code, found, sizeof(int32_t) * size_t(count));
    std::memcpy(projection, best, sizeof(float) * size_t(count));
}

}  // namespace

void nearest_product(const float* matrices, int size, const float* x, int64_t n, int32_t* code, float* projection) {
    for (int64_t begin = 0; begin < n; begin += CHUNKS)
        search(matrices, size, x + 4 * begin, int(std::min<int64_t>(CHUNKS, n - begin)), code + begin, projection + begin);
}

}  // namespace tessera
