// The two products of short runs over a cache of bytes, in whole numbers of 16 bits: keys and values are exact in them, and
// queries and weights keep more bits than bfloat16 has.
#pragma once

#include "attention_tile.h"

namespace penstock {

#ifdef __AVX512BW__

inline __m512i dot16(__m512i sum, __m512i a, __m512i b) {  // products of 16 bits, two of a lane added
#ifdef __AVX512VNNI__
    return _mm512_dpwssd_epi32(sum, a, b);
#else
    return _mm512_add_epi32(sum, _mm512_madd_epi16(a, b));
#endif
}

inline __m512i widened(const int8_t *from) {
    return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(from)));
}

template <int DIM>
struct Bytes {
    static constexpr int kStride = DIM, kLines = DIM / 32, kMost = 32767;  // 127 * 32767 * kMaxDim fits 32 bits
    using Weight = float;

    struct Query {
        alignas(64) int16_t numbers[DIM];
        float scale;

        template <typename T>
        void take(const T *from, int) {
            float top = 0;
            int broken = 0;
#pragma omp simd reduction(max : top) reduction(| : broken)
            for (int d = 0; d < DIM; d++) {
                const float size = std::fabs(widen(from[d]));
                top = size > top ? size : top;
                broken |= !(size <= std::numeric_limits<float>::max());
            }
            const float inverse = top > 1e-30f && !broken ? kMost / top : 0.0f;
#pragma omp simd
            for (int d = 0; d < DIM; d++) {
                const float value = broken ? 0.0f : widen(from[d]) * inverse;
                numbers[d] = static_cast<int16_t>(static_cast<int32_t>(value + (kMost + 1.5f)) - (kMost + 1));
            }
            scale = broken ? std::numeric_limits<float>::quiet_NaN() : top / kMost;
        }
    };

    Stretch<int8_t> keys;
    int count = 0;
    __m512 key_scales, value_scales;
    alignas(64) int16_t values[kTile / 2][DIM][2];  // pairs of keys side by side

    static __m512 load_scales(const Stretch<int8_t> &from, int tile) {  // zero for keys that are not there
        return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << tile) - 1), from.scales);
    }

    void take_keys(const Stretch<int8_t> &from, int tile, int) {
        keys = from, count = tile, key_scales = load_scales(from, tile);
    }

    void take_values(const Stretch<int8_t> &from, int tile, int) {
        value_scales = load_scales(from, tile);
        for (int j = 0; j < kTile; j += 2) {
            for (int line = 0; line < kLines; line++) {
                const auto row = [&](int i) {
                    return i < tile ? widened(from.rows + i * DIM + line * 32) : _mm512_setzero_si512();
                };
                interleave(row(j), row(j + 1), values[j / 2][line * 32]);
            }
        }
    }

    void dot(const Query &query, int, float *scores) const {
        __m512i sum[kTile];
        for (int j = 0; j < kTile; j++) {
            sum[j] = _mm512_setzero_si512();
            if (j >= count) continue;
            for (int line = 0; line < kLines; line++) {
                sum[j] = dot16(sum[j], _mm512_load_si512(query.numbers + line * 32), widened(keys.rows + j * DIM + line * 32));
            }
        }
        const __m512 unit = _mm512_mul_ps(key_scales, _mm512_set1_ps(query.scale));
        _mm512_store_ps(scores, _mm512_mul_ps(_mm512_cvtepi32_ps(add_up(sum)), unit));
    }

    void mix(float (*sum)[kStride], const float (*weights)[kTile], int rows, int) const {
        for (; rows >= 4; rows -= 4, sum += 4, weights += 4) mix_rows<4>(sum, weights);
        for (; rows > 0; rows--, sum++, weights++) mix_rows<1>(sum, weights);
    }

    template <int ROWS>
    void mix_rows(float (*sum)[kStride], const float (*weights)[kTile]) const {
        alignas(32) int16_t whole[ROWS][kTile];
        __m512 unit[ROWS];
        for (int r = 0; r < ROWS; r++) {
            const __m512 scaled = _mm512_mul_ps(_mm512_load_ps(weights[r]), value_scales);
            const float all = _mm512_reduce_add_ps(scaled);  // no part is larger, and a NaN makes it one
            const __m512i parts = _mm512_cvtps_epi32(_mm512_mul_ps(scaled, _mm512_set1_ps(all > 0 ? kMost / all : 0.0f)));
            _mm256_store_si256(reinterpret_cast<__m256i *>(whole[r]), _mm512_cvtepi32_epi16(parts));
            unit[r] = _mm512_set1_ps(all / kMost);
        }
        for (int d = 0; d < DIM; d += 16) {
            __m512i mixed[ROWS];
            for (int r = 0; r < ROWS; r++) mixed[r] = _mm512_setzero_si512();
            for (int j = 0; j < kTile; j += 2) {
                const __m512i pair = _mm512_load_si512(values[j / 2][d]);
                for (int r = 0; r < ROWS; r++) {
                    int32_t weight;
                    std::memcpy(&weight, whole[r] + j, sizeof weight);
                    mixed[r] = dot16(mixed[r], pair, _mm512_set1_epi32(weight));
                }
            }
            for (int r = 0; r < ROWS; r++) {
                const __m512 before = _mm512_load_ps(sum[r] + d);
                _mm512_store_ps(sum[r] + d, _mm512_fmadd_ps(_mm512_cvtepi32_ps(mixed[r]), unit[r], before));
            }
        }
    }
};

#endif

}  // namespace penstock
