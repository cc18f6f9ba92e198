// Attention of short runs over the blocks of the cache, read where they lie.

#include "attention.h"

#include <omp.h>

#include <type_traits>

namespace penstock {
namespace {

constexpr int kTile = 16;     // keys whose scores are computed before the running maximum is looked at
constexpr int kMaxRows = 8;   // query rows that share one pass over the keys

constexpr int padded(int dim) { return (dim + 15) / 16 * 16; }

// score[j] = query . keys[j] for the 16 keys of a tile, `stride` apart and zero beyond the head's size. The compiler would
// add up the lanes of every sum on its own; here 16 sums are added up together, in a tree of shuffles.
#ifdef __AVX512F__
inline void add_up(__m512 *sum, float *score) {
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

inline void dot_tile(const float *query, const float *keys, int dim, int stride, float *score) {
    __m512 sum[kTile];
    for (int j = 0; j < kTile; j++) {
        sum[j] = _mm512_mul_ps(_mm512_load_ps(query), _mm512_load_ps(keys + j * stride));
        for (int d = 16; d < dim; d += 16) {
            sum[j] = _mm512_fmadd_ps(_mm512_load_ps(query + d), _mm512_load_ps(keys + j * stride + d), sum[j]);
        }
    }
    add_up(sum, score);
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

// How a tile of 16 keys and values is brought into the form that the two products want. T: of the cache; DIM: head_dim
// where it is known at compile time, so that sums stay in registers, else 0.
template <typename T, int DIM>
struct Wide {  // everything in float32
    static constexpr int kStride = padded(DIM ? DIM : kMaxDim);
    using Number = float;

    alignas(64) float rows[kTile][kStride] = {};

    void take(const T *from, int count, int dim) {
        for (int j = 0; j < count; j++) {
#pragma omp simd
            for (int d = 0; d < dim; d++) rows[j][d] = widen(from[j * dim + d]);
        }
    }

    void take_keys(const T *keys, int count, int dim) { take(keys, count, dim); }

    void take_values(const T *values, int count, int dim) {
        take(values, count, dim);
        for (int j = count; j < kTile; j++) {  // their weight is zero, but 0 * NaN is not
            for (int d = 0; d < padded(dim); d++) rows[j][d] = 0;
        }
    }

    void dot(const float *query, int dim, float *scores) const {
        dot_tile(query, rows[0], padded(dim), kStride, scores);
    }

    void mix(float (*sum)[kStride], const float (*weights)[kTile], int count, int dim) const {
        mix_tile<kStride>(sum, weights, rows, count, padded(dim));
    }
};

#ifdef __AVX512BF16__

template <int DIM>
struct Paired {  // bfloat16, two to a dot instruction; keys are used where they lie
    static constexpr int kStride = DIM, kLines = DIM / 32;
    using Number = bf16;

    const bf16 *keys;
    int count;
    alignas(64) bf16 values[kTile / 2][DIM][2];  // pairs of keys side by side

    void take_keys(const bf16 *from, int tile, int) { keys = from, count = tile; }

    void take_values(const bf16 *from, int tile, int) {
        const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5,
                                             36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
        const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
        for (int j = 0; j < kTile; j += 2) {
            for (int line = 0; line < kLines; line++) {
                const __m512i even = j < tile ? _mm512_loadu_si512(from + j * DIM + line * 32) : _mm512_setzero_si512();
                const __m512i odd = j + 1 < tile ? _mm512_loadu_si512(from + (j + 1) * DIM + line * 32)
                                                 : _mm512_setzero_si512();
                _mm512_store_si512(values[j / 2][line * 32], _mm512_permutex2var_epi16(even, low, odd));
                _mm512_store_si512(values[j / 2][line * 32 + 16], _mm512_permutex2var_epi16(even, high, odd));
            }
        }
    }

    void dot(const bf16 *query, int, float *scores) const {
        __m512 sum[kTile];
        for (int j = 0; j < kTile; j++) {
            sum[j] = _mm512_setzero_ps();
            if (j >= count) continue;
            for (int line = 0; line < kLines; line++) {
                sum[j] = _mm512_dpbf16_ps(sum[j], (__m512bh)_mm512_load_si512(query + line * 32),
                                          (__m512bh)_mm512_loadu_si512(keys + j * DIM + line * 32));
            }
        }
        add_up(sum, scores);
    }

    void mix(float (*sum)[kStride], const bf16 (*weights)[kTile], int rows, int) const {
        for (; rows >= 4; rows -= 4, sum += 4, weights += 4) mix_rows<4>(sum, weights);
        for (; rows > 0; rows--, sum++, weights++) mix_rows<1>(sum, weights);
    }

    template <int ROWS>
    void mix_rows(float (*sum)[kStride], const bf16 (*weights)[kTile]) const {
        for (int d = 0; d < DIM; d += 16) {
            __m512 mixed[ROWS];
            for (int r = 0; r < ROWS; r++) mixed[r] = _mm512_load_ps(sum[r] + d);
            for (int j = 0; j < kTile; j += 2) {
                const __m512bh pair = (__m512bh)_mm512_load_si512(values[j / 2][d]);
                for (int r = 0; r < ROWS; r++) {
                    int32_t weight;
                    std::memcpy(&weight, weights[r] + j, sizeof weight);
                    mixed[r] = _mm512_dpbf16_ps(mixed[r], pair, (__m512bh)_mm512_set1_epi32(weight));
                }
            }
            for (int r = 0; r < ROWS; r++) _mm512_store_ps(sum[r] + d, mixed[r]);
        }
    }
};

#endif

// Query rows of one token that share a kv head, and what is known of them so far.
template <typename Number, int ROWS, int STRIDE>
struct Unit {
    static constexpr int kRows = ROWS ? ROWS : kMaxRows;

    alignas(64) Number query[kRows][STRIDE];
    alignas(64) float sum[kRows][STRIDE];
    float highest[kRows], total[kRows];
};

// Where a unit's rows lie: `rows` heads from `first_head` on, of one kv head.
struct Place {
    int64_t head, first_head;
    int rows;
};

constexpr int kUnits = 8;  // that read a block together: neighbours in memory, and their sums stay in the first cache

// Attention of some units of one token over its keys [first, context): online softmax (Milakov & Gimelshein 2018), a tile
// of keys of every unit at a time, so that memory is read in long stretches. q, out: of the token. ROWS: of every unit
// where it is known at compile time, else 0.
template <class Form, int DIM, int ROWS, typename T>
void attend(const T *__restrict q, T *__restrict out, const Place *places, int count, const T *__restrict keys,
            const T *__restrict values, const int64_t *table, Cache cache, int64_t first, int64_t context,
            const Rule &rule) {
    using Number = typename Form::Number;
    using State = Unit<Number, ROWS, Form::kStride>;
    const int dim = DIM ? DIM : static_cast<int>(cache.dim);
    State units[kUnits];
    Form form;
    alignas(64) float scores[kTile];
    alignas(64) Number weights[State::kRows][kTile];
    for (int u = 0; u < count; u++) {
        for (int r = 0; r < (ROWS ? ROWS : places[u].rows); r++) {
            State &unit = units[u];
            unit.highest[r] = kNever;
            unit.total[r] = 0;
            const T *from = q + (places[u].first_head + r) * dim;
#pragma omp simd
            for (int d = 0; d < dim; d++) narrow(widen(from[d]), unit.query[r][d]);
            for (int d = dim; d < padded(dim); d++) narrow(0.0f, unit.query[r][d]);
            for (int d = 0; d < padded(dim); d++) unit.sum[r][d] = 0;
        }
    }
    for (int64_t start = first; start < context;) {
        const int64_t block_end = (start / cache.block_size + 1) * cache.block_size;
        const int64_t end = std::min({block_end, context, start + kTile});
        const int tile = static_cast<int>(end - start);
        for (int u = 0; u < count; u++) {
            State &unit = units[u];
            const int rows = ROWS ? ROWS : places[u].rows;
            const int64_t place = cache.place(table, places[u].head, start);
            // the processor's own prefetcher does not know where the next block lies; a few lines at a time, because a core
            // waits when too many are on their way
            const int64_t next = end < context ? cache.place(table, places[u].head, end) : place;
            const char *next_key = reinterpret_cast<const char *>(keys + next);
            const char *next_value = reinterpret_cast<const char *>(values + next);
            const int lines = kTile * dim * static_cast<int>(sizeof(T)) / 64, share = (lines + rows - 1) / rows;
            form.take_keys(keys + place, tile, dim);
            for (int r = 0; r < rows; r++) {
                const float *alibi = rule.alibi ? rule.alibi + (places[u].first_head + r) * rule.alibi_stride : nullptr;
                for (int line = r * share; line < std::min((r + 1) * share, lines); line++) {
                    __builtin_prefetch(next_key + line * 64);
                    __builtin_prefetch(next_value + line * 64);
                }
                form.dot(unit.query[r], dim, scores);
                finish_scores(scores, kTile, rule, alibi, start, tile);
                float top = unit.highest[r];
                const float added = weigh<kTile>(scores, 0, tile, top, weights[r]);
                if (top != unit.highest[r]) {
                    const float shrink = exp_nonpositive(unit.highest[r] - top);
                    unit.total[r] *= shrink;
#pragma omp simd
                    for (int d = 0; d < dim; d++) unit.sum[r][d] *= shrink;
                }
                unit.highest[r] = top;
                unit.total[r] += added;
            }
            form.take_values(values + place, tile, dim);
            form.mix(unit.sum, weights, rows, dim);
        }
        start = end;
    }
    for (int u = 0; u < count; u++) {
        for (int r = 0; r < (ROWS ? ROWS : places[u].rows); r++) {
            const float inverse = 1.0f / units[u].total[r];
            T *to = out + (places[u].first_head + r) * dim;
#pragma omp simd
            for (int d = 0; d < dim; d++) narrow(units[u].sum[r][d] * inverse, to[d]);
        }
    }
}

template <class Form, int DIM, typename T>
void attend_shape(int rows, const T *q, T *out, const Place *places, int count, const T *keys, const T *values,
                  const int64_t *table, Cache cache, int64_t first, int64_t context, const Rule &rule) {
    auto *chosen = rows == 4 ? attend<Form, DIM, 4, T> : rows == 1 ? attend<Form, DIM, 1, T> : attend<Form, DIM, 0, T>;
    chosen(q, out, places, count, keys, values, table, cache, first, context, rule);
}

template <typename T>
void attend_units(const T *q, T *out, const Place *places, int count, const T *keys, const T *values,
                  const int64_t *table, Cache cache, int64_t first, int64_t context, const Rule &rule) {
    int rows = places[0].rows;
    for (int u = 1; u < count; u++) rows = places[u].rows == rows ? rows : 0;
    const auto run = [&](auto *chosen) {
        chosen(rows, q, out, places, count, keys, values, table, cache, first, context, rule);
    };
#ifdef __AVX512BF16__
    if constexpr (std::is_same_v<T, bf16>) {
        if (cache.dim == 64) return run(attend_shape<Paired<64>, 64, T>);
        if (cache.dim == 128) return run(attend_shape<Paired<128>, 128, T>);
    }
#endif
    if (cache.dim == 64) return run(attend_shape<Wide<T, 64>, 64, T>);
    if (cache.dim == 128) return run(attend_shape<Wide<T, 128>, 128, T>);
    run(attend_shape<Wide<T, 0>, 0, T>);
}

template <typename T>
void paged(const T *q, T *out, const T *keys, const T *values, const int64_t *tables, int64_t table_width,
           const int64_t *contexts, int64_t batch, int64_t length, int64_t heads, Cache cache, const Rule &rule) {
    const int64_t repeats = heads / cache.kv_heads, parts = (repeats + kMaxRows - 1) / kMaxRows;
    const int64_t units = cache.kv_heads * parts, tokens = batch * length;
    // units of a task: as many as read together, but enough tasks for every thread
    const int64_t wanted = std::max<int64_t>(1, units * tokens / (4 * omp_get_max_threads()));
    const int64_t width = std::min<int64_t>({kUnits, units, wanted}), tasks = (units + width - 1) / width;
#pragma omp parallel for collapse(2) schedule(dynamic)
    for (int64_t t = 0; t < tokens; t++) {
        for (int64_t task = 0; task < tasks; task++) {
            Place places[kUnits];
            const int count = static_cast<int>(std::min(width, units - task * width));
            for (int u = 0; u < count; u++) {
                const int64_t unit = task * width + u, head = unit / parts, done = unit % parts * kMaxRows;
                places[u] = {head, head * repeats + done, static_cast<int>(std::min<int64_t>(repeats - done, kMaxRows))};
            }
            const int64_t b = t / length, context = contexts[b] - length + t % length + 1;
            attend_units(q + t * heads * cache.dim, out + t * heads * cache.dim, places, count, keys, values,
                         tables + b * table_width, cache, first_key(rule, context - 1), context, rule);
        }
    }
}

}  // namespace
}  // namespace penstock

using namespace penstock;

extern "C" {

// q, out: [batch * length, heads, dim] contiguous. keys, values: [num_blocks, kv_heads, block_size, dim] contiguous.
// tables: [batch, table_width] block ids. contexts: [batch] tokens that the last query of each run sees. dim <= 256.
void penstock_attention_f32(const float *q, float *out, const float *keys, const float *values, const int64_t *tables,
                            int64_t table_width, const int64_t *contexts, int64_t batch, int64_t length, int64_t heads,
                            int64_t kv_heads, int64_t block_size, int64_t dim,
                            const penstock_rule *rule) {
    paged(q, out, keys, values, tables, table_width, contexts, batch, length, heads,
          Cache{kv_heads, block_size, dim}, *rule);
}

void penstock_attention_bf16(const uint16_t *q, uint16_t *out, const uint16_t *keys, const uint16_t *values,
                             const int64_t *tables, int64_t table_width, const int64_t *contexts, int64_t batch,
                             int64_t length, int64_t heads, int64_t kv_heads, int64_t block_size,
                             int64_t dim, const penstock_rule *rule) {
    paged(reinterpret_cast<const bf16 *>(q), reinterpret_cast<bf16 *>(out), reinterpret_cast<const bf16 *>(keys),
          reinterpret_cast<const bf16 *>(values), tables, table_width, contexts, batch, length, heads,
          Cache{kv_heads, block_size, dim}, *rule);
}
}
