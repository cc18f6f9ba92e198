// The two products of short runs: rows of queries with a tile of 16 keys, weights with the values of the tile.
#pragma once

#include "attention.h"

namespace penstock {

constexpr int kTile = 16;     // keys whose scores are computed before the running maximum is looked at

constexpr int padded(int dim) { return (dim + 15) / 16 * 16; }

// score[j] = query . keys[j] for the 16 keys of a tile, `stride` apart and zero beyond the head's size. The compiler would
// add up the lanes of every sum on its own; here 16 sums are added up together, in a tree of shuffles.
#ifdef __AVX512F__
inline __m512i plus(__m512i a, __m512i b, __m512i) { return _mm512_add_epi32(a, b); }
inline __m512i plus(__m512i a, __m512i b, __m512) {
    return _mm512_castps_si512(_mm512_add_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b)));
}

template <typename Lanes>  // of floats or of integers
inline Lanes add_up(const Lanes *sums) {
    __m512i sum[kTile];
    for (int j = 0; j < 8; j++) {  // two keys a register, then four
        const __m512i a = (__m512i)sums[2 * j], b = (__m512i)sums[2 * j + 1];
        sum[j] = plus(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b), Lanes{});
    }
    for (int j = 0; j < 4; j++) {
        const __m512i a = sum[2 * j], b = sum[2 * j + 1];
        sum[j] = plus(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b), Lanes{});
    }
    for (int j = 0; j < 2; j++) {  // then across the four quarters of the registers
        const __m512i a = sum[2 * j], b = sum[2 * j + 1];
        sum[j] = plus(_mm512_shuffle_i32x4(a, b, 0x44), _mm512_shuffle_i32x4(a, b, 0xee), Lanes{});
    }
    return (Lanes)plus(_mm512_shuffle_i32x4(sum[0], sum[1], 0x88), _mm512_shuffle_i32x4(sum[0], sum[1], 0xdd), Lanes{});
}

inline void dot_tile(const float *query, const float *keys, int dim, int stride, float *score) {
    __m512 sum[kTile];
    for (int j = 0; j < kTile; j++) {
        sum[j] = _mm512_mul_ps(_mm512_load_ps(query), _mm512_load_ps(keys + j * stride));
        for (int d = 16; d < dim; d += 16) {
            sum[j] = _mm512_fmadd_ps(_mm512_load_ps(query + d), _mm512_load_ps(keys + j * stride + d), sum[j]);
        }
    }
    _mm512_store_ps(score, add_up(sum));
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

// A query as a row of numbers, zero beyond the head's size.
template <typename Number, int STRIDE>
struct PlainQuery {
    alignas(64) Number numbers[STRIDE];

    template <typename T>
    void take(const T *from, int dim) {
#pragma omp simd
        for (int d = 0; d < dim; d++) narrow(widen(from[d]), numbers[d]);
        for (int d = dim; d < padded(dim); d++) narrow(0.0f, numbers[d]);
    }
};

// How a tile of 16 keys and values is brought into the form that the two products want. C: of the cache; DIM: head_dim
// where it is known at compile time, so that sums stay in registers, else 0.
template <typename C, int DIM>
struct Wide {  // everything in float32
    static constexpr int kStride = padded(DIM ? DIM : kMaxDim);
    using Query = PlainQuery<float, kStride>;
    using Weight = float;

    alignas(64) float rows[kTile][kStride] = {};

    void take(const Stretch<C> &from, int count, int dim) {
        for (int j = 0; j < count; j++) {
            const C *row = from.rows + j * dim;
            const float scale = from.scale(j);
#pragma omp simd
            for (int d = 0; d < dim; d++) rows[j][d] = widen(row[d]) * scale;
        }
    }

    void take_keys(const Stretch<C> &keys, int count, int dim) { take(keys, count, dim); }

    void take_values(const Stretch<C> &values, int count, int dim) {
        take(values, count, dim);
        for (int j = count; j < kTile; j++) {  // their weight is zero, but 0 * NaN is not
            for (int d = 0; d < padded(dim); d++) rows[j][d] = 0;
        }
    }

    void dot(const Query &query, int dim, float *scores) const {
        dot_tile(query.numbers, rows[0], padded(dim), kStride, scores);
    }

    void mix(float (*sum)[kStride], const float (*weights)[kTile], int count, int dim) const {
        mix_tile<kStride>(sum, weights, rows, count, padded(dim));
    }
};

#ifdef __AVX512BF16__

template <int DIM>
struct Paired {  // bfloat16, two to a dot instruction; keys are used where they lie
    static constexpr int kStride = DIM, kLines = DIM / 32;
    using Query = PlainQuery<bf16, DIM>;
    using Weight = bf16;

    const bf16 *keys;
    int count;
    alignas(64) bf16 values[kTile / 2][DIM][2];  // pairs of keys side by side

    void take_keys(const Stretch<bf16> &from, int tile, int) { keys = from.rows, count = tile; }

    void take_values(const Stretch<bf16> &stretch, int tile, int) {
        const bf16 *from = stretch.rows;
        for (int j = 0; j < kTile; j += 2) {
            for (int line = 0; line < kLines; line++) {
                const __m512i even = j < tile ? _mm512_loadu_si512(from + j * DIM + line * 32) : _mm512_setzero_si512();
                const __m512i odd = j + 1 < tile ? _mm512_loadu_si512(from + (j + 1) * DIM + line * 32)
                                                 : _mm512_setzero_si512();
                interleave(even, odd, values[j / 2][line * 32]);
            }
        }
    }

    void dot(const Query &query, int, float *scores) const {
        __m512 sum[kTile];
        for (int j = 0; j < kTile; j++) {
            sum[j] = _mm512_setzero_ps();
            if (j >= count) continue;
            for (int line = 0; line < kLines; line++) {
                sum[j] = _mm512_dpbf16_ps(sum[j], (__m512bh)_mm512_load_si512(query.numbers + line * 32),
                                          (__m512bh)_mm512_loadu_si512(keys + j * DIM + line * 32));
            }
        }
        _mm512_store_ps(scores, add_up(sum));
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

}  // namespace penstock
