// Attention of short runs over the blocks of the cache, read where they lie.

#include "attention_bytes.h"

#include <omp.h>

#include <type_traits>

namespace penstock {
namespace {

constexpr int kMaxRows = 8;  // query rows that share one pass over the keys

// Query rows of one token that share a kv head, and what is known of them so far.
template <class Form, int ROWS>
struct Unit {
    static constexpr int kRows = ROWS ? ROWS : kMaxRows;

    typename Form::Query query[kRows];
    alignas(64) float sum[kRows][Form::kStride];
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
template <class Form, int DIM, int ROWS, typename T, typename C>
void attend(const T *__restrict q, T *__restrict out, const Place *places, int count, const C *__restrict keys,
            const C *__restrict values, const int64_t *table, Cache cache, int64_t first, int64_t context,
            const Rule &rule) {
    using State = Unit<Form, ROWS>;
    const int dim = DIM ? DIM : static_cast<int>(cache.dim);
    State units[kUnits];
    Form form;
    alignas(64) float scores[kTile];
    alignas(64) typename Form::Weight weights[State::kRows][kTile];
    for (int u = 0; u < count; u++) {
        for (int r = 0; r < (ROWS ? ROWS : places[u].rows); r++) {
            State &unit = units[u];
            unit.highest[r] = kNever;
            unit.total[r] = 0;
            unit.query[r].take(q + (places[u].first_head + r) * dim, dim);
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
            // the processor's own prefetcher does not know where the next block lies; a few lines at a time, because a core
            // waits when too many are on their way
            const int64_t next = end < context ? end : start;
            const Stretch<C> next_keys(keys, cache, table, places[u].head, next);
            const Stretch<C> next_values(values, cache, table, places[u].head, next);
            const int lines = kTile * dim * static_cast<int>(sizeof(C)) / 64, share = (lines + rows - 1) / rows;
            if constexpr (std::is_same_v<C, int8_t>) {
                __builtin_prefetch(next_keys.scales);
                __builtin_prefetch(next_values.scales);
            }
            form.take_keys({keys, cache, table, places[u].head, start}, tile, dim);
            for (int r = 0; r < rows; r++) {
                const float *alibi = rule.alibi ? rule.alibi + (places[u].first_head + r) * rule.alibi_stride : nullptr;
                for (int line = r * share; line < std::min((r + 1) * share, lines); line++) {
                    __builtin_prefetch(reinterpret_cast<const char *>(next_keys.rows) + line * 64);
                    __builtin_prefetch(reinterpret_cast<const char *>(next_values.rows) + line * 64);
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
            form.take_values({values, cache, table, places[u].head, start}, tile, dim);
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

template <class Form, int DIM, typename T, typename C>
void attend_shape(int rows, const T *q, T *out, const Place *places, int count, const C *keys, const C *values,
                  const int64_t *table, Cache cache, int64_t first, int64_t context, const Rule &rule) {
    auto *chosen = rows == 4   ? attend<Form, DIM, 4, T, C>
                   : rows == 1 ? attend<Form, DIM, 1, T, C>
                               : attend<Form, DIM, 0, T, C>;
    chosen(q, out, places, count, keys, values, table, cache, first, context, rule);
}

template <typename T, typename C>
void attend_units(const T *q, T *out, const Place *places, int count, const C *keys, const C *values,
                  const int64_t *table, Cache cache, int64_t first, int64_t context, const Rule &rule) {
    int rows = places[0].rows;
    for (int u = 1; u < count; u++) rows = places[u].rows == rows ? rows : 0;
    const auto run = [&](auto *chosen) {
        chosen(rows, q, out, places, count, keys, values, table, cache, first, context, rule);
    };
#ifdef __AVX512BF16__
    if constexpr (std::is_same_v<C, bf16>) {
        if (cache.dim == 64) return run(attend_shape<Paired<64>, 64, T, C>);
        if (cache.dim == 128) return run(attend_shape<Paired<128>, 128, T, C>);
    }
#endif
#ifdef __AVX512BW__
    if constexpr (std::is_same_v<C, int8_t>) {
        if (cache.dim == 64) return run(attend_shape<Bytes<64>, 64, T, C>);
        if (cache.dim == 128) return run(attend_shape<Bytes<128>, 128, T, C>);
    }
#endif
    if (cache.dim == 64) return run(attend_shape<Wide<C, 64>, 64, T, C>);
    if (cache.dim == 128) return run(attend_shape<Wide<C, 128>, 128, T, C>);
    run(attend_shape<Wide<C, 0>, 0, T, C>);
}

// C: of the cache.
template <typename T, typename C>
void paged(const T *q, T *out, const C *keys, const C *values, const int64_t *tables, int64_t table_width,
           const int64_t *contexts, int64_t batch, int64_t length, int64_t heads, int64_t kv_heads, int64_t block_size,
           int64_t dim, const Rule &rule) {
    const Cache cache = cache_of<C>(kv_heads, block_size, dim);
    const int64_t repeats = heads / kv_heads, parts = (repeats + kMaxRows - 1) / kMaxRows;
    const int64_t units = kv_heads * parts, tokens = batch * length;
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
            attend_units(q + t * heads * dim, out + t * heads * dim, places, count, keys, values,
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
// _int8: over a cache of bytes and scales, each head's block of which takes block_size * (dim + 4) bytes (see Cache).
void penstock_attention_f32(const float *q, float *out, const float *keys, const float *values, const int64_t *tables,
                            int64_t table_width, const int64_t *contexts, int64_t batch, int64_t length, int64_t heads,
                            int64_t kv_heads, int64_t block_size, int64_t dim,
                            const penstock_rule *rule) {
    paged(q, out, keys, values, tables, table_width, contexts, batch, length, heads, kv_heads, block_size, dim, *rule);
}

void penstock_attention_bf16(const uint16_t *q, uint16_t *out, const uint16_t *keys, const uint16_t *values,
                             const int64_t *tables, int64_t table_width, const int64_t *contexts, int64_t batch,
                             int64_t length, int64_t heads, int64_t kv_heads, int64_t block_size,
                             int64_t dim, const penstock_rule *rule) {
    paged(reinterpret_cast<const bf16 *>(q), reinterpret_cast<bf16 *>(out), reinterpret_cast<const bf16 *>(keys),
          reinterpret_cast<const bf16 *>(values), tables, table_width, contexts, batch, length, heads, kv_heads,
          block_size, dim, *rule);
}

void penstock_attention_f32_int8(const float *q, float *out, const int8_t *keys, const int8_t *values,
                                 const int64_t *tables, int64_t table_width, const int64_t *contexts, int64_t batch,
                                 int64_t length, int64_t heads, int64_t kv_heads, int64_t block_size, int64_t dim,
                                 const penstock_rule *rule) {
    paged(q, out, keys, values, tables, table_width, contexts, batch, length, heads, kv_heads, block_size, dim, *rule);
}

void penstock_attention_bf16_int8(const uint16_t *q, uint16_t *out, const int8_t *keys, const int8_t *values,
                                  const int64_t *tables, int64_t table_width, const int64_t *contexts, int64_t batch,
                                  int64_t length, int64_t heads, int64_t kv_heads, int64_t block_size, int64_t dim,
                                  const penstock_rule *rule) {
    paged(reinterpret_cast<const bf16 *>(q), reinterpret_cast<bf16 *>(out), keys, values, tables, table_width, contexts,
          batch, length, heads, kv_heads, block_size, dim, *rule);
}
}
