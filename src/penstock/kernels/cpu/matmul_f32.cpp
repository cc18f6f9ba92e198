// Products of float32 activations with float32 weights, as those of matmul_bf16.cpp.

#include "product.h"

namespace penstock {
namespace {

template <int ACTIVATION>
void gated(const penstock_matrix &w, const float *x, int64_t stride, int64_t m, float *out) {
    constexpr int kHalf = kPanel / 2;
    const auto finish = [&](float *sums, int64_t row, int rows, int64_t panel) {
        const int64_t first = panel * kHalf;
        const int width = static_cast<int>(std::min<int64_t>(kHalf, w.n - first));
        for (int r = 0; r < rows; r++) {
            write_gated_row<ACTIVATION>(sums + r * kPanel, width, from<float>(w.biases[0], first),
                                        from<float>(w.biases[1], first), out + (row + r) * w.n + first);
        }
    };
    product<F32Dot>(x, stride * 4, w.weights, m, (w.n + kHalf - 1) / kHalf, w.k * 4, finish);
}

}  // namespace
}  // namespace penstock

using namespace penstock;

extern "C" {

void penstock_matmul_f32(const penstock_matrix *w, const float *x, int64_t stride, int64_t m, const float *residual,
                         float *out, void *) {
    const auto finish = [&](float *sums, int64_t row, int rows, int64_t panel) {
        const int64_t first = panel * kPanel;
        const int width = static_cast<int>(std::min<int64_t>(kPanel, w->n - first));
        for (int r = 0; r < rows; r++) {
            const int64_t at = (row + r) * w->n + first;
            write_row(sums + r * kPanel, width, from<float>(w->biases[0], first), from<float>(residual, at), out + at);
        }
    };
    product<F32Dot>(x, stride * 4, w->weights, m, (w->n + kPanel - 1) / kPanel, w->k * 4, finish);
}

void penstock_gated_f32(const penstock_matrix *w, const float *x, int64_t stride, int64_t m, float *out, void *) {
    auto *chosen = w->activation == kSilu ? gated<kSilu> : w->activation == kGeluTanh ? gated<kGeluTanh> : gated<kRelu>;
    chosen(*w, x, stride, m, out);
}
}
