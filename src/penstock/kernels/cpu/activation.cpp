// Activations of MLPs that are not gated; those of gated ones are part of their product (product.h).

#include "product.h"

namespace penstock {
namespace {

// x times the share of a normal distribution below x (Hendrycks & Gimpel 2016); what lies beyond |x| by formula 7.1.26 of
// Abramowitz & Stegun, absolute error below 1e-7.
inline float gelu(float x) {
    const float z = std::fabs(x) * 0.707106781186548f, t = 1.0f / (1.0f + 0.3275911f * z);
    float p = 1.061405429f;
    p = p * t - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    const float beyond = 0.5f * p * t * exp_nonpositive(-z * z);
    return x * (x > 0 ? 1.0f - beyond : beyond);
}

template <typename Function>
void of_each(const bf16 *__restrict x, bf16 *__restrict out, int64_t count, Function function) {
    constexpr int64_t kPart = 4096;
#pragma omp parallel for if (count > 4 * kPart)
    for (int64_t start = 0; start < count; start += kPart) {
        const int64_t end = std::min(start + kPart, count);
#pragma omp simd
        for (int64_t i = start; i < end; i++) narrow(function(widen(x[i])), out[i]);
    }
}

}  // namespace
}  // namespace penstock

using namespace penstock;

extern "C" {

// x, out: `count` numbers. tanh: the approximation by it.
void penstock_gelu_bf16(const uint16_t *x, uint16_t *out, int64_t count, int64_t tanh) {
    const bf16 *from = reinterpret_cast<const bf16 *>(x);
    bf16 *to = reinterpret_cast<bf16 *>(out);
    if (tanh) of_each(from, to, count, [](float value) { return activate<kGeluTanh>(value); });
    else of_each(from, to, count, [](float value) { return gelu(value); });
}
}
