// Products of 8-bit activations with 4-bit weights. The weights of a group of inputs share one scale for each column; a
// group of a panel is [64] bfloat16 scales, then [inputs / 4][2][64] bytes, each with a weight of column c in its low
// half and one of column c + 16 in its high half, 8 up. What is read from memory is this; on the way to the registers a
// group becomes the panel of 8-bit weights that matmul_int8.cpp multiplies, in the first-level cache, once for all rows of
// a task. Activations: as there.

#include "product.h"

namespace penstock {
namespace {

constexpr int kQuads = kGroup / 4;

#if defined(__AVX2__) && !defined(__AVX512VNNI__) && !defined(__AVXVNNI__)

// Products of 8 with 4 bits, added in 16: two of at most 255 * 8 for each of the quads of a group fit exactly, so a group is
// widened once, and not each of its products.
struct Int4Dot {
    static constexpr int kRows = 4, kWidth = kLanes == 16 ? 4 : 2;
    using Vector = Ints;
    using Row = Ints;
    using Column = Ints;
    static_assert(kQuads * 2 * 255 * 8 <= 32767);
    static Row row(const char *from) {
        int32_t bytes;
        std::memcpy(&bytes, from, sizeof bytes);
        return every(bytes);
    }
    static Column column(const char *from) { return load_ints(from); }
    static Vector add(Vector sum, Row row, Column column) { return add16(sum, madd8(row, column)); }
    static Ints total(Vector sum) { return madd16(sum, every(0x00010001)); }
};

#else

struct Int4Dot : Int8Dot {
    static Ints total(Vector sum) { return sum; }
};

#endif

// sums[ROWS][64] (+)= scales[64] * (rows[ROWS][kGroup] x weights[kQuads][64][4]). FETCH lines a quad from `next` on.
template <int ROWS, int FETCH>
void tile(const uint8_t *rows, int64_t stride, const int8_t *weights, const float *scales, float *sums, bool first,
          const char *next) {
    constexpr int kWidth = Int4Dot::kWidth, kColumns = kWidth * kLanes;
    for (int part = 0; part < kPanel; part += kColumns) {
        Ints sum[ROWS][kWidth];
        for (int r = 0; r < ROWS; r++) {
            for (int j = 0; j < kWidth; j++) sum[r][j] = Ints{};
        }
#pragma GCC unroll 2
        for (int i = 0; i < kQuads; i++) {
            Int4Dot::Column columns[kWidth];
            for (int j = 0; j < kWidth; j++) {
                columns[j] = Int4Dot::column(reinterpret_cast<const char *>(weights) + (i * kPanel + part + j * kLanes) * 4);
            }
            if (part == 0) {
                for (int line = 0; line < FETCH; line++) __builtin_prefetch(next + (i * FETCH + line) * 64);
            }
#pragma GCC unroll 6
            for (int r = 0; r < ROWS; r++) {
                const Int4Dot::Row row = Int4Dot::row(reinterpret_cast<const char *>(rows) + r * stride + i * 4);
                for (int j = 0; j < kWidth; j++) sum[r][j] = Int4Dot::add(sum[r][j], row, columns[j]);
            }
        }
        for (int r = 0; r < ROWS; r++) {
            for (int j = 0; j < kWidth; j++) {
                float *to = sums + r * kPanel + part + j * kLanes;
                const Floats scale = *reinterpret_cast<const Floats *>(scales + part + j * kLanes);
                const Floats before = first ? Floats{} : *reinterpret_cast<const Floats *>(to);
                *reinterpret_cast<Floats *>(to) = fmadd(to_floats(Int4Dot::total(sum[r][j])), scale, before);
            }
        }
    }
}

template <int FETCH>
void tile_of(int count, const uint8_t *rows, int64_t stride, const int8_t *weights, const float *scales, float *sums,
             bool first, const char *next) {
    switch (count) {
        case 1: return tile<1, FETCH>(rows, stride, weights, scales, sums, first, next);
        case 2: return tile<2, FETCH>(rows, stride, weights, scales, sums, first, next);
        case 3: return tile<3, FETCH>(rows, stride, weights, scales, sums, first, next);
        case 4: return tile<4, FETCH>(rows, stride, weights, scales, sums, first, next);
        default: break;
    }
    if constexpr (Int4Dot::kRows > 4) {
        if (count == 5) return tile<5, FETCH>(rows, stride, weights, scales, sums, first, next);
        return tile<6, FETCH>(rows, stride, weights, scales, sums, first, next);
    }
}

// sums[rows][64] = x[rows][k] x one panel.
void panel_product(const uint8_t *x, int64_t k, const char *panel, float *sums, int rows) {
    const int tiles = (rows + Int4Dot::kRows - 1) / Int4Dot::kRows;
    alignas(64) int8_t weights[kQuads * 256];
    alignas(64) float scales[kPanel];
    for (int64_t group = 0; group < k / kGroup; group++, panel += kGroupBytes) {
        const bf16 *stored = reinterpret_cast<const bf16 *>(panel);
#pragma omp simd
        for (int c = 0; c < kPanel; c++) scales[c] = widen(stored[c]);
        const uint8_t *both = reinterpret_cast<const uint8_t *>(panel) + kPanel * 2;
        for (int i = 0; i < kQuads * 2; i++, both += 64) {
#pragma omp simd
            for (int c = 0; c < 64; c++) {
                weights[i * 128 + c] = static_cast<int8_t>((both[c] & 15) - 8);
                weights[i * 128 + 64 + c] = static_cast<int8_t>((both[c] >> 4) - 8);
            }
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

// Sums of `width` columns from `first` on become numbers.
void scale(const penstock_matrix &w, int part, float *sums, int width, int64_t first, float row_scale) {
    const float *offsets = static_cast<const float *>(w.offsets[part]) + first;
#pragma omp simd
    for (int c = 0; c < width; c++) sums[c] = (sums[c] - offsets[c]) * row_scale;
}

template <int ACTIVATION>
void gated(const penstock_matrix &w, const QuantizedRows &x, int64_t m, uint16_t *out) {
    constexpr int kHalf = kPanel / 2;
    const auto finish = [&](float *sums, int64_t row, int rows, int64_t panel) {
        const int64_t first = panel * kHalf;
        const int width = static_cast<int>(std::min<int64_t>(kHalf, w.n - first));
        for (int r = 0; r < rows; r++) {
            scale(w, 0, sums + r * kPanel, width, first, x.scales[row + r]);
            scale(w, 1, sums + r * kPanel + kHalf, width, first, x.scales[row + r]);
            write_gated_row<ACTIVATION>(sums + r * kPanel, width, from(w.biases[0], first), from(w.biases[1], first),
                                        reinterpret_cast<bf16 *>(out) + (row + r) * w.n + first);
        }
    };
    product4(x.values, static_cast<const uint8_t *>(w.weights), m, (w.n + kHalf - 1) / kHalf, w.k, finish);
}

}  // namespace
}  // namespace penstock

using namespace penstock;

extern "C" {

// As the products of matmul_bf16.cpp. scratch: m * (k + 4) bytes.
void penstock_matmul_int4(const penstock_matrix *w, const uint16_t *x, int64_t stride, int64_t m,
                          const uint16_t *residual, uint16_t *out, void *scratch) {
    const QuantizedRows rows_of_x(*w, scratch, x, stride, m);
    const auto finish = [&](float *sums, int64_t row, int rows, int64_t panel) {
        const int64_t first = panel * kPanel;
        const int width = static_cast<int>(std::min<int64_t>(kPanel, w->n - first));
        for (int r = 0; r < rows; r++) {
            const int64_t at = (row + r) * w->n + first;
            scale(*w, 0, sums + r * kPanel, width, first, rows_of_x.scales[row + r]);
            write_row(sums + r * kPanel, width, from(w->biases[0], first), from(residual, at),
                      reinterpret_cast<bf16 *>(out) + at);
        }
    };
    product4(rows_of_x.values, static_cast<const uint8_t *>(w->weights), m, (w->n + kPanel - 1) / kPanel, w->k, finish);
}

void penstock_gated_int4(const penstock_matrix *w, const uint16_t *x, int64_t stride, int64_t m, uint16_t *out,
                         void *scratch) {
    const QuantizedRows rows(*w, scratch, x, stride, m);
    auto *chosen = w->activation == kSilu ? gated<kSilu> : w->activation == kGeluTanh ? gated<kGeluTanh> : gated<kRelu>;
    chosen(*w, rows, m, out);
}
}
