// Products of 8-bit activations with 4-bit weights. The weights of a group of inputs share one scale for each column; a
// group of a panel is [64] bfloat16 scales, then [inputs / 4][2][64] bytes, each with a weight of column c in its low
// half and one of column c + 16 in its high half, 8 up. What is read from memory is this; on the way to the registers a
// group becomes the panel of 8-bit weights that matmul_int8.cpp multiplies, in the first-level cache, once for all rows of
// a task. Activations: as there.

#include "product.h"

#include <limits>

namespace penstock {
namespace {

constexpr int kGroup = 32;                              // inputs that share a scale
constexpr int kQuads = kGroup / 4;
constexpr int kGroupBytes = kPanel * 2 + kQuads * 128;  // scales and weights of a group of a panel

typedef int32_t Lanes __attribute__((vector_size(64)));  // GCC keeps arrays of __m512i in memory

// sums[ROWS][64] (+)= scales[64] * (rows[ROWS][kGroup] x weights[kQuads][64][4]). FETCH lines a quad from `next` on.
template <int ROWS, int FETCH>
void tile(const uint8_t *rows, int64_t stride, const int8_t *weights, const __m512 *scales, float *sums, bool first,
          const char *next) {
    Lanes sum[ROWS][4];
    for (int r = 0; r < ROWS; r++) {
        for (int j = 0; j < 4; j++) sum[r][j] = Lanes{};
    }
#pragma GCC unroll 2
    for (int i = 0; i < kQuads; i++) {
        __m512i columns[4];
        for (int j = 0; j < 4; j++) columns[j] = _mm512_load_si512(weights + (i * 4 + j) * 64);
        for (int line = 0; line < FETCH; line++) _mm_prefetch(next + (i * FETCH + line) * 64, _MM_HINT_T0);
#pragma GCC unroll 6
        for (int r = 0; r < ROWS; r++) {
            int32_t quad;
            std::memcpy(&quad, rows + r * stride + i * 4, sizeof quad);
            const __m512i row = _mm512_set1_epi32(quad);
            for (int j = 0; j < 4; j++) sum[r][j] = (Lanes)_mm512_dpbusd_epi32((__m512i)sum[r][j], row, columns[j]);
        }
    }
    for (int r = 0; r < ROWS; r++) {
        for (int j = 0; j < 4; j++) {
            float *to = sums + r * kPanel + j * 16;
            const __m512 before = first ? _mm512_setzero_ps() : _mm512_load_ps(to);
            _mm512_store_ps(to, _mm512_fmadd_ps(_mm512_cvtepi32_ps((__m512i)sum[r][j]), scales[j], before));
        }
    }
}

template <int FETCH>
void tile_of(int count, const uint8_t *rows, int64_t stride, const int8_t *weights, const __m512 *scales, float *sums,
             bool first, const char *next) {
    switch (count) {
        case 1: return tile<1, FETCH>(rows, stride, weights, scales, sums, first, next);
        case 2: return tile<2, FETCH>(rows, stride, weights, scales, sums, first, next);
        case 3: return tile<3, FETCH>(rows, stride, weights, scales, sums, first, next);
        case 4: return tile<4, FETCH>(rows, stride, weights, scales, sums, first, next);
        case 5: return tile<5, FETCH>(rows, stride, weights, scales, sums, first, next);
        default: return tile<6, FETCH>(rows, stride, weights, scales, sums, first, next);
    }
}

// sums[rows][64] = x[rows][k] x one panel.
void panel_product(const uint8_t *x, int64_t k, const char *panel, float *sums, int rows) {
    const int tiles = (rows + kTileRows - 1) / kTileRows;
    const __m512i low = _mm512_set1_epi8(15), eight = _mm512_set1_epi8(8);
    alignas(64) int8_t weights[kQuads * 256];
    for (int64_t group = 0; group < k / kGroup; group++, panel += kGroupBytes) {
        __m512 scales[4];
        for (int j = 0; j < 4; j++) {
            const __m256i half = _mm256_load_si256(reinterpret_cast<const __m256i *>(panel) + j);
            scales[j] = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
        }
        for (int i = 0; i < kQuads * 2; i++) {
            const __m512i both = _mm512_load_si512(panel + kPanel * 2 + i * 64);
            const __m512i high = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
            _mm512_store_si512(weights + i * 128, _mm512_sub_epi8(_mm512_and_si512(both, low), eight));
            _mm512_store_si512(weights + i * 128 + 64, _mm512_sub_epi8(high, eight));
        }
        // the groups that are fetched lie some way ahead: one is too short a time for memory to answer
        const char *next = panel + 3 * kGroupBytes;
        for (int t = 0, done = 0; t < tiles; t++) {
            const int count = (rows - done + tiles - t - 1) / (tiles - t);  // tiles of like size
            auto *chosen = t > 1 ? tile_of<0> : tiles == 1 ? tile_of<3> : tile_of<2>;
            chosen(count, x + done * k + group * kGroup, k, weights, scales, sums + done * kPanel, group == 0,
                   next + t * kQuads * 2 * 64);
            done += count;
        }
    }
}

// Runs finish(sums, first row, rows, panel) for every task of a product of m rows and so many panels.
template <typename Finish>
void product4(const uint8_t *x, const uint8_t *weights, int64_t m, int64_t panels, int64_t k, const Finish &finish) {
    const int64_t blocks = (m + kBlockRows - 1) / kBlockRows, height = (m + blocks - 1) / std::max<int64_t>(blocks, 1);
    const int share = task_share(blocks * panels);
#pragma omp parallel for collapse(2) schedule(dynamic, share)
    for (int64_t b = 0; b < blocks; b++) {
        for (int64_t p = 0; p < panels; p++) {
            alignas(64) float sums[kBlockRows * kPanel];
            const int64_t row = b * height;
            const int rows = static_cast<int>(std::min(height, m - row));
            if (rows <= 0) continue;
            panel_product(x + row * k, k, reinterpret_cast<const char *>(weights) + p * (k / kGroup) * kGroupBytes, sums,
                          rows);
            finish(sums, row, rows, p);
        }
    }
}

// What turns a sum into a number: the sum that the offset of 128 has added.
struct Columns {
    const float *offset;
    const bf16 *bias;  // or null

    void scale(float *sums, int width, int64_t first, float row_scale) const {
#pragma omp simd
        for (int c = 0; c < width; c++) sums[c] = (sums[c] - offset[first + c]) * row_scale;
    }
};

template <int ACTIVATION>
void gated(const uint8_t *x, const float *row_scales, const uint8_t *weights, bf16 *out, int64_t m, int64_t n, int64_t k,
           Columns gates, Columns ups) {
    constexpr int kHalf = kPanel / 2;
    const auto finish = [&](float *sums, int64_t row, int rows, int64_t panel) {
        const int64_t first = panel * kHalf;
        const int width = static_cast<int>(std::min<int64_t>(kHalf, n - first));
        for (int r = 0; r < rows; r++) {
            gates.scale(sums + r * kPanel, width, first, row_scales[row + r]);
            ups.scale(sums + r * kPanel + kHalf, width, first, row_scales[row + r]);
            write_gated_row<ACTIVATION>(sums + r * kPanel, width, from(gates.bias, first), from(ups.bias, first),
                                        out + (row + r) * n + first);
        }
    };
    product4(x, weights, m, (n + kHalf - 1) / kHalf, k, finish);
}

// The scale of a group, of a few tried, that leaves the least squared error: with 4 bits the largest weight is not always
// worth its reach.
float best_scale(const float *w) {
    float top = 0, signed_top = 0;
    for (int i = 0; i < kGroup; i++) {
        if (std::fabs(w[i]) > top) top = std::fabs(w[i]), signed_top = w[i];
    }
    if (!(top > 1e-30f)) return 0;
    float best = 0, least = std::numeric_limits<float>::infinity();
    for (const float reach : {-8.6f, -8.0f, -7.4f, 7.0f, 7.6f, 8.2f}) {  // of 4 bits, -8 is the furthest
        float scale = reach < 0 ? signed_top / reach : top / reach;
        bf16 stored;
        narrow(scale, stored);
        scale = widen(stored);
        const float inverse = 1.0f / scale;
        float error = 0;
#pragma omp simd reduction(+ : error)
        for (int i = 0; i < kGroup; i++) {
            float q = std::floor(w[i] * inverse + 0.5f);
            q = q < -8 ? -8.0f : q > 7 ? 7.0f : q;
            const float left = w[i] - q * scale;
            error += left * left;
        }
        if (error < least) least = error, best = scale;
    }
    return best;
}

}  // namespace
}  // namespace penstock

using namespace penstock;

extern "C" {

// weight: [n, k] contiguous bfloat16, k a multiple of the group, quantized into columns [offset, offset + width) of the
// panels of `out`: 64 wide alone, or two matrices of 32 side by side. out: [panels][k / group][kGroupBytes], zeroed.
// offsets: [n], 128 times the sum of each column.
void penstock_pack_int4(const uint16_t *weight, uint8_t *out, float *offsets, int64_t n, int64_t k, int64_t offset,
                        int64_t width) {
#pragma omp parallel for schedule(dynamic)
    for (int64_t first = 0; first < n; first += width) {
        uint8_t *panel = out + first / width * (k / kGroup) * kGroupBytes;
        for (int64_t row = first; row < std::min(first + width, n); row++) {
            const int64_t column = row - first + offset, place = column / 32 * 64 + column % 16 * 4;
            const int shift = column / 16 % 2 * 4;
            float total = 0;
            for (int64_t group = 0; group < k / kGroup; group++) {
                uint8_t *to = panel + group * kGroupBytes;
                float w[kGroup];
                for (int i = 0; i < kGroup; i++) {
                    w[i] = widen(reinterpret_cast<const bf16 *>(weight)[row * k + group * kGroup + i]);
                }
                const float scale = best_scale(w), inverse = scale != 0 ? 1.0f / scale : 0.0f;
                narrow(scale, reinterpret_cast<bf16 *>(to)[column]);
                for (int i = 0; i < kGroup; i++) {
                    float q = std::floor(w[i] * inverse + 0.5f);
                    q = q < -8 ? -8.0f : q > 7 ? 7.0f : q == q ? q : 0.0f;
                    total += scale * q;
                    to[kPanel * 2 + i / 4 * 128 + place + i % 4] |= static_cast<uint8_t>(static_cast<int>(q + 8) << shift);
                }
            }
            offsets[row] = 128.0f * total;
        }
    }
}

// out[m, n] = x[m, k] x weights + bias[n] + residual[m, n], both optional. x, row_scales: of quantize_rows.
void penstock_matmul_int4(const uint8_t *x, const float *row_scales, const uint8_t *weights, const float *offsets,
                          uint16_t *out, int64_t m, int64_t n, int64_t k, const uint16_t *bias,
                          const uint16_t *residual) {
    const Columns columns{offsets, reinterpret_cast<const bf16 *>(bias)};
    const bf16 *add = reinterpret_cast<const bf16 *>(residual);
    const auto finish = [&](float *sums, int64_t row, int rows, int64_t panel) {
        const int64_t first = panel * kPanel;
        const int width = static_cast<int>(std::min<int64_t>(kPanel, n - first));
        for (int r = 0; r < rows; r++) {
            const int64_t at = (row + r) * n + first;
            columns.scale(sums + r * kPanel, width, first, row_scales[row + r]);
            write_row(sums + r * kPanel, width, from(columns.bias, first), from(add, at),
                      reinterpret_cast<bf16 *>(out) + at);
        }
    };
    product4(x, weights, m, (n + kPanel - 1) / kPanel, k, finish);
}

// out[m, n] = activation(x x gate + gate_bias) * (x x up + up_bias); weights: panels of 32 columns of gate and the same
// 32 of up. activation: 0 silu, 1 gelu by tanh, 2 relu. The biases are optional.
void penstock_gated_int4(const uint8_t *x, const float *row_scales, const uint8_t *weights, const float *gate_offsets,
                         const float *up_offsets, uint16_t *out, int64_t m, int64_t n, int64_t k,
                         const uint16_t *gate_bias, const uint16_t *up_bias, int64_t activation) {
    auto *chosen = activation == kSilu ? gated<kSilu> : activation == kGeluTanh ? gated<kGeluTanh> : gated<kRelu>;
    chosen(x, row_scales, weights, reinterpret_cast<bf16 *>(out), m, n, k,
           Columns{gate_offsets, reinterpret_cast<const bf16 *>(gate_bias)},
           Columns{up_offsets, reinterpret_cast<const bf16 *>(up_bias)});
}
}
