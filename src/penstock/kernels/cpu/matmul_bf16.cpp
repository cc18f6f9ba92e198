// Products of bfloat16 activations with bfloat16 weights, for any number of rows: one for a single stream, thousands for
// a prompt. AVX512_BF16 only (vdpbf16ps sums pairs of products in float32).

#include "product.h"

namespace penstock {
namespace {

template <int ACTIVATION>
void gated(const bf16 *x, int64_t stride, const bf16 *weights, bf16 *out, int64_t m, int64_t n, int64_t k,
           const bf16 *gate_bias, const bf16 *up_bias) {
    constexpr int kHalf = kPanel / 2;
    const auto finish = [&](float *sums, int64_t row, int rows, int64_t panel) {
        const int64_t first = panel * kHalf;
        const int width = static_cast<int>(std::min<int64_t>(kHalf, n - first));
        for (int r = 0; r < rows; r++) {
            write_gated_row<ACTIVATION>(sums + r * kPanel, width, from(gate_bias, first), from(up_bias, first),
                                        out + (row + r) * n + first);
        }
    };
    product<Bf16Dot>(x, stride * 2, weights, m, (n + kHalf - 1) / kHalf, k * 2, finish);
}

}  // namespace
}  // namespace penstock

using namespace penstock;

extern "C" {

// weight: [n, k] contiguous, k even, as columns [offset, offset + width) of the panels of `out`: see pack_panels.
void penstock_pack_bf16(const uint16_t *weight, uint16_t *out, int64_t n, int64_t k, int64_t offset, int64_t width) {
    pack_panels(reinterpret_cast<const char *>(weight), reinterpret_cast<char *>(out), n, k * 2, offset, width);
}

// out[m, n] = x[m, k] x weights + bias[n] + residual[m, n], both optional. Rows of x lie `stride` apart.
void penstock_matmul_bf16(const uint16_t *x, int64_t stride, const uint16_t *weights, uint16_t *out, int64_t m,
                          int64_t n, int64_t k, const uint16_t *bias, const uint16_t *residual) {
    const bf16 *shift = reinterpret_cast<const bf16 *>(bias), *add = reinterpret_cast<const bf16 *>(residual);
    const auto finish = [&](float *sums, int64_t row, int rows, int64_t panel) {
        const int64_t first = panel * kPanel;
        const int width = static_cast<int>(std::min<int64_t>(kPanel, n - first));
        for (int r = 0; r < rows; r++) {
            const int64_t at = (row + r) * n + first;
            write_row(sums + r * kPanel, width, from(shift, first), from(add, at), reinterpret_cast<bf16 *>(out) + at);
        }
    };
    product<Bf16Dot>(x, stride * 2, weights, m, (n + kPanel - 1) / kPanel, k * 2, finish);
}

// out[m, n] = activation(x x gate + gate_bias) * (x x up + up_bias); weights: panels of 32 columns of gate and the same
// 32 of up. activation: 0 silu, 1 gelu by tanh, 2 relu. The biases are optional.
void penstock_gated_bf16(const uint16_t *x, int64_t stride, const uint16_t *weights, uint16_t *out, int64_t m,
                         int64_t n, int64_t k, const uint16_t *gate_bias, const uint16_t *up_bias, int64_t activation) {
    auto *chosen = activation == kSilu ? gated<kSilu> : activation == kGeluTanh ? gated<kGeluTanh> : gated<kRelu>;
    chosen(reinterpret_cast<const bf16 *>(x), stride, reinterpret_cast<const bf16 *>(weights),
           reinterpret_cast<bf16 *>(out), m, n, k, reinterpret_cast<const bf16 *>(gate_bias),
           reinterpret_cast<const bf16 *>(up_bias));
}
}
