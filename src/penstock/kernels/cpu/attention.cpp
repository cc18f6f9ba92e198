// Attention of short runs over the blocks of the cache, read where they lie.

#include "attention.h"

#include <limits>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace penstock {
namespace {

constexpr int kTile = 16;     // keys whose scores are computed before the running maximum is looked at
constexpr int kMaxRows = 8;   // query rows that share one pass over the keys
constexpr int kAhead = 2;     // tiles from a fetch to its use: a cache miss takes longer than a tile

constexpr int padded(int dim) { return (dim + 15) / 16 * 16; }

// score[j] = query . keys[j] for the 16 keys of a tile, `stride` apart and zero beyond the head's size. The compiler would
// add up the lanes of every sum on its own; here 16 sums are added up together, in a tree of shuffles.
#ifdef __AVX512F__
inline void dot_tile(const float *query, const float *keys, int dim, int stride, float *score) {
    __m512 sum[kTile];
    for (int j = 0; j < kTile; j++) {
        sum[j] = _mm512_mul_ps(_mm512_load_ps(query), _mm512_load_ps(keys + j * stride));
        for (int d = 16; d < dim; d += 16) {
            sum[j] = _mm512_fmadd_ps(_mm512_load_ps(query + d), _mm512_load_ps(keys + j * stride + d), sum[j]);
        }
    }
    for (int j = 0; j < 8; j++) {  // two keys a register, then four
        sum[j] = _mm512_add_ps(_mm512_unpacklo_ps(sum[2 * j], sum[2 * j + 1]),
                               _mm512_unpackhi_ps(sum[2 * j], sum[2 * j + 1]));
    }
    for (int j = 0; j < 4; j++) {
        const __m512d a = _mm512_castps_pd(sum[2 * j]), b = _mm512_castps_pd(sum[2 * j + 1]);
        sum[j] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    for (int j = 0; j < 2; j++) {  // then across the four quarters of the registers
        sum[j] = _mm512_add_ps(_mm512_shuffle_f32x4(sum[2 * j], sum[2 * j + 1], 0x44),
                               _mm512_shuffle_f32x4(sum[2 * j], sum[2 * j + 1], 0xee));
    }
    _mm512_store_ps(score, _mm512_add_ps(_mm512_shuffle_f32x4(sum[0], sum[1], 0x88),
                                         _mm512_shuffle_f32x4(sum[0], sum[1], 0xdd)));
}
#else
inline void dot_tile(const float *query, const float *keys, int dim, int stride, float *score) {
    for (int j = 0; j < kTile; j++) {
        float dot = 0;
#pragma omp simd reduction(+ : dot)
        for (int d = 0; d < dim; d++) dot += query[d] * keys[j * stride + d];
        score[j] = dot;
    }
}
#endif

// sum[r] += score[r][j] * values[j], summed over the keys of a tile, for ROWS rows. 16 lanes at a time stay in registers.
typedef float Lanes __attribute__((vector_size(64), may_alias));

template <int ROWS, int STRIDE>
inline void mix_rows(float (*sum)[STRIDE], const float (*score)[kTile], const float (*values)[STRIDE], int full) {
    for (int d = 0; d < full; d += 16) {
        Lanes mixed[ROWS];
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++) mixed[r] = *reinterpret_cast<const Lanes *>(sum[r] + d);
#pragma GCC unroll 16
        for (int j = 0; j < kTile; j++) {
            const Lanes value = *reinterpret_cast<const Lanes *>(values[j] + d);
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; r++) mixed[r] += score[r][j] * value;
        }
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++) *reinterpret_cast<Lanes *>(sum[r] + d) = mixed[r];
    }
}

template <int STRIDE>
inline void mix_tile(float (*sum)[STRIDE], const float (*score)[kTile], const float (*values)[STRIDE], int rows,
                     int full) {
    for (; rows >= 4; rows -= 4, sum += 4, score += 4) mix_rows<4, STRIDE>(sum, score, values, full);
    for (; rows > 0; rows--, sum++, score++) mix_rows<1, STRIDE>(sum, score, values, full);
}

// Attention of `rows` query rows of one kv head over keys [first, context): online softmax (Milakov & Gimelshein 2018),
// a tile of keys at a time. q, out: row r starts at offsets[r]. keys, values: the head's blocks, [num_blocks,
// block_size, dim]. DIM and ROWS: head_dim and rows where they are known at compile time, so that the sums stay in
// registers, else 0.
template <int DIM, int ROWS, typename T>
void attend(const T *__restrict q, T *__restrict out, const int64_t *offsets,
            int row_count, const T *__restrict keys, const T *__restrict values,
            const int64_t *table, Cache cache, int64_t first, int64_t context, const Rule &rule, const float *alibi) {
    const int rows = ROWS ? ROWS : row_count;
    const int dim = DIM ? DIM : static_cast<int>(cache.dim);
    constexpr int kSize = DIM ? DIM : kMaxDim, kRows = ROWS ? ROWS : kMaxRows;
    constexpr int kStride = padded(kSize);
    const int full = padded(dim);
    alignas(64) float query[kRows][kStride], sum[kRows][kStride], wide[kTile][kStride];
    alignas(64) float score[kRows][kTile];
    float highest[kRows], total[kRows];
    for (int r = 0; r < rows; r++) {
        highest[r] = -std::numeric_limits<float>::infinity();
        total[r] = 0;
#pragma omp simd
        for (int d = 0; d < dim; d++) {
            query[r][d] = widen(q[offsets[r] + d]);
        }
        for (int d = dim; d < full; d++) query[r][d] = 0;
        for (int d = 0; d < full; d++) sum[r][d] = 0;
    }
    for (int j = 0; j < kTile; j++) {
        for (int d = 0; d < full; d++) wide[j][d] = 0;
    }
    // the processor's own prefetcher stops at the end of every block
    const auto fetch = [&](int64_t position) {
        if (position >= context) return;
        const int64_t token = table[position / cache.block_size] * cache.block_size + position % cache.block_size;
        for (int64_t line = 0; line < kTile * dim * static_cast<int64_t>(sizeof(T)); line += 64) {
            __builtin_prefetch(reinterpret_cast<const char *>(keys + token * dim) + line);
            __builtin_prefetch(reinterpret_cast<const char *>(values + token * dim) + line);
        }
    };
    for (int ahead = 0; ahead < kAhead; ahead++) fetch(first + ahead * kTile);
    for (int64_t start = first; start < context;) {
        fetch(start + kAhead * kTile);
        const int64_t block = start / cache.block_size, inside = start - block * cache.block_size;
        int64_t end = (block + 1) * cache.block_size < context ? (block + 1) * cache.block_size : context;
        if (end - start > kTile) end = start + kTile;
        const int count = static_cast<int>(end - start);
        const int64_t base = (table[block] * cache.block_size + inside) * dim, key = start;
        start = end;
        for (int j = 0; j < count; j++) {
#pragma omp simd
            for (int d = 0; d < dim; d++) wide[j][d] = widen(keys[base + j * dim + d]);
        }
        for (int r = 0; r < rows; r++) dot_tile(query[r], wide[0], full, kStride, score[r]);
        for (int r = 0; r < rows; r++) {
            finish_scores(score[r], count, rule, alibi ? alibi + r * rule.alibi_stride : nullptr, key);
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
            for (int d = 0; d < dim; d++) wide[j][d] = widen(values[base + j * dim + d]);
        }
        for (int j = count; j < kTile; j++) {  // their weight is zero, but 0 * NaN is not
            for (int d = 0; d < full; d++) wide[j][d] = 0;
        }
        mix_tile<kStride>(sum, score, wide, rows, full);
    }
    for (int r = 0; r < rows; r++) {
        const float inverse = 1.0f / total[r];
#pragma omp simd
        for (int d = 0; d < dim; d++) narrow(sum[r][d] * inverse, out[offsets[r] + d]);
    }
}

template <typename T>
void attend_rows(const T *q, T *out, const int64_t *offsets, int rows, const T *keys, const T *values,
                 const int64_t *table, Cache cache, int64_t first, int64_t context, const Rule &rule, const float *alibi) {
    auto *chosen = attend<0, 0, T>;
    if (cache.dim == 64) chosen = rows == 4 ? attend<64, 4, T> : rows == 1 ? attend<64, 1, T> : attend<64, 0, T>;
    if (cache.dim == 128) chosen = rows == 4 ? attend<128, 4, T> : rows == 1 ? attend<128, 1, T> : attend<128, 0, T>;
    chosen(q, out, offsets, rows, keys, values, table, cache, first, context, rule, alibi);
}

template <typename T>
void paged(const T *q, T *out, const T *keys, const T *values, const int64_t *tables, int64_t table_width,
           const int64_t *contexts, int64_t batch, int64_t length, int64_t heads, int64_t kv_heads, Cache cache,
           const Rule &rule) {
    const int64_t repeats = heads / kv_heads, head_size = cache.head_size();
#pragma omp parallel for collapse(3) schedule(dynamic, 4)
    for (int64_t b = 0; b < batch; b++) {
        for (int64_t i = 0; i < length; i++) {
            for (int64_t h = 0; h < kv_heads; h++) {
                const int64_t context = contexts[b] - length + i + 1;
                const int64_t first = first_key(rule, context - 1);
                int64_t offsets[kMaxRows];
                for (int64_t done = 0; done < repeats; done += kMaxRows) {
                    const int rows = static_cast<int>(repeats - done < kMaxRows ? repeats - done : kMaxRows);
                    for (int r = 0; r < rows; r++) {
                        offsets[r] = ((b * length + i) * heads + h * repeats + done + r) * cache.dim;
                    }
                    attend_rows(q, out, offsets, rows, keys + h * head_size, values + h * head_size,
                                tables + b * table_width, cache, first, context, rule,
                                rule.alibi ? rule.alibi + (h * repeats + done) * rule.alibi_stride : nullptr);
                }
            }
        }
    }
}

}  // namespace
}  // namespace penstock

using namespace penstock;

extern "C" {

// q, out: [batch * length, heads, dim] contiguous. keys, values: [kv_heads, num_blocks, block_size, dim] contiguous.
// tables: [batch, table_width] block ids. contexts: [batch] tokens that the last query of each run sees. dim <= 256.
void penstock_attention_f32(const float *q, float *out, const float *keys, const float *values, const int64_t *tables,
                            int64_t table_width, const int64_t *contexts, int64_t batch, int64_t length, int64_t heads,
                            int64_t kv_heads, int64_t num_blocks, int64_t block_size, int64_t dim,
                            const penstock_rule *rule) {
    paged(q, out, keys, values, tables, table_width, contexts, batch, length, heads, kv_heads,
          Cache{num_blocks, block_size, dim}, *rule);
}

void penstock_attention_bf16(const uint16_t *q, uint16_t *out, const uint16_t *keys, const uint16_t *values,
                             const int64_t *tables, int64_t table_width, const int64_t *contexts, int64_t batch,
                             int64_t length, int64_t heads, int64_t kv_heads, int64_t num_blocks, int64_t block_size,
                             int64_t dim, const penstock_rule *rule) {
    paged(reinterpret_cast<const bf16 *>(q), reinterpret_cast<bf16 *>(out), reinterpret_cast<const bf16 *>(keys),
          reinterpret_cast<const bf16 *>(values), tables, table_width, contexts, batch, length, heads, kv_heads,
          Cache{num_blocks, block_size, dim}, *rule);
}
}
