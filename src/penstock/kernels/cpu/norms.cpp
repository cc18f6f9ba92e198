// Normalisation.

#include "common.h"

namespace penstock {
namespace {

inline void rms_norm_row(const bf16 *__restrict x, const bf16 *__restrict weight, bf16 *__restrict out, int64_t n,
                         float eps) {
    float square = 0;
#pragma omp simd reduction(+ : square)
    for (int64_t i = 0; i < n; i++) square += widen(x[i]) * widen(x[i]);
    const float inverse = 1.0f / std::sqrt(square / static_cast<float>(n) + eps);
#pragma omp simd
    for (int64_t i = 0; i < n; i++) narrow(widen(x[i]) * inverse * widen(weight[i]), out[i]);
}

}  // namespace
}  // namespace penstock

using namespace penstock;

extern "C" {

// x: rows of n, `stride` apart; weight: [n]; out: [rows, n] contiguous.
void penstock_rms_norm_bf16(const uint16_t *x, int64_t stride, const uint16_t *weight, uint16_t *out, int64_t rows,
                            int64_t n, float eps) {
#pragma omp parallel for if (rows * n > 16384)
    for (int64_t r = 0; r < rows; r++) {
        rms_norm_row(reinterpret_cast<const bf16 *>(x + r * stride), reinterpret_cast<const bf16 *>(weight),
                     reinterpret_cast<bf16 *>(out + r * n), n, eps);
    }
}
}
