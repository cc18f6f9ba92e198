// Products of bfloat16 activations with bfloat16 weights, for any number of rows: one for a single stream, thousands for
// a prompt. AVX512_BF16 only (vdpbf16ps sums pairs of products in float32).
//
// Weights are packed in panels of 64 output columns, a pair of inputs after the other: [columns / 64][inputs / 2][64][2].
// A tile of up to 6 rows by one panel keeps its 24 sums in registers. Tiles share the stretch of a panel that lies in
// the first-level cache, and while they multiply it they fetch the next one: memory and arithmetic overlap, which is
// what a step with some tens of rows needs. Every sum is made in the same order whatever the number of rows, so a row's
// result does not depend on its batch.

#include "common.h"

#include <immintrin.h>

#include <algorithm>

namespace penstock {
namespace {

constexpr int kPanel = 64;     // output columns of a panel: 4 registers of 16
constexpr int kTileRows = 6;   // rows of a tile: 6 x 4 sums, 4 weights and 1 activation fit 32 registers
constexpr int kBlockRows = 96; // rows of a task; its sums stay in the second-level cache
constexpr int kLines = 4;      // cache lines of a pair of inputs in a panel

// sums[ROWS][64] (+)= rows[ROWS][2 * pairs] x weights[pairs][64][2]. FETCH lines a pair are fetched from `next` on.
template <int ROWS, int FETCH>
void tile(const bf16 *__restrict rows, int64_t stride, const bf16 *__restrict weights, float *__restrict sums,
          int pairs, bool first, const char *next) {
    __m512 sum[ROWS][4];
    for (int r = 0; r < ROWS; r++) {
        for (int j = 0; j < 4; j++) sum[r][j] = first ? _mm512_setzero_ps() : _mm512_load_ps(sums + r * kPanel + j * 16);
    }
    for (int i = 0; i < pairs; i++) {
        __m512bh column[4];
        for (int j = 0; j < 4; j++) {
            column[j] = (__m512bh)_mm512_load_si512(weights + (i * kPanel + j * 16) * 2);
        }
        for (int line = 0; line < FETCH; line++) _mm_prefetch(next + (i * FETCH + line) * 64, _MM_HINT_T0);
#pragma GCC unroll 6
        for (int r = 0; r < ROWS; r++) {
            int32_t pair;
            std::memcpy(&pair, rows + r * stride + i * 2, sizeof pair);
            const __m512bh row = (__m512bh)_mm512_set1_epi32(pair);
            for (int j = 0; j < 4; j++) sum[r][j] = _mm512_dpbf16_ps(sum[r][j], row, column[j]);
        }
    }
    for (int r = 0; r < ROWS; r++) {
        for (int j = 0; j < 4; j++) _mm512_store_ps(sums + r * kPanel + j * 16, sum[r][j]);
    }
}

template <int FETCH>
void tile_of(int rows, const bf16 *a, int64_t stride, const bf16 *weights, float *sums, int pairs, bool first,
             const char *next) {
    switch (rows) {
        case 1: return tile<1, FETCH>(a, stride, weights, sums, pairs, first, next);
        case 2: return tile<2, FETCH>(a, stride, weights, sums, pairs, first, next);
        case 3: return tile<3, FETCH>(a, stride, weights, sums, pairs, first, next);
        case 4: return tile<4, FETCH>(a, stride, weights, sums, pairs, first, next);
        case 5: return tile<5, FETCH>(a, stride, weights, sums, pairs, first, next);
        default: return tile<6, FETCH>(a, stride, weights, sums, pairs, first, next);
    }
}

// sums[rows][64] = a[rows][k] x one panel.
void panel_product(const bf16 *a, int64_t stride, const bf16 *panel, float *sums, int rows, int64_t k, int depth) {
    const int tiles = (rows + kTileRows - 1) / kTileRows;
    const int share = tiles == 1 ? kLines : tiles <= 3 ? 2 : 1;  // lines that each tile fetches, until all are
    for (int64_t start = 0; start < k; start += depth) {
        const int pairs = static_cast<int>(std::min<int64_t>(depth, k - start) / 2);
        const bf16 *weights = panel + start * kPanel;
        const char *next = reinterpret_cast<const char *>(panel + (start + depth) * kPanel);
        for (int t = 0, done = 0; t < tiles; t++) {
            const int count = (rows - done + tiles - t - 1) / (tiles - t);  // tiles of like size
            const bool fetches = t * share < kLines;
            auto *chosen = !fetches ? tile_of<0> : share == 4 ? tile_of<4> : share == 2 ? tile_of<2> : tile_of<1>;
            chosen(count, a + done * stride + start, stride, weights, sums + done * kPanel, pairs, start == 0,
                   next + static_cast<int64_t>(t) * pairs * share * 64);
            done += count;
        }
    }
}

// Runs finish(sums, first row, rows, panel) for every task of a product of m rows and so many panels.
template <typename Finish>
void product(const bf16 *a, int64_t stride, const bf16 *weights, int64_t m, int64_t panels, int64_t k,
             const Finish &finish) {
    const int64_t blocks = (m + kBlockRows - 1) / kBlockRows, height = (m + blocks - 1) / std::max<int64_t>(blocks, 1);
    const int depth = m <= 64 ? 128 : 256;
#pragma omp parallel for collapse(2) schedule(dynamic, 2)
    for (int64_t b = 0; b < blocks; b++) {
        for (int64_t p = 0; p < panels; p++) {
            alignas(64) float sums[kBlockRows * kPanel];
            const int64_t row = b * height;
            const int rows = static_cast<int>(std::min(height, m - row));
            if (rows <= 0) continue;
            panel_product(a + row * stride, stride, weights + p * k * kPanel, sums, rows, k, depth);
            finish(sums, row, rows, p);
        }
    }
}

enum Activation { kSilu, kGeluTanh, kRelu };

template <int ACTIVATION>
inline float activate(float x) {
    if (ACTIVATION == kRelu) return x > 0 || x != x ? x : 0.0f;
    // both are x * sigmoid(z); tanh(u) = 2 * sigmoid(2u) - 1 makes gelu so (Hendrycks & Gimpel 2016)
    const float z = ACTIVATION == kSilu ? x : 1.59576912160573f * (x + 0.044715f * x * x * x);
    const float e = exp_nonpositive(z < 0 ? z : -z);
    return x * ((z < 0 ? e : 1.0f) / (1.0f + e));
}

template <int ACTIVATION>
void gated(const bf16 *x, int64_t stride, const bf16 *weights, bf16 *out, int64_t m, int64_t n, int64_t k,
           const bf16 *gate_bias, const bf16 *up_bias) {
    constexpr int kHalf = kPanel / 2;
    product(x, stride, weights, m, (n + kHalf - 1) / kHalf, k, [&](float *sums, int64_t row, int rows, int64_t panel) {
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
    });
}

}  // namespace
}  // namespace penstock

using namespace penstock;

extern "C" {

// weight: [n, k] contiguous, k even. Its rows become columns [offset, offset + width) of each panel of `out`: 64 wide
// alone, or two matrices of 32 side by side. out: [panels][k / 2][64][2], zeroed where columns are missing.
void penstock_pack_bf16(const uint16_t *weight, uint16_t *out, int64_t n, int64_t k, int64_t offset, int64_t width) {
#pragma omp parallel for schedule(static)
    for (int64_t first = 0; first < n; first += width) {
        uint16_t *panel = out + first / width * k * kPanel + offset * 2;
        const int64_t columns = std::min(width, n - first);
        for (int64_t start = 0; start < k; start += 32) {  // a cache line of each row at a time
            const int64_t end = std::min<int64_t>(start + 32, k);
            for (int64_t c = 0; c < columns; c++) {
                const uint16_t *from = weight + (first + c) * k;
                for (int64_t i = start; i < end; i += 2) std::memcpy(panel + i * kPanel + c * 2, from + i, 4);
            }
        }
    }
}

// out[m, n] = x[m, k] x weights + bias[n] + residual[m, n], both optional. Rows of x lie `stride` apart.
void penstock_matmul_bf16(const uint16_t *x, int64_t stride, const uint16_t *weights, uint16_t *out, int64_t m,
                          int64_t n, int64_t k, const uint16_t *bias, const uint16_t *residual) {
    const bf16 *shift = reinterpret_cast<const bf16 *>(bias), *add = reinterpret_cast<const bf16 *>(residual);
    product(reinterpret_cast<const bf16 *>(x), stride, reinterpret_cast<const bf16 *>(weights), m,
            (n + kPanel - 1) / kPanel, k, [&](float *sums, int64_t row, int rows, int64_t panel) {
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
            });
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
