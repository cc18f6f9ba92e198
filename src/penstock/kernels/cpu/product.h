// The loops of a product of activations with packed weights, for any type whose dots lie in `Dot`.
//
// Weights are packed in panels of 64 output columns, four bytes of inputs after the other: [columns / 64][bytes / 4][64][4]
// bytes. A tile of a few rows by some columns of a panel keeps its sums in registers. Tiles share the stretch of a panel
// that lies in the first-level cache, and while they multiply it they fetch the next one: memory and arithmetic overlap,
// which is what a step with some tens of rows needs. Every sum is made in the same order whatever the number of rows, so a
// row's result does not depend on its batch.
//
// A type Dot says how four bytes of a row meet four bytes of kLanes columns: Sum (float or int32_t), Vector (of them),
// Row and Column, prepared by row(const char *) and column(const char *), add(Vector, Row, Column); kRows by kWidth vectors
// are a tile.
#pragma once

#include "common.h"
#include "lanes.h"
#include "norms.h"

#include <omp.h>

#include <algorithm>

extern "C" {

// A packed matrix [k inputs, n outputs], or the two of a gated MLP: what belongs to the gate comes first. norm: what rows go
// through before they are multiplied.
struct penstock_matrix {
    const void *weights;          // panels
    const float *scales[2];       // of 8-bit columns
    const void *offsets[2];       // of quantized columns, what is too much in a sum because rows are stored 128 up
    const void *biases[2];        // of the type of the rows, or null
    int64_t n, k, activation;
    penstock_norm norm;
};
}

namespace penstock {

constexpr int kPanel = 64;      // output columns of a panel
constexpr int kBlockRows = 96;  // rows of a task; its sums stay in the second-level cache
constexpr int kLines = 4;       // cache lines of four bytes of inputs in a panel
constexpr int kGroup = 32;      // inputs that share a scale in 4 bits
constexpr int kGroupBytes = kPanel * 2 + kPanel * kGroup / 2;  // scales and weights of a group of a panel

#if defined(__AVX512BF16__) || defined(__AVX512VNNI__)

// What dots that take four bytes as they are have in common.
struct WholeBytes {
    static constexpr int kRows = 6, kWidth = 4;  // 24 sums, 4 columns and 1 row fit 32 registers
    using Row = __m512i;
    using Column = __m512i;
    static Row row(const char *from) {
        int32_t bytes;
        std::memcpy(&bytes, from, sizeof bytes);
        return _mm512_set1_epi32(bytes);
    }
    static Column column(const char *from) { return _mm512_load_si512(from); }
};

#endif

#ifdef __AVX512BF16__

// Pairs of bfloat16, summed in float32 (vdpbf16ps).
struct Bf16Dot : WholeBytes {
    using Sum = float;
    using Vector = Floats;
    static Vector add(Vector sum, Row row, Column column) {
        return _mm512_dpbf16_ps(sum, (__m512bh)row, (__m512bh)column);
    }
};

#else

// The same by two float32 products: a bfloat16 is the upper half of a float32.
struct Bf16Dot {
    static constexpr int kRows = 4, kWidth = kLanes == 16 ? 4 : 2;
    using Sum = float;
    using Vector = Floats;
    struct Row {
        Floats even, odd;
    };
    using Column = Row;
    static Row row(const char *from) {
        int32_t pair;
        std::memcpy(&pair, from, sizeof pair);
        return widened(every(pair));
    }
    static Column column(const char *from) { return widened(load_ints(from)); }
    static Row widened(Ints pairs) {
        return {as_floats(pairs << 16), as_floats(pairs & static_cast<int32_t>(0xffff0000))};
    }
    static Vector add(Vector sum, const Row &row, const Column &column) {
        return fmadd(row.odd, column.odd, fmadd(row.even, column.even, sum));
    }
};

#endif

// One float32.
struct F32Dot {
    static constexpr int kRows = kLanes == 4 ? 4 : 6, kWidth = kLanes == 16 ? 4 : 2;
    using Sum = float;
    using Vector = Floats;
    using Row = Floats;
    using Column = Floats;
    static Row row(const char *from) {
        float number;
        std::memcpy(&number, from, sizeof number);
        return every(number);
    }
    static Column column(const char *from) { return as_floats(load_ints(from)); }
    static Vector add(Vector sum, Row row, Column column) { return fmadd(row, column, sum); }
};

#ifdef __AVX512VNNI__

// Four products of unsigned with signed 8 bits, summed in int32 (vpdpbusd).
struct Int8Dot : WholeBytes {
    using Sum = int32_t;
    using Vector = Ints;
    static Vector add(Vector sum, Row row, Column column) {
        return (Ints)_mm512_dpbusd_epi32((__m512i)sum, row, column);
    }
};

#elif defined(__AVXVNNI__)

// The same, eight columns at a time.
struct Int8Dot {
    static constexpr int kRows = 6, kWidth = 2;
    using Sum = int32_t;
    using Vector = Ints;
    using Row = Ints;
    using Column = Ints;
    static Row row(const char *from) {
        int32_t bytes;
        std::memcpy(&bytes, from, sizeof bytes);
        return every(bytes);
    }
    static Column column(const char *from) { return load_ints(from); }
    static Vector add(Vector sum, Row row, Column column) {
        return (Ints)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)row, (__m256i)column);
    }
};

#elif defined(__ARM_FEATURE_DOTPROD)

// The same of signed with signed: rows come down again by what they were stored up.
struct Int8Dot {
    static constexpr int kRows = 6, kWidth = 4;
    using Sum = int32_t;
    using Vector = Ints;
    using Row = Ints;
    using Column = Ints;
    static Row row(const char *from) {
        uint32_t bytes;
        std::memcpy(&bytes, from, sizeof bytes);
        return every(static_cast<int32_t>(bytes ^ 0x80808080u));
    }
    static Column column(const char *from) { return load_ints(from); }
    static Vector add(Vector sum, Row row, Column column) {
        return (Ints)vdotq_s32((int32x4_t)sum, (int8x16_t)row, (int8x16_t)column);
    }
};

#else

// The same by products of 16 bits.
struct Int8Dot {
    static constexpr int kRows = 4, kWidth = kLanes == 16 ? 4 : 2;
    using Sum = int32_t;
    using Vector = Ints;
    struct Row {
        Ints even, odd;
    };
    using Column = Row;
    static Row row(const char *from) {
        int32_t quad;
        std::memcpy(&quad, from, sizeof quad);
        return {every(quad) & 0x00ff00ff, every(quad) >> 8 & 0x00ff00ff};
    }
    static Column column(const char *from) {
        const Ints quads = load_ints(from);
        return {low16(quads), high16(quads)};
    }
    static Vector add(Vector sum, const Row &row, const Column &column) {
        return sum + madd16(row.even, column.even) + madd16(row.odd, column.odd);
    }
};

#endif

// What the number that rows are stored up adds to a product, for each unit of a column's sum.
#if defined(__ARM_FEATURE_DOTPROD)
constexpr int kRaised = 0;
#else
constexpr int kRaised = 128;
#endif

// sums[ROWS][64] (+)= rows[ROWS][4 * quads] x weights[quads][64][4]. FETCH lines a quad are fetched from `next` on.
template <class Dot, int ROWS, int FETCH>
void tile(const char *__restrict rows, int64_t stride, const char *__restrict weights, typename Dot::Sum *__restrict sums,
          int quads, bool first, const char *next) {
    using Vector = typename Dot::Vector;
    constexpr int kWidth = Dot::kWidth, kColumns = kWidth * kLanes;
    for (int part = 0; part < kPanel; part += kColumns) {
        Vector sum[ROWS][kWidth];
        for (int r = 0; r < ROWS; r++) {
            for (int j = 0; j < kWidth; j++) {
                const auto *from = sums + r * kPanel + part + j * kLanes;
                sum[r][j] = first ? Vector{} : *reinterpret_cast<const Vector *>(from);
            }
        }
        for (int i = 0; i < quads; i++) {
            typename Dot::Column columns[kWidth];
            for (int j = 0; j < kWidth; j++) columns[j] = Dot::column(weights + (i * kPanel + part + j * kLanes) * 4);
            if (part == 0) {
                for (int line = 0; line < FETCH; line++) __builtin_prefetch(next + (i * FETCH + line) * 64);
            }
#pragma GCC unroll 6
            for (int r = 0; r < ROWS; r++) {
                const typename Dot::Row row = Dot::row(rows + r * stride + i * 4);
                for (int j = 0; j < kWidth; j++) sum[r][j] = Dot::add(sum[r][j], row, columns[j]);
            }
        }
        for (int r = 0; r < ROWS; r++) {
            for (int j = 0; j < kWidth; j++) {
                *reinterpret_cast<Vector *>(sums + r * kPanel + part + j * kLanes) = sum[r][j];
            }
        }
    }
}

template <class Dot, int FETCH>
void tile_of(int rows, const char *a, int64_t stride, const char *weights, typename Dot::Sum *sums, int quads,
             bool first, const char *next) {
    switch (rows) {
        case 1: return tile<Dot, 1, FETCH>(a, stride, weights, sums, quads, first, next);
        case 2: return tile<Dot, 2, FETCH>(a, stride, weights, sums, quads, first, next);
        case 3: return tile<Dot, 3, FETCH>(a, stride, weights, sums, quads, first, next);
        case 4: return tile<Dot, 4, FETCH>(a, stride, weights, sums, quads, first, next);
        default: break;
    }
    if constexpr (Dot::kRows > 4) {
        if (rows == 5) return tile<Dot, 5, FETCH>(a, stride, weights, sums, quads, first, next);
        return tile<Dot, 6, FETCH>(a, stride, weights, sums, quads, first, next);
    }
}

// sums[rows][64] = a[rows][bytes] x one panel, `depth` bytes of inputs at a time.
template <class Dot>
void panel_product(const char *a, int64_t stride, const char *panel, typename Dot::Sum *sums, int rows, int64_t bytes,
                   int depth) {
    const int tiles = (rows + Dot::kRows - 1) / Dot::kRows;
    const int share = tiles == 1 ? kLines : tiles <= 3 ? 2 : 1;  // lines that each tile fetches, until all are
    for (int64_t start = 0; start < bytes; start += depth) {
        const int quads = static_cast<int>(std::min<int64_t>(depth, bytes - start) / 4);
        const char *weights = panel + start * kPanel, *next = panel + (start + depth) * kPanel;
        for (int t = 0, done = 0; t < tiles; t++) {
            const int count = (rows - done + tiles - t - 1) / (tiles - t);  // tiles of like size
            const bool fetches = t * share < kLines;
            auto *chosen = !fetches ? tile_of<Dot, 0> : share == 4 ? tile_of<Dot, 4> : share == 2 ? tile_of<Dot, 2>
                                                                                                  : tile_of<Dot, 1>;
            chosen(count, a + done * stride + start, stride, weights, sums + done * kPanel, quads, start == 0,
                   next + static_cast<int64_t>(t) * quads * share * 64);
            done += count;
        }
    }
}

// Tasks that a thread takes at a time: some in a row, because the next panel is being fetched, but few enough that a
// thread which a neighbour holds up leaves its share to the others.
inline int task_share(int64_t tasks) {
    return static_cast<int>(std::clamp<int64_t>(tasks / (4 * omp_get_max_threads()), 1, 16));
}

// Runs finish(sums, first row, rows, panel) for every task of a product of m rows, `stride` bytes apart and `bytes` long,
// and so many panels.
template <class Dot, typename Finish>
void product(const void *a, int64_t stride, const void *weights, int64_t m, int64_t panels, int64_t bytes,
             const Finish &finish) {
    const int64_t blocks = (m + kBlockRows - 1) / kBlockRows, height = (m + blocks - 1) / std::max<int64_t>(blocks, 1);
    const int depth = m <= 64 ? 256 : 512, share = task_share(blocks * panels);
#pragma omp parallel for collapse(2) schedule(dynamic, share)
    for (int64_t b = 0; b < blocks; b++) {
        for (int64_t p = 0; p < panels; p++) {
            alignas(64) typename Dot::Sum sums[kBlockRows * kPanel];
            const int64_t row = b * height;
            const int rows = static_cast<int>(std::min(height, m - row));
            if (rows <= 0) continue;
            panel_product<Dot>(static_cast<const char *>(a) + row * stride, stride,
                               static_cast<const char *>(weights) + p * bytes * kPanel, sums, rows, bytes, depth);
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

// What follows a product, for one row of a panel. Every optional part is a loop of its own: the compiler does not make
// vectors of a loop that asks for each number whether there is a bias. bias, add: null or `width` numbers.
template <typename T>
void write_row(float *values, int width, const T *bias, const T *add, T *out) {
    if (bias) {
#pragma omp simd
        for (int c = 0; c < width; c++) values[c] += widen(bias[c]);
    }
    if (add) {
#pragma omp simd
        for (int c = 0; c < width; c++) values[c] += widen(add[c]);
    }
#pragma omp simd
    for (int c = 0; c < width; c++) narrow(values[c], out[c]);
}

// values: gates, and the numbers they open kPanel / 2 further on.
template <int ACTIVATION, typename T>
void write_gated_row(float *values, int width, const T *gate_bias, const T *up_bias, T *out) {
    float *up = values + kPanel / 2;
    if (gate_bias) {
#pragma omp simd
        for (int c = 0; c < width; c++) values[c] += widen(gate_bias[c]);
    }
    if (up_bias) {
#pragma omp simd
        for (int c = 0; c < width; c++) up[c] += widen(up_bias[c]);
    }
#pragma omp simd
    for (int c = 0; c < width; c++) narrow(activate<ACTIVATION>(values[c]) * up[c], out[c]);
}

template <typename T = bf16>
const T *from(const void *numbers, int64_t at) {
    return numbers ? static_cast<const T *>(numbers) + at : nullptr;
}

// Rows of activations as the dot of 8 bits takes them: their norms, where the matrix has one, round(y / scale) + 128. They lie
// in scratch memory of m * (k + 4) bytes.
struct QuantizedRows {
    uint8_t *values;
    float *scales;

    QuantizedRows(const penstock_matrix &w, void *scratch, const uint16_t *x, int64_t stride, int64_t m)
        : values(static_cast<uint8_t *>(scratch)), scales(reinterpret_cast<float *>(values + m * w.k)) {
        quantize_rows(w.norm, x, stride, values, scales, m, w.k);
    }
};

}  // namespace penstock
