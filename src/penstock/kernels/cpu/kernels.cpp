// Kernels for processors: plain C ABI, no Python and no torch headers, loaded by ctypes.
//
// Every function has a torch twin in penstock/kernels that the tests compare it with. Loops are written for the
// compiler's vectoriser; this file is compiled once for each level of the instruction set, and the loader picks the
// library that the processor can run. Nothing is allocated.

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>

namespace {

constexpr int kMaxDim = 256;  // head_dim; the Python side checks it
constexpr int kTile = 16;     // keys whose scores are computed before the running maximum is looked at
constexpr int kMaxRows = 8;   // query rows that share one pass over the keys

struct bf16 {
    uint16_t bits;
};

inline float widen(float x) { return x; }

inline float widen(bf16 x) {
    uint32_t wide = static_cast<uint32_t>(x.bits) << 16;
    float result;
    std::memcpy(&result, &wide, sizeof result);
    return result;
}

inline void narrow(float x, float &out) { out = x; }

inline void narrow(float x, bf16 &out) {  // to nearest, ties to even; NaN stays NaN
    uint32_t wide;
    std::memcpy(&wide, &x, sizeof wide);
    uint32_t rounded = (wide + 0x7fffu + ((wide >> 16) & 1u)) >> 16;
    out.bits = static_cast<uint16_t>(x == x ? rounded : 0x7fc0u);
}

// e^x for x <= 0 without a call or a branch, so that loops over it vectorise: 2^n times a polynomial for 2^f, f in
// [-0.5, 0.5] (Taylor of degree 6, relative error below 1e-7). Below -87 it is as good as zero; -inf gives zero.
inline float exp_nonpositive(float x) {
    const float clamped = x < -87.0f ? -87.0f : x;
    const float z = clamped * 1.44269504088896f;
    const float n = std::floor(z + 0.5f);
    const float f = (z - n) * 0.693147180559945f;
    float p = 1.0f / 720;
    p = p * f + 1.0f / 120;
    p = p * f + 1.0f / 24;
    p = p * f + 1.0f / 6;
    p = p * f + 0.5f;
    p = p * f + 1.0f;
    p = p * f + 1.0f;
    const int32_t exponent = (static_cast<int32_t>(n) + 127) << 23;
    float power;
    std::memcpy(&power, &exponent, sizeof power);
    return x < -87.0f ? 0.0f : p * power;
}

struct Cache {
    int64_t num_blocks, block_size, dim;
};

// Attention of `rows` query rows of one kv head over keys [first, context): online softmax (Milakov & Gimelshein 2018),
// a tile of keys at a time. q, out: row r starts at offsets[r]. keys, values: the head's blocks, [num_blocks,
// block_size, dim]. DIM and ROWS: head_dim and rows where they are known at compile time, so that the sums stay in
// registers, else 0.
template <int DIM, int ROWS, typename T>
void attend(const T *__restrict q, T *__restrict out, const int64_t *offsets,
            int row_count, const T *__restrict keys, const T *__restrict values,
            const int64_t *table, Cache cache, int64_t first, int64_t context, float scale) {
    const int rows = ROWS ? ROWS : row_count;
    const int dim = DIM ? DIM : static_cast<int>(cache.dim);
    constexpr int kSize = DIM ? DIM : kMaxDim, kRows = ROWS ? ROWS : kMaxRows;
    alignas(64) float query[kRows][kSize], sum[kRows][kSize], wide[kSize];
    alignas(64) float score[kRows][kTile];
    float highest[kRows], total[kRows];
    for (int r = 0; r < rows; r++) {
        highest[r] = -std::numeric_limits<float>::infinity();
        total[r] = 0;
#pragma omp simd
        for (int d = 0; d < dim; d++) {
            query[r][d] = widen(q[offsets[r] + d]) * scale;
            sum[r][d] = 0;
        }
    }
    for (int64_t start = first; start < context;) {
        const int64_t block = start / cache.block_size, inside = start - block * cache.block_size;
        int64_t end = (block + 1) * cache.block_size < context ? (block + 1) * cache.block_size : context;
        if (end - start > kTile) end = start + kTile;
        const int count = static_cast<int>(end - start);
        const int64_t base = (table[block] * cache.block_size + inside) * dim;
        start = end;
        for (int j = 0; j < count; j++) {
#pragma omp simd
            for (int d = 0; d < dim; d++) wide[d] = widen(keys[base + j * dim + d]);
            for (int r = 0; r < rows; r++) {
                float dot = 0;
#pragma omp simd reduction(+ : dot)
                for (int d = 0; d < dim; d++) dot += query[r][d] * wide[d];
                score[r][j] = dot;
            }
        }
        for (int r = 0; r < rows; r++) {
            float top = highest[r];
            for (int j = 0; j < count; j++) top = score[r][j] > top ? score[r][j] : top;
            for (int j = count; j < kTile; j++) score[r][j] = -std::numeric_limits<float>::infinity();
            const float shrink = exp_nonpositive(highest[r] - top);
            highest[r] = top;
            float added = 0;
#pragma omp simd reduction(+ : added)
            for (int j = 0; j < kTile; j++) {
                score[r][j] = exp_nonpositive(score[r][j] - top);
                added += score[r][j];
            }
            total[r] = total[r] * shrink + added;
            if (shrink != 1.0f) {
#pragma omp simd
                for (int d = 0; d < dim; d++) sum[r][d] *= shrink;
            }
        }
        for (int j = 0; j < count; j++) {
#pragma omp simd
            for (int d = 0; d < dim; d++) wide[d] = widen(values[base + j * dim + d]);
            for (int r = 0; r < rows; r++) {
                const float weight = score[r][j];
#pragma omp simd
                for (int d = 0; d < dim; d++) sum[r][d] += weight * wide[d];
            }
        }
    }
    for (int r = 0; r < rows; r++) {
        const float inverse = 1.0f / total[r];
#pragma omp simd
        for (int d = 0; d < dim; d++) narrow(sum[r][d] * inverse, out[offsets[r] + d]);
    }
}

template <typename T>
void attend_rows(const T *q, T *out, const int64_t *offsets, int rows, const T *keys, const T *values,
                 const int64_t *table, Cache cache, int64_t first, int64_t context, float scale) {
    auto *chosen = attend<0, 0, T>;
    if (cache.dim == 64) chosen = rows == 4 ? attend<64, 4, T> : rows == 1 ? attend<64, 1, T> : attend<64, 0, T>;
    if (cache.dim == 128) chosen = rows == 4 ? attend<128, 4, T> : rows == 1 ? attend<128, 1, T> : attend<128, 0, T>;
    chosen(q, out, offsets, rows, keys, values, table, cache, first, context, scale);
}

inline void rms_norm_row(const bf16 *__restrict x, const bf16 *__restrict weight, bf16 *__restrict out, int64_t n,
                         float eps) {
    float square = 0;
#pragma omp simd reduction(+ : square)
    for (int64_t i = 0; i < n; i++) square += widen(x[i]) * widen(x[i]);
    const float inverse = 1.0f / std::sqrt(square / static_cast<float>(n) + eps);
#pragma omp simd
    for (int64_t i = 0; i < n; i++) narrow(widen(x[i]) * inverse * widen(weight[i]), out[i]);
}

template <typename T>
void paged(const T *q, T *out, const T *keys, const T *values, const int64_t *tables, int64_t table_width,
           const int64_t *contexts, int64_t batch, int64_t length, int64_t heads, int64_t kv_heads, Cache cache,
           float scale, int64_t window) {
    const int64_t repeats = heads / kv_heads, head_size = cache.num_blocks * cache.block_size * cache.dim;
#pragma omp parallel for collapse(3) schedule(dynamic, 4)
    for (int64_t b = 0; b < batch; b++) {
        for (int64_t i = 0; i < length; i++) {
            for (int64_t h = 0; h < kv_heads; h++) {
                const int64_t context = contexts[b] - length + i + 1;
                const int64_t first = window > 0 && context > window ? context - window : 0;
                int64_t offsets[kMaxRows];
                for (int64_t done = 0; done < repeats; done += kMaxRows) {
                    const int rows = static_cast<int>(repeats - done < kMaxRows ? repeats - done : kMaxRows);
                    for (int r = 0; r < rows; r++) {
                        offsets[r] = ((b * length + i) * heads + h * repeats + done + r) * cache.dim;
                    }
                    attend_rows(q, out, offsets, rows, keys + h * head_size, values + h * head_size,
                                tables + b * table_width, cache, first, context, scale);
                }
            }
        }
    }
}

}  // namespace

extern "C" {

// Changes whenever a signature below does; the Python side refuses a library of another version.
int penstock_kernels_version() { return 1; }

// q, out: [batch * length, heads, dim] contiguous. keys, values: [kv_heads, num_blocks, block_size, dim] contiguous.
// tables: [batch, table_width] block ids. contexts: [batch] tokens that the last query of each run sees. window: 0 for
// none. dim <= 256.
void penstock_attention_f32(const float *q, float *out, const float *keys, const float *values, const int64_t *tables,
                            int64_t table_width, const int64_t *contexts, int64_t batch, int64_t length, int64_t heads,
                            int64_t kv_heads, int64_t num_blocks, int64_t block_size, int64_t dim, float scale,
                            int64_t window) {
    paged(q, out, keys, values, tables, table_width, contexts, batch, length, heads, kv_heads,
          Cache{num_blocks, block_size, dim}, scale, window);
}

void penstock_attention_bf16(const uint16_t *q, uint16_t *out, const uint16_t *keys, const uint16_t *values,
                             const int64_t *tables, int64_t table_width, const int64_t *contexts, int64_t batch,
                             int64_t length, int64_t heads, int64_t kv_heads, int64_t num_blocks, int64_t block_size,
                             int64_t dim, float scale, int64_t window) {
    paged(reinterpret_cast<const bf16 *>(q), reinterpret_cast<bf16 *>(out), reinterpret_cast<const bf16 *>(keys),
          reinterpret_cast<const bf16 *>(values), tables, table_width, contexts, batch, length, heads, kv_heads,
          Cache{num_blocks, block_size, dim}, scale, window);
}

// x: rows of n, `stride` apart; weight: [n]; out: [rows, n] contiguous.
void penstock_rms_norm_bf16(const uint16_t *x, int64_t stride, const uint16_t *weight, uint16_t *out, int64_t rows,
                            int64_t n, float eps) {
#pragma omp parallel for if (rows * n > 16384)
    for (int64_t r = 0; r < rows; r++) {
        rms_norm_row(reinterpret_cast<const bf16 *>(x + r * stride), reinterpret_cast<const bf16 *>(weight),
                     reinterpret_cast<bf16 *>(out + r * n), n, eps);
    }
}
}
