#include "nearest.hpp"

#include <algorithm>
#include <cmath>

namespace tessera {
namespace {

// p̄ · q
inline void conjugate_product(const float* p, const float* q, float* out) {
    out[0] = p[0] * q[0] + p[1] * q[1] + p[2] * q[2] + p[3] * q[3];
    out[1] = p[0] * q[1] - p[1] * q[0] - p[2] * q[3] + p[3] * q[2];
    out[2] = p[0] * q[2] + p[1] * q[3] - p[2] * q[0] - p[3] * q[1];
    out[3] = p[0] * q[3] - p[1] * q[2] + p[2] * q[1] - p[3] * q[0];
}

// In closed form, see quaternion.py.
inline int nearest_unit(const float* x) {
    float sum = 0, most = -1;
    int axis = 0, signs = 0;
    for (int i = 0; i < 4; ++i) {
        const float a = std::fabs(x[i]);
        sum += a;
        if (a > most) most = a, axis = i;
        signs = 2 * signs + (x[i] < 0);
    }
    return sum * 0.5f > most ? 8 + signs : 2 * axis + (x[axis] < 0);
}

// Brings v to v0 >= v1 >= 0, v0 >= |v2|; returns which of the twelve rotations did it.
inline int canonical_rotation(float* v) {
    int shift = 0;
    if (std::fabs(v[1]) > std::fabs(v[shift])) shift = 1;
    if (std::fabs(v[2]) > std::fabs(v[shift])) shift = 2;
    const float a = v[shift], b = v[(shift + 1) % 3], c = v[(shift + 2) % 3];
    const int flips = a < 0 ? (b < 0 ? 3 : 2) : (b < 0 ? 1 : 0);
    v[0] = flips & 2 ? -a : a;
    v[1] = flips == 1 || flips == 3 ? -b : b;
    v[2] = flips == 1 || flips == 2 ? -c : c;
    return shift * 4 + flips;
}

#if defined(TESSERA_X86) && defined(__GNUC__) && !defined(__clang__)
__attribute__((target_clones("default", "avx2", "avx512f")))
#endif
int64_t best_of_all(const float* const words[5], int64_t count, const float* x) {
    // Scores of a block, then their maximum: both loops vectorise.
    constexpr int64_t BLOCK = 256;
    float most = -3.4e38f;
    int64_t where = 0;
    for (int64_t a = 0; a < count; a += BLOCK) {
        const int64_t n = std::min(BLOCK, count - a);
        float score[BLOCK];
        for (int64_t i = 0; i < n; ++i)
            score[i] = x[0] * words[0][a + i] + x[1] * words[1][a + i] + x[2] * words[2][a + i] + x[3] * words[3][a + i] - words[4][a + i];
        float lane[16];
        for (int j = 0; j < 16; ++j) lane[j] = -3.4e38f;
        for (int64_t i = n; i < (n + 15) / 16 * 16; ++i) score[i] = -3.4e38f;
        for (int64_t i = 0; i < n; i += 16)
            for (int j = 0; j < 16; ++j) lane[j] = score[i + j] > lane[j] ? score[i + j] : lane[j];
        const float top = *std::max_element(lane, lane + 16);
        if (top > most) {
            most = top;
            where = a + (std::find(score, score + n, top) - score);
        }
    }
    return where;
}

}  // namespace

void Index::nearest(const float* x, int64_t n, int32_t* code) const {
    const float* all[5] = {words[0].data(), words[1].data(), words[2].data(), words[3].data(), words[4].data()};
    for (int64_t at = 0; at < n; ++at, x += 4) {
        const int p = nearest_unit(x);
        float z[4];
        conjugate_product(units[p], x, z);
        const int turn = conjugations ? canonical_rotation(z + 1) : 0;
        float place[4];
        int64_t cube = 0;
        for (int i = 0; i < 4; ++i) {
            place[i] = z[i] / root;
            const float corner = std::min(std::max(std::floor(place[i]), float(origin[i])), float(origin[i] + dims[i] - 1));
            cube = cube * dims[i] + (int64_t(corner) - origin[i]);
            place[i] = std::min(std::max(place[i] - corner, 0.0f), 1.0f);
        }
        int32_t link = roots[cube];
        while (link < -1) {
            int part = 0;
            for (int i = 0; i < 4; ++i) {
                const bool half = place[i] >= 0.5f;
                place[i] = std::min(std::max(2 * place[i] - float(half), 0.0f), 1.0f);
                part = 2 * part + half;
            }
            link = children[size_t(-2 - link) * 16 + part];
        }
        const float square = z[0] * z[0] + z[1] * z[1] + z[2] * z[2] + z[3] * z[3];
        int64_t product_number;
        if (link < 0 || square > radius * radius) {
            product_number = best_of_all(all, int64_t(words[0].size()), x);
        } else {
            const float* point = &points[size_t(first[link]) * 5];
            float most = -3.4e38f;
            int best = 0;
            for (int i = 0; i < count[link]; ++i, point += 5) {
                const float score = point[0] * z[0] + point[1] * z[1] + point[2] * z[2] + point[3] * z[3] - point[4];
                if (score > most) most = score, best = i;
            }
            const int found = codes[first[link] + best];
            int s = found / 24, unit = found % 24;
            if (conjugations) {
                // x = q_p·g·z·ḡ, so the codeword for x is q_p·(g·q_unit·ḡ)·(g·s·ḡ).
                const int g = turn_unit[turn];
                unit = product[product[g][unit]][inverse[g]];
                s = s / 12 * 12 + unit_rotation[product[g][rotation_unit[s % 12]]];
            }
            product_number = int64_t(s) * 24 + product[p][unit];
        }
        code[at] = number[size_t(product_number)];
    }
}

}  // namespace tessera
