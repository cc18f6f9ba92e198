#include "norms.h"

#include <limits>

namespace penstock {
namespace {

// A row and what its norm is made with. Alone or on its way to 8 bits, the norm is the same bits: rows with adapters take it
// alone, and must not change what their neighbours get.
template <int KIND>
struct Row {
    const bf16 *x, *weight, *bias;
    float mean = 0, inverse = 1;

    Row(const penstock_norm &norm, const uint16_t *from, int64_t n)
        : x(reinterpret_cast<const bf16 *>(from)),
          weight(reinterpret_cast<const bf16 *>(norm.weight)),
          bias(reinterpret_cast<const bf16 *>(norm.bias)) {
        if (KIND == kNoNorm) return;
        if (KIND != kRmsNorm) {
            float sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t i = 0; i < n; i++) sum += widen(x[i]);
            mean = sum / static_cast<float>(n);
        }
        float square = 0;
        const float middle = mean;
#pragma omp simd reduction(+ : square)
        for (int64_t i = 0; i < n; i++) square += (widen(x[i]) - middle) * (widen(x[i]) - middle);
        inverse = 1.0f / std::sqrt(square / static_cast<float>(n) + norm.eps);
    }

    bf16 operator[](int64_t i) const {
        if (KIND == kNoNorm) return x[i];
        float value = (KIND == kRmsNorm ? widen(x[i]) : widen(x[i]) - mean) * inverse * widen(weight[i]);
        if (KIND == kLayerNormWithBias) value += widen(bias[i]);
        bf16 result;
        narrow(value, result);
        return result;
    }
};

template <int KIND>
void norm_row(const penstock_norm &norm, const uint16_t *x, uint16_t *out, int64_t n) {
    const Row<KIND> row(norm, x, n);
#pragma omp simd
    for (int64_t i = 0; i < n; i++) out[i] = row[i].bits;
}

template <int KIND>
void quantize_row(const penstock_norm &norm, const uint16_t *x, uint8_t *out, float &scale, int64_t n) {
    const Row<KIND> row(norm, x, n);
    float top = 0;
    int broken = 0;
#pragma omp simd reduction(max : top) reduction(| : broken)
    for (int64_t i = 0; i < n; i++) {
        const float size = std::fabs(widen(row[i]));
        top = size > top ? size : top;
        broken |= !(size <= std::numeric_limits<float>::max());
    }
    const float step = top / 127.0f, inverse = top > 1e-30f && !broken ? 1.0f / step : 0.0f;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        const float value = broken ? 0.0f : widen(row[i]) * inverse;
        out[i] = static_cast<uint8_t>(static_cast<int32_t>(value + 128.5f));
    }
    scale = broken ? std::numeric_limits<float>::quiet_NaN() : step;
}

constexpr int64_t kAlone = 16384;  // numbers that one thread is faster with

}  // namespace

void norm_rows(const penstock_norm &norm, const uint16_t *x, int64_t stride, uint16_t *out, int64_t m, int64_t n) {
    auto *chosen = norm.kind == kRmsNorm     ? norm_row<kRmsNorm>
                   : norm.kind == kLayerNorm ? norm_row<kLayerNorm>
                                             : norm_row<kLayerNormWithBias>;
#pragma omp parallel for if (m * n > kAlone)
    for (int64_t r = 0; r < m; r++) chosen(norm, x + r * stride, out + r * n, n);
}

void quantize_rows(const penstock_norm &norm, const uint16_t *x, int64_t stride, uint8_t *out, float *scales, int64_t m,
                   int64_t n) {
    auto *chosen = norm.kind == kNoNorm      ? quantize_row<kNoNorm>
                   : norm.kind == kRmsNorm   ? quantize_row<kRmsNorm>
                   : norm.kind == kLayerNorm ? quantize_row<kLayerNorm>
                                             : quantize_row<kLayerNormWithBias>;
#pragma omp parallel for if (m * n > kAlone)
    for (int64_t r = 0; r < m; r++) chosen(norm, x + r * stride, out + r * n, scales[r], n);
}

}  // namespace penstock

using namespace penstock;

extern "C" {

// x: rows of n, `stride` apart; weight: [n]; bias: [n] or null; out: [rows, n] contiguous.
void penstock_rms_norm_bf16(const uint16_t *x, int64_t stride, const uint16_t *weight, uint16_t *out, int64_t rows,
                            int64_t n, float eps) {
    norm_rows({weight, nullptr, eps, kRmsNorm}, x, stride, out, rows, n);
}

void penstock_layer_norm_bf16(const uint16_t *x, int64_t stride, const uint16_t *weight, const uint16_t *bias,
                              uint16_t *out, int64_t rows, int64_t n, float eps) {
    norm_rows({weight, bias, eps, bias ? kLayerNormWithBias : kLayerNorm}, x, stride, out, rows, n);
}

void penstock_quantize_rows_bf16(const penstock_norm *norm, const uint16_t *x, int64_t stride, uint8_t *out, float *scales,
                                 int64_t m, int64_t n) {
    quantize_rows(*norm, x, stride, out, scales, m, n);
}
}
