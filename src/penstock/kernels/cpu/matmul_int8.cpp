// Products of 8-bit activations with 8-bit weights, summed exactly in int32: half the bytes and, with VNNI, twice the
// arithmetic of bfloat16. Activations are quantized row by row at run time, weights column by column at load,
// both to [-127, 127] times a scale. VNNI wants one side unsigned, so activations are stored 128 up, and what
// that adds, 128 times the sum of a column, is taken off at the end.

#include "product.h"

namespace penstock {
namespace {

// Sums of `width` columns from `first` on become numbers.
void scale(const penstock_matrix &w, int part, const int32_t *sums, int width, int64_t first, float row_scale,
           float *values) {
    const float *scales = w.scales[part] + first;
    const int32_t *offsets = static_cast<const int32_t *>(w.offsets[part]) + first;
#pragma omp simd
    for (int c = 0; c < width; c++) values[c] = static_cast<float>(sums[c] - offsets[c]) * (row_scale * scales[c]);
}

template <int ACTIVATION>
void gated(const penstock_matrix &w, const QuantizedRows &x, int64_t m, uint16_t *out) {
    constexpr int kHalf = kPanel / 2;
    const auto finish = [&](int32_t *sums, int64_t row, int rows, int64_t panel) {
        const int64_t first = panel * kHalf;
        const int width = static_cast<int>(std::min<int64_t>(kHalf, w.n - first));
        alignas(64) float values[kPanel];
        for (int r = 0; r < rows; r++) {
            scale(w, 0, sums + r * kPanel, width, first, x.scales[row + r], values);
            scale(w, 1, sums + r * kPanel + kHalf, width, first, x.scales[row + r], values + kHalf);
            write_gated_row<ACTIVATION>(values, width, from(w.biases[0], first), from(w.biases[1], first),
                                        reinterpret_cast<bf16 *>(out) + (row + r) * w.n + first);
        }
    };
    product<Int8Dot>(x.values, w.k, w.weights, m, (w.n + kHalf - 1) / kHalf, w.k, finish);
}

}  // namespace
}  // namespace penstock

using namespace penstock;

extern "C" {

// As the products of matmul_bf16.cpp. scratch: m * (k + 4) bytes.
void penstock_matmul_int8(const penstock_matrix *w, const uint16_t *x, int64_t stride, int64_t m,
                          const uint16_t *residual, uint16_t *out, void *scratch) {
    const QuantizedRows rows_of_x(*w, scratch, x, stride, m);
    const auto finish = [&](int32_t *sums, int64_t row, int rows, int64_t panel) {
        const int64_t first = panel * kPanel;
        const int width = static_cast<int>(std::min<int64_t>(kPanel, w->n - first));
        alignas(64) float values[kPanel];
        for (int r = 0; r < rows; r++) {
            const int64_t at = (row + r) * w->n + first;
            scale(*w, 0, sums + r * kPanel, width, first, rows_of_x.scales[row + r], values);
            write_row(values, width, from(w->biases[0], first), from(residual, at), reinterpret_cast<bf16 *>(out) + at);
        }
    };
    product<Int8Dot>(rows_of_x.values, w->k, w->weights, m, (w->n + kPanel - 1) / kPanel, w->k, finish);
}

void penstock_gated_int8(const penstock_matrix *w, const uint16_t *x, int64_t stride, int64_t m, uint16_t *out,
                         void *scratch) {
    const QuantizedRows rows(*w, scratch, x, stride, m);
    auto *chosen = w->activation == kSilu ? gated<kSilu> : w->activation == kGeluTanh ? gated<kGeluTanh> : gated<kRelu>;
    chosen(*w, rows, m, out);
}
}
