// What the kernels of attention share: where keys and values lie, and which of them a query sees.
#pragma once

#include "common.h"

#include <algorithm>
#include <limits>
#include <type_traits>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace penstock {

constexpr float kNever = -std::numeric_limits<float>::infinity();
constexpr int kMaxDim = 256;  // head_dim; the Python side checks it

// One layer's keys or values: [num_blocks, kv_heads, block_size, dim]. All heads of a block lie together, so that a
// sequence is read in long stretches. Where they are bytes, the block_size scales of a head's block, float32, lie behind
// its rows: the same stream of memory brings them, and rows begin where lines of the caches do.
struct Cache {
    int64_t kv_heads, block_size, dim;
    int64_t scale_size = 0;  // in numbers of the cache

    // Where a head's key of a token lies. table: the blocks of its sequence; token: its place there.
    int64_t place(const int64_t *table, int64_t head, int64_t token) const {
        return block(table[token / block_size], head) + token % block_size * dim;
    }

    // Where its scale lies.
    int64_t scale_place(const int64_t *table, int64_t head, int64_t token) const {
        return block(table[token / block_size], head) + block_size * dim + token % block_size * scale_size;
    }

    int64_t block(int64_t id, int64_t head) const { return (id * kv_heads + head) * block_size * (dim + scale_size); }
};

// The layout of a cache of numbers of type C.
template <typename C>
inline Cache cache_of(int64_t kv_heads, int64_t block_size, int64_t dim) {
    return {kv_heads, block_size, dim, std::is_same_v<C, int8_t> ? static_cast<int64_t>(sizeof(float)) : 0};
}

inline float scale_at(const int8_t *place) {
    float scale;
    std::memcpy(&scale, place, sizeof scale);
    return scale;
}

// Rows of one kv head that lie together, and, of bytes, their scales.
template <typename C>
struct Stretch {
    const C *rows, *scales;

    Stretch() = default;
    Stretch(const C *cache, Cache layout, const int64_t *table, int64_t head, int64_t token)
        : rows(cache + layout.place(table, head, token)), scales(cache + layout.scale_place(table, head, token)) {}

    // What a 1 in row j stands for.
    float scale(int j) const {
        if constexpr (std::is_same_v<C, int8_t>) return scale_at(scales + j * sizeof(float));
        else return 1.0f;
    }
};

}  // namespace penstock

extern "C" {

// How scores are made and which keys are seen (kernels/attention.py has the words). Zero or null where there is none.
struct penstock_rule {
    float scale;
    float softcap;
    int64_t window;      // tokens back that a query sees, itself included
    int64_t chunk;       // a query sees only its own stretch of so many tokens
    const float *alibi;  // [heads, alibi_stride], added by the place of the key
    int64_t alibi_stride;
};
}

namespace penstock {

using Rule = penstock_rule;

// The first key that a query at `position` sees.
inline int64_t first_key(const Rule &rule, int64_t position) {
    int64_t first = 0;
    if (rule.window > 0) first = std::max<int64_t>(first, position + 1 - rule.window);
    if (rule.chunk > 0) first = std::max<int64_t>(first, position / rule.chunk * rule.chunk);
    return first;
}

// Products of queries and `width` keys from `first` on become what softmax takes; those from `count` on are never seen.
// alibi: of the head, or null.
inline void finish_scores(float *scores, int width, const Rule &rule, const float *alibi, int64_t first, int count) {
#pragma omp simd
    for (int j = 0; j < width; j++) scores[j] *= rule.scale;
    if (rule.softcap > 0) {
        const float inverse = 2.0f / rule.softcap;
#pragma omp simd
        for (int j = 0; j < width; j++) {  // tanh(x) = (1 - e^-2x) / (1 + e^-2x), by the sign that keeps e^ small
            const float z = scores[j] * inverse, e = exp_nonpositive(z < 0 ? z : -z);
            const float size = rule.softcap * ((1.0f - e) / (1.0f + e));
            scores[j] = z < 0 ? -size : size;
        }
    }
    if (alibi) {
        for (int j = 0; j < count; j++) scores[j] += alibi[first + j];
    }
}

#ifdef __AVX512BW__
// 32 numbers of two values side by side, as a dot of pairs takes them: 64 numbers of 16 bits at `to`.
inline void interleave(__m512i even, __m512i odd, void *to) {
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36,
                                         4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    _mm512_store_si512(to, _mm512_permutex2var_epi16(even, low, odd));
    _mm512_store_si512(static_cast<char *>(to) + 64, _mm512_permutex2var_epi16(even, high, odd));
}
#endif

#ifdef __AVX512F__

inline __m512 exponential(__m512 x) {  // as exp_nonpositive; what lies far below zero underflows
    const __m512 z = _mm512_mul_ps(_mm512_max_ps(_mm512_set1_ps(-150.0f), x), _mm512_set1_ps(1.44269504088896f));
    const __m512 n = _mm512_roundscale_ps(z, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 f = _mm512_mul_ps(_mm512_sub_ps(z, n), _mm512_set1_ps(0.693147180559945f));
    __m512 p = _mm512_set1_ps(1.0f / 720);
    for (const float c : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(c));
    return _mm512_scalef_ps(p, n);
}

template <int LANES>
inline void store(float *to, const __m512 *lanes) {
    for (int j = 0; j < LANES; j++) _mm512_store_ps(to + j * 16, lanes[j]);
}

#ifdef __AVX512BF16__
template <int LANES>
inline void store(bf16 *to, const __m512 *lanes) {
    for (int j = 0; j < LANES; j++) {
        _mm256_store_si256(reinterpret_cast<__m256i *>(to + j * 16), (__m256i)_mm512_cvtneps_pbh(lanes[j]));
    }
}
#endif

// The largest score of keys [begin, end) of KEYS, or `top`. weights: exp(score - largest), zero outside; returns their
// sum. A NaN is no largest, but makes its weight NaN.
template <int KEYS, typename Number>
inline float weigh(const float *scores, int begin, int end, float &top, Number *weights) {
    constexpr int kLanes = KEYS / 16;
    const uint64_t seen = (end == 64 ? ~0ull : (1ull << end) - 1) & (begin == 64 ? 0 : ~0ull << begin);
    __m512 lanes[kLanes], most = _mm512_set1_ps(top);
    for (int j = 0; j < kLanes; j++) {
        lanes[j] = _mm512_load_ps(scores + j * 16);
        most = _mm512_mask_max_ps(most, static_cast<__mmask16>(seen >> j * 16), lanes[j], most);
    }
    top = _mm512_reduce_max_ps(most);
    const __m512 base = _mm512_set1_ps(top == kNever ? 0.0f : top);  // a query that sees nothing yet
    __m512 added = _mm512_setzero_ps();
    for (int j = 0; j < kLanes; j++) {
        lanes[j] = _mm512_maskz_mov_ps(static_cast<__mmask16>(seen >> j * 16), exponential(_mm512_sub_ps(lanes[j], base)));
        added = _mm512_add_ps(added, lanes[j]);
    }
    store<kLanes>(weights, lanes);
    return _mm512_reduce_add_ps(added);
}

#else

template <int KEYS, typename Number>
inline float weigh(const float *scores, int begin, int end, float &top, Number *weights) {
    for (int j = begin; j < end; j++) top = scores[j] > top ? scores[j] : top;
    const float base = top == kNever ? 0.0f : top;
    float added = 0;
#pragma omp simd reduction(+ : added)
    for (int j = 0; j < KEYS; j++) {
        const float e = j >= begin && j < end ? exp_nonpositive(scores[j] - base) : 0.0f;
        added += e;
        narrow(e, weights[j]);
    }
    return added;
}

#endif

}  // namespace penstock
