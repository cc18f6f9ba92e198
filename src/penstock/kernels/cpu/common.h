// What the kernels share. Loops are written for the compiler's vectoriser; every file is compiled once for each level of
// the instruction set, and the loader picks the library that the processor can run. Nothing is allocated inside.
//
// The kernels have a plain C ABI, no Python and no torch headers, and are loaded by ctypes. Every one has a torch twin
// in penstock/kernels that the tests compare it with.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace penstock {

struct bf16 {
    uint16_t bits;
};

inline float widen(float x) { return x; }

inline float widen(int8_t x) { return x; }

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
// [-0.5, 0.5] (Taylor of degree 6, relative error below 1e-7). Below -87 it is as good as zero; -inf gives zero, NaN NaN.
inline float exp_nonpositive(float x) {
    const float clamped = x > -87.0f ? x : -87.0f;
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
    const uint32_t exponent = static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23;
    float power;
    std::memcpy(&power, &exponent, sizeof power);
    return x > -87.0f ? p * power : x != x ? x : 0.0f;
}

}  // namespace penstock
