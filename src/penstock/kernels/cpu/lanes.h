// The few vector operations that products need, at each level of the instruction set: kLanes numbers of 32 bits at a time.
#pragma once

#include <cstdint>

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#else
#error "no vectors are known for this processor"
#endif

namespace penstock {

#if defined(__AVX512BW__)

constexpr int kLanes = 16;
using Floats = __m512;
typedef int32_t Ints __attribute__((vector_size(64), may_alias));  // GCC keeps arrays of __m512i in memory

inline Floats fmadd(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Ints madd16(Ints a, Ints b) { return (Ints)_mm512_madd_epi16((__m512i)a, (__m512i)b); }
inline Ints madd8(Ints a, Ints b) { return (Ints)_mm512_maddubs_epi16((__m512i)a, (__m512i)b); }
inline Ints add16(Ints a, Ints b) { return (Ints)_mm512_add_epi16((__m512i)a, (__m512i)b); }
inline Ints low16(Ints x) { return (Ints)_mm512_srai_epi16(_mm512_slli_epi16((__m512i)x, 8), 8); }
inline Ints high16(Ints x) { return (Ints)_mm512_srai_epi16((__m512i)x, 8); }
inline Floats to_floats(Ints x) { return _mm512_cvtepi32_ps((__m512i)x); }

#elif defined(__AVX2__)

constexpr int kLanes = 8;
using Floats = __m256;
typedef int32_t Ints __attribute__((vector_size(32), may_alias));

inline Floats fmadd(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline Ints madd16(Ints a, Ints b) { return (Ints)_mm256_madd_epi16((__m256i)a, (__m256i)b); }
inline Ints madd8(Ints a, Ints b) { return (Ints)_mm256_maddubs_epi16((__m256i)a, (__m256i)b); }
inline Ints add16(Ints a, Ints b) { return (Ints)_mm256_add_epi16((__m256i)a, (__m256i)b); }
inline Ints low16(Ints x) { return (Ints)_mm256_srai_epi16(_mm256_slli_epi16((__m256i)x, 8), 8); }
inline Ints high16(Ints x) { return (Ints)_mm256_srai_epi16((__m256i)x, 8); }
inline Floats to_floats(Ints x) { return _mm256_cvtepi32_ps((__m256i)x); }

#elif defined(__SSE2__)

constexpr int kLanes = 4;
using Floats = __m128;
typedef int32_t Ints __attribute__((vector_size(16), may_alias));

inline Floats fmadd(Floats a, Floats b, Floats c) { return _mm_add_ps(_mm_mul_ps(a, b), c); }
inline Ints madd16(Ints a, Ints b) { return (Ints)_mm_madd_epi16((__m128i)a, (__m128i)b); }
inline Ints low16(Ints x) { return (Ints)_mm_srai_epi16(_mm_slli_epi16((__m128i)x, 8), 8); }
inline Ints high16(Ints x) { return (Ints)_mm_srai_epi16((__m128i)x, 8); }
inline Floats to_floats(Ints x) { return _mm_cvtepi32_ps((__m128i)x); }

#else

constexpr int kLanes = 4;
using Floats = float32x4_t;
typedef int32_t Ints __attribute__((vector_size(16), may_alias));

inline Floats fmadd(Floats a, Floats b, Floats c) { return vfmaq_f32(c, a, b); }
inline Ints madd16(Ints a, Ints b) {
    const int16x8_t x = (int16x8_t)a, y = (int16x8_t)b;
    return (Ints)vpaddq_s32(vmull_s16(vget_low_s16(x), vget_low_s16(y)), vmull_high_s16(x, y));
}
inline Ints low16(Ints x) { return (Ints)vshrq_n_s16(vshlq_n_s16((int16x8_t)x, 8), 8); }
inline Ints high16(Ints x) { return (Ints)vshrq_n_s16((int16x8_t)x, 8); }
inline Floats to_floats(Ints x) { return vcvtq_f32_s32((int32x4_t)x); }

#endif

// low16, high16: of every lane the bytes 0 and 2, or 1 and 3, each as 16 signed bits. madd16: products of 16 bits, two of a
// lane added. madd8, of AVX2 on: products of 8 unsigned with 8 signed bits, neighbours added in 16; add16: sums of these.

inline Ints every(int32_t x) { return Ints{} + x; }
inline Floats every(float x) { return Floats{} + x; }
inline Ints load_ints(const void *from) { return *static_cast<const Ints *>(from); }
inline Floats as_floats(Ints x) { return (Floats)x; }

}  // namespace penstock
