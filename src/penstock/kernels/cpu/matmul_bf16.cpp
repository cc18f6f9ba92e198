// Products of bfloat16 activations with bfloat16 weights, for any number of rows: one for a single stream, thousands for
// a prompt. Sums are float32.

#include "product.h"

namespace penstock {
namespace {

// The rows that are multiplied: x itself, or their norms, in scratch memory of m * k numbers.
struct NormedRows {
    const uint16_t *values;
    int64_t stride;

    NormedRows(const penstock_matrix &w, void *scratch, const uint16_t *x, int64_t x_stride, int64_t m)
        : values(x), stride(x_stride) {
        if (w.norm.kind == kNoNorm) return;
        norm_rows(w.norm, x, x_stride, static_cast<uint16_t *>(scratch), m, w.k);
        values = static_cast<uint16_t *>(scratch), stride = w.k;
    }
};

template <int ACTIVATION>
void gated(const penstock_matrix &w, const NormedRows &x, int64_t m, uint16_t *out) {
    constexpr int kHalf = kPanel / 2;
    const auto finish = [&](float *sums, int64_t row, int rows, int64_t panel) {
        const int64_t first = panel * kHalf;
        const int width = static_cast<int>(std::min<int64_t>(kHalf, w.n - first));
        for (int r = 0; r < rows; r++) {
            write_gated_row<ACTIVATION>(sums + r * kPanel, width, from(w.biases[0], first), from(w.biases[1], first),
                                        reinterpret_cast<bf16 *>(out) + (row + r) * w.n + first);
        }
    };
    product<Bf16Dot>(x.values, x.stride * 2, w.weights, m, (w.n + kHalf - 1) / kHalf, w.k * 2, finish);
}

}  // namespace
}  // namespace penstock

using namespace penstock;

extern "C" {

// out[m, n] = norm(x[m, k]) x w + bias[n] + residual[m, n], all three optional. Rows of x lie `stride` apart. scratch:
// m * k numbers where there is a norm.
void penstock_matmul_bf16(const penstock_matrix *w, const uint16_t *x, int64_t stride, int64_t m,
                          const uint16_t *residual, uint16_t *out, void *scratch) {
    const NormedRows rows_of_x(*w, scratch, x, stride, m);
    const auto finish = [&](float *sums, int64_t row, int rows, int64_t panel) {
        const int64_t first = panel * kPanel;
        const int width = static_cast<int>(std::min<int64_t>(kPanel, w->n - first));
        for (int r = 0; r < rows; r++) {
            const int64_t at = (row + r) * w->n + first;
            write_row(sums + r * kPanel, width, from(w->biases[0], first), from(residual, at),
                      reinterpret_cast<bf16 *>(out) + at);
        }
    };
    product<Bf16Dot>(rows_of_x.values, rows_of_x.stride * 2, w->weights, m, (w->n + kPanel - 1) / kPanel, w->k * 2, finish);
}

// out[m, n] = activation(x x gate + gate_bias) * (x x up + up_bias); w: panels of 32 columns of gate and the same 32 of
// up. activation: 0 silu, 1 gelu by tanh, 2 relu.
void penstock_gated_bf16(const penstock_matrix *w, const uint16_t *x, int64_t stride, int64_t m, uint16_t *out,
                         void *scratch) {
    auto *chosen = w->activation == kSilu ? gated<kSilu> : w->activation == kGeluTanh ? gated<kGeluTanh> : gated<kRelu>;
    chosen(*w, NormedRows(*w, scratch, x, stride, m), m, out);
}
}
