// Attention of long runs: a tile of queries against one stretch of keys after the other, as two products with a softmax
// between them (Dao et al. 2022; Rabe & Staats 2021). The query heads that share a kv head are rows of one tile.
//
// Keys and values of a stretch are brought into the panels that the products want: [inputs / kTogether][64][kTogether],
// columns of the first product are keys, of the second dimensions. With AVX512_BF16 the operands of bfloat16 caches stay
// bfloat16, two to a dot instruction; elsewhere everything is float32. Stretches begin at multiples of their length, so
// what a query gets does not depend on how its prompt was cut.

#include "attention.h"

#include <type_traits>

#ifdef __AVX512BF16__
#include "product.h"
#endif

namespace penstock {
namespace {

constexpr int kKeys = 64;   // keys of a stretch, and dimensions of a panel of values
constexpr int kRows = 96;   // query rows of a tile
constexpr int kPanels = kMaxDim / kKeys;

typedef float Lanes __attribute__((vector_size(64), may_alias));

// sums[ROWS][64] (+)= rows[ROWS][inner] x panel[inner][64].
template <int ROWS>
void multiply_rows(const float *__restrict rows, int64_t stride, const float *__restrict panel, float *__restrict sums,
                   int inner, bool first) {
    Lanes sum[ROWS][4];
    for (int r = 0; r < ROWS; r++) {
        for (int j = 0; j < 4; j++) {
            sum[r][j] = first ? Lanes{} : *reinterpret_cast<const Lanes *>(sums + r * kKeys + j * 16);
        }
    }
    for (int i = 0; i < inner; i++) {
        Lanes column[4];
        for (int j = 0; j < 4; j++) column[j] = *reinterpret_cast<const Lanes *>(panel + i * kKeys + j * 16);
#pragma GCC unroll 6
        for (int r = 0; r < ROWS; r++) {
            for (int j = 0; j < 4; j++) sum[r][j] += rows[r * stride + i] * column[j];
        }
    }
    for (int r = 0; r < ROWS; r++) {
        for (int j = 0; j < 4; j++) *reinterpret_cast<Lanes *>(sums + r * kKeys + j * 16) = sum[r][j];
    }
}

// A key or a value, and what a 1 in it stands for. Null: it is not there.
template <typename C>
struct Row {
    const C *numbers = nullptr;
    float scale = 1;
};

// How operands of a type are kept and multiplied. C: the type of the cache that they come from.
template <typename T>
struct Unit {
    using Number = float;
    static constexpr int kTogether = 1;

    static void multiply(const float *rows, int64_t stride, const float *panel, float *sums, int count, int inner,
                         bool first) {
#ifdef __AVX512F__
        constexpr int kTile = 6;
#else
        constexpr int kTile = 1;  // a row fills the registers
#endif
        for (; count >= kTile; count -= kTile, rows += kTile * stride, sums += kTile * kKeys) {
            multiply_rows<kTile>(rows, stride, panel, sums, inner, first);
        }
        for (; count > 0; count--, rows += stride, sums += kKeys) {
            multiply_rows<1>(rows, stride, panel, sums, inner, first);
        }
    }

    template <typename C>
    static void pack_keys(const Row<C> *keys, int dim, float *panel) {
        for (int c = 0; c < kKeys; c++) {
            const auto [key, scale] = keys[c];
            for (int d = 0; d < dim; d++) panel[d * kKeys + c] = key ? widen(key[d]) * scale : 0.0f;
        }
    }

    // Dimensions [start, start + kKeys) of the values.
    template <typename C>
    static void pack_values(const Row<C> *values, int dim, int start, float *panel) {
        const int count = std::min(dim - start, kKeys);
        for (int c = 0; c < kKeys; c++) {
            const auto [value, scale] = values[c];
            for (int d = 0; d < kKeys; d++) {
                panel[c * kKeys + d] = value && d < count ? widen(value[start + d]) * scale : 0.0f;
            }
        }
    }
};

#ifdef __AVX512BF16__

// 16 rows of 16 numbers of 4 bytes become its columns.
inline void transpose(__m512i *row) {
    __m512i half[16];
    for (int i = 0; i < 8; i++) {
        half[2 * i] = _mm512_unpacklo_epi32(row[2 * i], row[2 * i + 1]);
        half[2 * i + 1] = _mm512_unpackhi_epi32(row[2 * i], row[2 * i + 1]);
    }
    for (int i = 0; i < 4; i++) {
        for (int j = 0; j < 2; j++) {
            row[4 * i + 2 * j] = _mm512_unpacklo_epi64(half[4 * i + j], half[4 * i + 2 + j]);
            row[4 * i + 2 * j + 1] = _mm512_unpackhi_epi64(half[4 * i + j], half[4 * i + 2 + j]);
        }
    }
    for (int i = 0; i < 4; i++) {  // row[4 g + i]: column i of every quarter, of rows 4 g ..
        const __m512i a = _mm512_shuffle_i32x4(row[i], row[4 + i], 0x88), b = _mm512_shuffle_i32x4(row[i], row[4 + i], 0xdd);
        const __m512i c = _mm512_shuffle_i32x4(row[8 + i], row[12 + i], 0x88);
        const __m512i d = _mm512_shuffle_i32x4(row[8 + i], row[12 + i], 0xdd);
        half[i] = _mm512_shuffle_i32x4(a, c, 0x88), half[8 + i] = _mm512_shuffle_i32x4(a, c, 0xdd);
        half[4 + i] = _mm512_shuffle_i32x4(b, d, 0x88), half[12 + i] = _mm512_shuffle_i32x4(b, d, 0xdd);
    }
    for (int i = 0; i < 16; i++) row[i] = half[i];
}

inline __m512i load32(const bf16 *from, __mmask32 mask, float) { return _mm512_maskz_loadu_epi16(mask, from); }

inline __m512i load32(const int8_t *from, __mmask32 mask, float scale) {  // as bfloat16
    const __m256i bytes = _mm256_maskz_loadu_epi8(mask, from);
    const auto half = [&](__m128i x) { return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(x)), _mm512_set1_ps(scale)); };
    return (__m512i)_mm512_cvtne2ps_pbh(half(_mm256_extracti128_si256(bytes, 1)), half(_mm256_castsi256_si128(bytes)));
}

template <>
struct Unit<bf16> {
    using Number = bf16;
    static constexpr int kTogether = 2;

    static void multiply(const bf16 *rows, int64_t stride, const bf16 *panel, float *sums, int count, int inner,
                         bool first) {
        const char *from = reinterpret_cast<const char *>(rows), *weights = reinterpret_cast<const char *>(panel);
        constexpr int kTile = Bf16Dot::kRows;
        for (; count > 0; count -= kTile, from += kTile * stride * 2, sums += kTile * kKeys) {
            tile_of<Bf16Dot, 0>(std::min(count, kTile), from, stride * 2, weights, sums, inner / 2, first, weights);
        }
    }

    template <typename C>
    static void pack_keys(const Row<C> *keys, int dim, bf16 *panel) {
        const int pairs = (dim + 1) / 2;
        for (int start = 0; start < pairs; start += 16) {
            const int count = std::min(pairs - start, 16), left = dim - start * 2;
            const __mmask32 mask = left >= 32 ? ~0u : (1u << left) - 1;
            for (int c = 0; c < kKeys; c += 16) {
                __m512i row[16];
                for (int i = 0; i < 16; i++) {
                    const auto [key, scale] = keys[c + i];
                    row[i] = key ? load32(key + start * 2, mask, scale) : _mm512_setzero_si512();
                }
                transpose(row);
                for (int i = 0; i < count; i++) {
                    _mm512_store_si512(reinterpret_cast<char *>(panel) + ((start + i) * kKeys + c) * 4, row[i]);
                }
            }
        }
    }

    template <typename C>
    static void pack_values(const Row<C> *values, int dim, int start, bf16 *panel) {
        for (int c = 0; c < kKeys; c += 2) {
            for (int part = 0; part < 2; part++) {  // 32 dimensions
                const int left = std::clamp(dim - start - part * 32, 0, 32);
                const __mmask32 mask = left == 32 ? ~0u : (1u << left) - 1;
                const auto load = [&](const Row<C> &value) {
                    return value.numbers ? load32(value.numbers + start + part * 32, mask, value.scale)
                                         : _mm512_setzero_si512();
                };
                interleave(load(values[c]), load(values[c + 1]), panel + c * kKeys + part * 64);
            }
        }
    }
};

#endif

// A tile of queries on its way: rows are (token, query head of the kv head), token after token.
template <typename T>
struct Tile {
    using Number = typename Unit<T>::Number;

    alignas(64) Number queries[kRows * kMaxDim];
    alignas(64) Number keys[kMaxDim * kKeys];
    alignas(64) Number values[kPanels][kKeys * kKeys];
    alignas(64) Number weights[kRows * kKeys];
    alignas(64) float scores[kRows * kKeys];
    alignas(64) float sums[kPanels][kRows * kKeys];
    float highest[kRows], total[kRows];
};

// The scores of a stretch that begins at key `start` become weights; what is known of the row is brought up to them. A
// query sees keys [low, high).
template <typename T>
void soften(Tile<T> &tile, int r, int panels, int64_t start, int64_t low, int64_t high, const Rule &rule,
            const float *alibi) {
    float *scores = tile.scores + r * kKeys;
    const int begin = static_cast<int>(std::clamp<int64_t>(low - start, 0, kKeys));
    const int end = static_cast<int>(std::clamp<int64_t>(high - start, 0, kKeys));
    finish_scores(scores, kKeys, rule, alibi, start, end);
    float top = tile.highest[r];
    const float added = weigh<kKeys>(scores, begin, end, top, tile.weights + r * kKeys);
    const float shrink = top == tile.highest[r] ? 1.0f : exp_nonpositive(tile.highest[r] - top);
    tile.highest[r] = top;
    tile.total[r] = tile.total[r] * shrink + added;
    for (int p = 0; shrink != 1.0f && p < panels; p++) {
#pragma omp simd
        for (int d = 0; d < kKeys; d++) tile.sums[p][r * kKeys + d] *= shrink;
    }
}

// What one tile of queries of one kv head sees, and what comes of it. q, out: row r lies at (r / repeats) * heads * dim +
// (r % repeats) * dim. position: of the first row's token.
template <typename T, typename C>
void attend_tile(Tile<T> &tile, const T *q, T *out, int rows, int64_t row, int64_t repeats, int64_t heads, const C *keys,
                 const C *values, const int64_t *table, Cache cache, int64_t head, int64_t before, const Rule &rule,
                 const float *alibi) {
    const int dim = static_cast<int>(cache.dim), panels = (dim + kKeys - 1) / kKeys, width = (dim + 1) / 2 * 2;
    const auto place = [&](int r) { return ((row + r) / repeats * heads + (row + r) % repeats) * dim; };
    for (int r = 0; r < rows; r++) {
        const T *query = q + place(r);
        auto *to = tile.queries + r * width;
        if constexpr (std::is_same_v<T, typename Tile<T>::Number>) std::memcpy(to, query, dim * sizeof(T));
        else for (int d = 0; d < dim; d++) narrow(widen(query[d]), to[d]);
        if (dim < width) narrow(0.0f, to[dim]);
        tile.highest[r] = kNever;
        tile.total[r] = 0;
    }
    const int64_t first = before + row / repeats, last = before + (row + rows - 1) / repeats;
    bool fresh = true;
    for (int64_t start = first_key(rule, first) / kKeys * kKeys; start <= last; start += kKeys) {
        Row<C> key[kKeys], value[kKeys];
        for (int c = 0; c < kKeys && start + c <= last; c++) {
            const Stretch<C> of_key(keys, cache, table, head, start + c), of_value(values, cache, table, head, start + c);
            key[c] = {of_key.rows, of_key.scale(0)};
            value[c] = {of_value.rows, of_value.scale(0)};
        }
        Unit<T>::pack_keys(key, dim, tile.keys);
        for (int p = 0; p < panels; p++) Unit<T>::pack_values(value, dim, p * kKeys, tile.values[p]);
        Unit<T>::multiply(tile.queries, width, tile.keys, tile.scores, rows, width, true);
        for (int r = 0; r < rows; r++) {
            const int64_t position = before + (row + r) / repeats;
            soften(tile, r, fresh ? 0 : panels, start, first_key(rule, position), position + 1, rule,
                   alibi ? alibi + (row + r) % repeats * rule.alibi_stride : nullptr);
        }
        for (int p = 0; p < panels; p++) {
            Unit<T>::multiply(tile.weights, kKeys, tile.values[p], tile.sums[p], rows, kKeys, fresh);
        }
        fresh = false;
    }
    for (int r = 0; r < rows; r++) {
        const float inverse = 1.0f / tile.total[r];
        for (int p = 0; p < panels; p++) {
            const int count = std::min(dim - p * kKeys, kKeys);
            T *to = out + place(r) + p * kKeys;
#pragma omp simd
            for (int d = 0; d < count; d++) narrow(tile.sums[p][r * kKeys + d] * inverse, to[d]);
        }
    }
}

template <typename T, typename C>
void long_runs(const T *q, T *out, const C *keys, const C *values, const int64_t *tables, int64_t table_width,
               const int64_t *contexts, int64_t batch, int64_t length, int64_t heads, int64_t kv_heads, int64_t block_size,
               int64_t dim, const Rule &rule) {
    const Cache cache = cache_of<C>(kv_heads, block_size, dim);
    const int64_t repeats = heads / kv_heads, all = length * repeats, tiles = (all + kRows - 1) / kRows;
#pragma omp parallel
    {
        Tile<T> tile;
#pragma omp for collapse(3) schedule(dynamic)
        for (int64_t t = tiles - 1; t >= 0; t--) {  // the last ones see the most and come first
            for (int64_t b = 0; b < batch; b++) {
                for (int64_t h = 0; h < kv_heads; h++) {
                    const int64_t row = t * kRows, origin = b * length * heads + h * repeats;
                    attend_tile(tile, q + origin * dim, out + origin * dim,
                                static_cast<int>(std::min<int64_t>(kRows, all - row)), row, repeats, heads,
                                keys, values, tables + b * table_width, cache, h, contexts[b] - length, rule,
                                rule.alibi ? rule.alibi + h * repeats * rule.alibi_stride : nullptr);
                }
            }
        }
    }
}

}  // namespace
}  // namespace penstock

using namespace penstock;

extern "C" {

// As penstock_attention_* (attention.cpp), for runs of any length; made for those longer than a few tokens.
void penstock_attention_long_f32(const float *q, float *out, const float *keys, const float *values,
                                 const int64_t *tables, int64_t table_width, const int64_t *contexts, int64_t batch,
                                 int64_t length, int64_t heads, int64_t kv_heads, int64_t block_size,
                                 int64_t dim, const penstock_rule *rule) {
    long_runs(q, out, keys, values, tables, table_width, contexts, batch, length, heads, kv_heads, block_size, dim, *rule);
}

void penstock_attention_long_bf16(const uint16_t *q, uint16_t *out, const uint16_t *keys, const uint16_t *values,
                                  const int64_t *tables, int64_t table_width, const int64_t *contexts, int64_t batch,
                                  int64_t length, int64_t heads, int64_t kv_heads, int64_t block_size,
                                  int64_t dim, const penstock_rule *rule) {
    long_runs(reinterpret_cast<const bf16 *>(q), reinterpret_cast<bf16 *>(out), reinterpret_cast<const bf16 *>(keys),
              reinterpret_cast<const bf16 *>(values), tables, table_width, contexts, batch, length, heads, kv_heads,
              block_size, dim, *rule);
}

void penstock_attention_long_f32_int8(const float *q, float *out, const int8_t *keys, const int8_t *values,
                                      const int64_t *tables, int64_t table_width, const int64_t *contexts, int64_t batch,
                                      int64_t length, int64_t heads, int64_t kv_heads, int64_t block_size,
                                      int64_t dim, const penstock_rule *rule) {
    long_runs(q, out, keys, values, tables, table_width, contexts, batch, length, heads, kv_heads, block_size, dim, *rule);
}

void penstock_attention_long_bf16_int8(const uint16_t *q, uint16_t *out, const int8_t *keys, const int8_t *values,
                                       const int64_t *tables, int64_t table_width, const int64_t *contexts, int64_t batch,
                                       int64_t length, int64_t heads, int64_t kv_heads, int64_t block_size,
                                       int64_t dim, const penstock_rule *rule) {
    long_runs(reinterpret_cast<const bf16 *>(q), reinterpret_cast<bf16 *>(out), keys, values, tables, table_width, contexts,
              batch, length, heads, kv_heads, block_size, dim, *rule);
}
}
