// Products of bfloat16 activations with bfloat16 weights, for any number of rows: one for a single stream, thousands for
// a prompt. AVX512_BF16 only (vdpbf16ps sums pairs of products in float32).

#include "product.h"

namespace penstock {
namespace {

struct Dot {
    using Sum = float;
    using Vector = __m512;
    static Vector zero() { return _mm512_setzero_ps(); }
    static Vector load(const Sum *from) { return _mm512_load_ps(from); }
    static void store(Sum *to, Vector x) { _mm512_store_ps(to, x); }
    static Vector add(Vector sum, __m512i row, __m512i columns) {
        return _mm512_dpbf16_ps(sum, (__m512bh)row, (__m512bh)columns);
    }
};

template <int ACTIVATION>
void gated(const bf16 *x, int64_t stride, const bf16 *weights, bf16 *out, int64_t m, int64_t n, int64_t k,
           const bf16 *gate_bias, const bf16 *up_bias) {
    constexpr int kHalf = kPanel / 2;
    const auto finish = [&](float *sums, int64_t row, int rows, int64_t panel) {
        const int64_t first = panel * kHalf;
        const int width = static_cast<int>(std::min<int64_t>(kHalf, n - first));
        for (int r = 0; r < rows; r++) {
            float *gate = sums + r * kPanel, *up = gate + kHalf;
            if (gate_bias) {
                for (int c = 0; c < width; c++) gate[c] += widen(gate_bias[first + c]);
            }
            if (up_bias) {
                for (int c = 0; c < width; c++) up[c] += widen(up_bias[first + c]);
            }
            bf16 *to = out + (row + r) * n + first;
#pragma omp simd
            for (int c = 0; c < width; c++) narrow(activate<ACTIVATION>(gate[c]) * up[c], to[c]);
        }
    };
    product<Dot>(x, stride * 2, weights, m, (n + kHalf - 1) / kHalf, k * 2, finish);
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
            float *sum = sums + r * kPanel;
            const int64_t at = (row + r) * n + first;
            if (shift) {
                for (int c = 0; c < width; c++) sum[c] += widen(shift[first + c]);
            }
            if (add) {
                for (int c = 0; c < width; c++) sum[c] += widen(add[at + c]);
            }
            bf16 *to = reinterpret_cast<bf16 *>(out) + at;
#pragma omp simd
            for (int c = 0; c < width; c++) narrow(sum[c], to[c]);
        }
    };
    product<Dot>(x, stride * 2, weights, m, (n + kPanel - 1) / kPanel, k * 2, finish);
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
