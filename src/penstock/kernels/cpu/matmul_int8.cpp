// Products of 8-bit activations with 8-bit weights: four at a time in int32 (vpdpbusd, AVX512_VNNI), half the bytes and
// twice the arithmetic of bfloat16. Activations are quantized row by row at run time, weights column by column at load,
// both to [-127, 127] times a scale. The instruction wants one side unsigned, so activations are stored 128 up, and what
// that adds, 128 times the sum of a column, is taken off at the end.

#include "product.h"

#include <limits>

namespace penstock {
namespace {

struct Dot {
    using Sum = int32_t;
    typedef int32_t Vector __attribute__((vector_size(64)));  // GCC keeps arrays of __m512i in memory
    static Vector zero() { return Vector{}; }
    static Vector load(const Sum *from) { return *reinterpret_cast<const Vector *>(from); }
    static void store(Sum *to, Vector x) { *reinterpret_cast<Vector *>(to) = x; }
    static Vector add(Vector sum, __m512i row, __m512i columns) {
        return (Vector)_mm512_dpbusd_epi32((__m512i)sum, row, columns);
    }
};

// What turns a sum into a number: the scale of its column, and the sum that the offset of 128 has added.
struct Columns {
    const float *scale;
    const int32_t *offset;
    const bf16 *bias;  // or null

    void scaled(const int32_t *sums, int width, int64_t first, float row_scale, float *values) const {
#pragma omp simd
        for (int c = 0; c < width; c++) {
            values[c] = static_cast<float>(sums[c] - offset[first + c]) * (row_scale * scale[first + c]);
        }
    }
};

template <int ACTIVATION>
void gated(const uint8_t *x, const float *row_scales, const int8_t *weights, bf16 *out, int64_t m, int64_t n, int64_t k,
           Columns gates, Columns ups) {
    constexpr int kHalf = kPanel / 2;
    const auto finish = [&](int32_t *sums, int64_t row, int rows, int64_t panel) {
        const int64_t first = panel * kHalf;
        const int width = static_cast<int>(std::min<int64_t>(kHalf, n - first));
        alignas(64) float values[kPanel];
        for (int r = 0; r < rows; r++) {
            gates.scaled(sums + r * kPanel, width, first, row_scales[row + r], values);
            ups.scaled(sums + r * kPanel + kHalf, width, first, row_scales[row + r], values + kHalf);
            write_gated_row<ACTIVATION>(values, width, from(gates.bias, first), from(ups.bias, first),
                                        out + (row + r) * n + first);
        }
    };
    product<Dot>(x, k, weights, m, (n + kHalf - 1) / kHalf, k, finish);
}

}  // namespace
}  // namespace penstock

using namespace penstock;

extern "C" {

// x: m rows of k bfloat16, `stride` apart. out: [m, k], round(x / scale) + 128; scales: [m], the largest |x| / 127. A row
// with a NaN or an infinity gets the scale NaN, and so does everything that is made of it.
void penstock_quantize_rows_bf16(const uint16_t *x, int64_t stride, uint8_t *out, float *scales, int64_t m, int64_t k) {
#pragma omp parallel for if (m * k > 16384)
    for (int64_t r = 0; r < m; r++) {
        const bf16 *from = reinterpret_cast<const bf16 *>(x) + r * stride;
        uint8_t *to = out + r * k;
        float top = 0;
        int broken = 0;
#pragma omp simd reduction(max : top) reduction(| : broken)
        for (int64_t i = 0; i < k; i++) {
            const float size = std::fabs(widen(from[i]));
            top = size > top ? size : top;
            broken |= !(size <= std::numeric_limits<float>::max());
        }
        const float scale = top / 127.0f, inverse = top > 1e-30f && !broken ? 1.0f / scale : 0.0f;
#pragma omp simd
        for (int64_t i = 0; i < k; i++) {
            const float value = broken ? 0.0f : widen(from[i]) * inverse;
            to[i] = static_cast<uint8_t>(static_cast<int32_t>(value + 128.5f));
        }
        scales[r] = broken ? std::numeric_limits<float>::quiet_NaN() : scale;
    }
}

// weight: [n, k] contiguous, k a multiple of 4, as columns [offset, offset + width) of the panels of `out`: see
// pack_panels.
void penstock_pack_int8(const int8_t *weight, int8_t *out, int64_t n, int64_t k, int64_t offset, int64_t width) {
    pack_panels(reinterpret_cast<const char *>(weight), reinterpret_cast<char *>(out), n, k, offset, width);
}

// out[m, n] = x[m, k] x weights + bias[n] + residual[m, n], both optional. x, row_scales: of quantize_rows; scales: [n]
// of the weights; offsets: [n], 128 times the sum of each column.
void penstock_matmul_int8(const uint8_t *x, const float *row_scales, const int8_t *weights, const float *scales,
                          const int32_t *offsets, uint16_t *out, int64_t m, int64_t n, int64_t k, const uint16_t *bias,
                          const uint16_t *residual) {
    const Columns columns{scales, offsets, reinterpret_cast<const bf16 *>(bias)};
    const bf16 *add = reinterpret_cast<const bf16 *>(residual);
    const auto finish = [&](int32_t *sums, int64_t row, int rows, int64_t panel) {
        const int64_t first = panel * kPanel;
        const int width = static_cast<int>(std::min<int64_t>(kPanel, n - first));
        alignas(64) float values[kPanel];
        for (int r = 0; r < rows; r++) {
            const int64_t at = (row + r) * n + first;
            columns.scaled(sums + r * kPanel, width, first, row_scales[row + r], values);
            write_row(values, width, from(columns.bias, first), from(add, at), reinterpret_cast<bf16 *>(out) + at);
        }
    };
    product<Dot>(x, k, weights, m, (n + kPanel - 1) / kPanel, k, finish);
}

// out[m, n] = activation(x x gate + gate_bias) * (x x up + up_bias); weights: panels of 32 columns of gate and the same
// 32 of up. activation: 0 silu, 1 gelu by tanh, 2 relu. The biases are optional.
void penstock_gated_int8(const uint8_t *x, const float *row_scales, const int8_t *weights, const float *gate_scales,
                         const int32_t *gate_offsets, const float *up_scales, const int32_t *up_offsets, uint16_t *out,
                         int64_t m, int64_t n, int64_t k, const uint16_t *gate_bias, const uint16_t *up_bias,
                         int64_t activation) {
    auto *chosen = activation == kSilu ? gated<kSilu> : activation == kGeluTanh ? gated<kGeluTanh> : gated<kRelu>;
    chosen(x, row_scales, weights, reinterpret_cast<bf16 *>(out), m, n, k,
           Columns{gate_scales, gate_offsets, reinterpret_cast<const bf16 *>(gate_bias)},
           Columns{up_scales, up_offsets, reinterpret_cast<const bf16 *>(up_bias)});
}
}
