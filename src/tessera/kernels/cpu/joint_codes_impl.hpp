// The encoding of joint_codes.hpp. Included after nearest_impl.hpp and feedback.hpp, which it uses.

#include "centre.hpp"
#include "half.hpp"
#include "rotation.hpp"

namespace {

using tessera::JointCodes;

// A channel is narrowed if its root mean square exceeds WIDE times that of the median channel, by at most 2^MOST.
constexpr float WIDE = 4.0f, MOST = 15.0f, HALF_MAX = 65504.0f;
// The byte of the scale 1, and the number of steps per octave.
constexpr float ONE = 128.0f, STEPS = 8.0f;

// Rounds a mean to the half word that stores it: the low four bits are dropped for an exponent, never rounding to infinity.
inline uint16_t mean_word(float mean) {
    const uint16_t bits = to_half(mean < -HALF_MAX ? -HALF_MAX : mean > HALF_MAX ? HALF_MAX : mean);
    return uint16_t(((bits & 0x7fff) < 0x7bf0 ? bits + 8 : bits) & 0xfff0);
}

// Writes the words of a group of a line's tokens.
inline void centre_group(const JointCodes& s, int64_t line, int64_t group) {
    const int64_t groups = (s.tokens + tessera::GROUP - 1) / tessera::GROUP, begin = group * tessera::GROUP;
    const int count = int(std::min<int64_t>(tessera::GROUP, s.tokens - begin)), dim = s.dim;
    const float* x = s.x + (line * s.tokens + begin) * dim;
    uint16_t* word = s.centre + (line * groups + group) * dim;
    float mean[tessera::MAX_DIM] = {}, spread[tessera::MAX_DIM] = {}, ordered[tessera::MAX_DIM];
    for (int t = 0; t < count; ++t)
        for (int c = 0; c < dim; ++c) mean[c] += x[t * dim + c];
    for (int c = 0; c < dim; ++c) {
        word[c] = mean_word(mean[c] / float(count));
        mean[c] = half_to_float(word[c]);
    }
    for (int t = 0; t < count; ++t)
        for (int c = 0; c < dim; ++c) {
            const float apart = x[t * dim + c] - mean[c];
            spread[c] += apart * apart;
        }
    for (int c = 0; c < dim; ++c) spread[c] = std::sqrt(spread[c] / float(count));
    std::memcpy(ordered, spread, sizeof(float) * size_t(dim));
    float* const middle = ordered + (dim - 1) / 2;
    std::nth_element(ordered, middle, ordered + dim);
    // A group in which most channels are constant has no median width to compare with, so it is not narrowed.
    if (!(*middle > 0)) return;
    const float typical = std::max(*middle, std::numeric_limits<float>::min());
    for (int c = 0; c < dim; ++c) {
        const float ratio = spread[c] / typical;
        if (ratio > WIDE) word[c] |= uint16_t(std::min(std::floor(std::log2(ratio)), MOST));
    }
}

// The metric R·diag(weights)·Rᵀ of errors after the rotation. With R a Kronecker product of a DCT and a Hadamard matrix of size n,
// entry (a, i), (b, j) is the sum over k of dct_ak · dct_bk · u_k[i xor j], u_k the transform of the weights' k-th part: the signs
// cancel, and rows of a Hadamard matrix multiply to the row of the numbers' xor.
inline void metric_of(const tessera::Rotation& r, const float* weights, int dim, float* metric) {
    if (!r.signs) {
        std::memset(metric, 0, sizeof(float) * size_t(dim) * size_t(dim));
        for (int c = 0; c < dim; ++c) metric[c * dim + c] = weights[c];
        return;
    }
    const int odd = r.odd, size = dim / odd;
    float u[tessera::MAX_DIM], joint[tessera::MAX_DIM];
    const float norm = 1.0f / std::sqrt(float(size));
    for (int c = 0; c < dim; ++c) u[c] = weights[c] * norm;
    hadamard(u, odd, size);
    for (int a = 0; a < odd; ++a)
        for (int b = 0; b < odd; ++b) {
            for (int i = 0; i < size; ++i) joint[i] = 0;
            for (int k = 0; k < odd; ++k) {
                const float share = odd == 1 ? 1.0f : r.dct[a * odd + k] * r.dct[b * odd + k];
                for (int i = 0; i < size; ++i) joint[i] += share * u[k * size + i];
            }
            for (int i = 0; i < size; ++i)
                for (int j = 0; j < size; ++j) metric[(a * size + i) * dim + b * size + j] = joint[i ^ j];
        }
}

// The inverse of a symmetric 4 x 4 matrix, by its Cholesky factor. Returns whether the matrix is positive.
inline bool invert(const float* from, int stride, double (*to)[4]) {
    double root[4][4] = {}, back[4][4] = {};
    for (int i = 0; i < 4; ++i)
        for (int j = 0; j <= i; ++j) {
            double rest = from[j * stride + i];
            for (int k = 0; k < j; ++k) rest -= root[i][k] * root[j][k];
            if (i == j && !(rest > 0)) return false;
            root[i][j] = i == j ? std::sqrt(rest) : rest / root[j][j];
        }
    for (int j = 0; j < 4; ++j)
        for (int i = j; i < 4; ++i) {
            double rest = i == j ? 1.0 : 0.0;
            for (int k = j; k < i; ++k) rest -= root[i][k] * back[k][j];
            back[i][j] = rest / root[i][i];
        }
    for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 4; ++j) {
            to[i][j] = 0;
            for (int k = std::max(i, j); k < 4; ++k) to[i][j] += back[k][i] * back[k][j];
        }
    return true;
}

// The feedback of codecs/feedback.py in the blocks above the diagonal: the metric is L·D·Lᵀ in blocks of a chunk, and this is Lᵀ.
// The rows of a block are those of the remaining metric times the inverse of its diagonal block. Returns whether the matrix
// exists.
inline bool feedback_matrix(const tessera::Rotation& r, const float* weights, int dim, float* matrix) {
    metric_of(r, weights, dim, matrix);
    float rest[4][tessera::MAX_DIM];
    for (int first = 0; first < dim; first += 4) {
        double inverse[4][4];
        if (!invert(matrix + first * dim + first, dim, inverse)) return false;
        for (int i = 0; i < 4; ++i) std::memcpy(rest[i], matrix + (first + i) * dim, sizeof(float) * size_t(dim));
        for (int i = 0; i < 4; ++i) {
            float* const row = matrix + (first + i) * dim;
            const float a = float(inverse[i][0]), b = float(inverse[i][1]), c = float(inverse[i][2]), d = float(inverse[i][3]);
            for (int j = first + 4; j < dim; ++j) row[j] = a * rest[0][j] + b * rest[1][j] + c * rest[2][j] + d * rest[3][j];
        }
        const float* const rows = matrix + first * dim;
        for (int i = first + 4; i < dim; ++i) {
            float* const row = matrix + i * dim;
            const float a = rest[0][i], b = rest[1][i], c = rest[2][i], d = rest[3][i];
            for (int j = i / 4 * 4; j < dim; ++j) row[j] -= a * rows[j] + b * rows[dim + j] + c * rows[2 * dim + j] + d * rows[3 * dim + j];
        }
    }
    return true;
}

// Returns the nearest byte for a non-negative scale; 0 for 0.
inline uint8_t scale_byte(float scale) {
    if (!(scale > 0)) return 0;
    const float code = std::nearbyint(std::log2(std::max(scale, 1e-30f)) * STEPS) + ONE;
    return uint8_t(code < 1 ? 1.0f : code > 255 ? 255.0f : code);
}

// Encodes `count` of a line's tokens, all of one group, beginning at `begin`.
inline void encode_block(const JointCodes& s, const float* matrix, int64_t line, int64_t begin, int count) {
    const int dim = s.dim, chunks = dim / 4;
    tessera::Memory memory;
    const SideBySide target = side_by_side(memory, dim, count);
    alignas(64) float mean[tessera::MAX_DIM], factor[tessera::MAX_DIM], y[tessera::MAX_DIM];
    if (s.centre) {
        const int64_t groups = (s.tokens + tessera::GROUP - 1) / tessera::GROUP;
        read_centre(reinterpret_cast<const uint8_t*>(s.centre + (line * groups + begin / tessera::GROUP) * dim), dim, mean, factor);
    }
    uint8_t* const scale = s.scale + line * s.tokens + begin;
    for (int j = 0; j < count; ++j) {
        const float* x = s.x + (line * s.tokens + begin + j) * dim;
        if (s.centre)
            for (int c = 0; c < dim; ++c) y[c] = (x[c] - mean[c]) / factor[c];
        else std::memcpy(y, x, sizeof(float) * size_t(dim));
        rotate(s.book->rotation, y);
        float square = 0;
        for (int c = 0; c < dim; ++c) square += y[c] * y[c];
        scale[j] = scale_byte(std::sqrt(square / float(dim)));
        // Vectors of zeros skip the search, which is slow near the origin; any code is valid for them.
        if (const float by = s.book->scale[scale[j]]; scale[j])
            for (int c = 0; c < dim; ++c) target[c][j] = y[c] / by;
        else
            for (int c = 0; c < dim; ++c) target[c][j] = 1.0f;
    }
    int32_t* const codes = memory.take<int32_t>(size_t(count) * size_t(chunks));
    if (matrix) feed_codes(*s.index, matrix, dim, count, target, codes, memory);
    else {
        int32_t code[BLOCK];
        for (int chunk = 0; chunk < chunks; ++chunk) {
            search({s.index, target[4 * chunk], 1, BLOCK, count, code, nullptr});
            for (int j = 0; j < count; ++j) codes[j * chunks + chunk] = code[j];
        }
    }
    const int64_t bytes = tessera::packed_bytes(chunks, s.book->bits);
    uint8_t* out = s.codes + (line * s.tokens + begin) * bytes;
    for (int j = 0; j < count; ++j, out += bytes) {
        if (scale[j]) tessera::pack_words(codes + j * chunks, chunks, s.book->bits, out);
        else std::memset(out, 0, size_t(bytes));
    }
}

inline bool encode_joint(const JointCodes& s) {
    const int64_t groups = s.centre ? (s.tokens + tessera::GROUP - 1) / tessera::GROUP : 0, square = int64_t(s.dim) * s.dim;
    const int64_t matrices = s.weights ? s.lines : 0;
    tessera::Memory memory;
    float* const matrix = memory.take<float>(size_t(matrices * square));
    std::atomic<bool> positive{true};
    auto& threads = tessera::Threads::get();
    threads.run(matrices + s.lines * groups, s.threads, [&](int64_t i, int) {
        if (i >= matrices) centre_group(s, (i - matrices) / groups, (i - matrices) % groups);
        else if (!feedback_matrix(s.book->rotation, s.weights + i * s.dim, s.dim, matrix + i * square)) positive = false;
    });
    if (!positive) return false;
    // Few tokens are split into smaller parts, so that no thread waits long for another.
    const int64_t part = s.lines * s.tokens < 4 * BLOCK * s.threads ? BLOCK / 2 : BLOCK, parts = (s.tokens + part - 1) / part;
    threads.run(s.lines * parts, s.threads, [&](int64_t i, int) {
        const int64_t line = i / parts, begin = i % parts * part;
        encode_block(s, matrices ? matrix + line * square : nullptr, line, begin, int(std::min(part, s.tokens - begin)));
    });
    return true;
}

}  // namespace
