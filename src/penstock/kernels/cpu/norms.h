// Normalisation of rows, alone or on their way to 8 bits.
#pragma once

#include "common.h"

extern "C" {

// A norm over the n numbers of a row: x / rms(x) * weight, or (x - mean(x)) / std(x) * weight + bias.
struct penstock_norm {
    const uint16_t *weight;  // [n] bfloat16
    const uint16_t *bias;    // the same, or null
    float eps;
    int32_t kind;  // of penstock::NormKind
};
}

namespace penstock {

enum NormKind { kNoNorm, kRmsNorm, kLayerNorm, kLayerNormWithBias };

// out: [m, n] contiguous; rows of x lie `stride` apart. norm: of a kind that is one.
void norm_rows(const penstock_norm &norm, const uint16_t *x, int64_t stride, uint16_t *out, int64_t m, int64_t n);

// out: [m, n], round(y / scale) + 128, y being the norm of a row, or the row itself; scales: [m], the largest |y| / 127. A
// row with a NaN or an infinity gets the scale NaN, and so does everything that is made of it.
void quantize_rows(const penstock_norm &norm, const uint16_t *x, int64_t stride, uint8_t *out, float *scales, int64_t m,
                   int64_t n);

}  // namespace penstock
