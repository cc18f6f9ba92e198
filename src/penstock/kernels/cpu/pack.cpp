// Weights become panels as they are read: each thread reads a few rows, so few that they and what is made of them stay in
// its cache, and writes their columns of a panel. Memory sees the weights once, as they will be kept.

#include "product.h"

#include <cerrno>
#include <limits>

#include <unistd.h>

extern "C" {

// Some rows of a matrix, one after the other: in memory, or, where that is null, in an open file from the byte `start` on.
struct penstock_rows {
    const char *memory;
    int64_t file, start, count;
};
}

namespace penstock {
namespace {

constexpr int kStrip = 32;           // rows that a thread reads at a time
constexpr int kEndsEarly = -1;

// Fill `out` from a file. Returns 0, an errno, or kEndsEarly.
int read_fully(int64_t file, int64_t start, int64_t bytes, char *out) {
    while (bytes > 0) {
        const ssize_t n = pread(static_cast<int>(file), out, static_cast<size_t>(bytes), start);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) return n < 0 ? errno : kEndsEarly;
        out += n, start += n, bytes -= n;
    }
    return 0;
}

// rows = `count` rows of `bytes` each, from `first` on, in `buffer` unless they lie together in memory. Returns as above.
int fetch(const penstock_rows *parts, int64_t first, int64_t count, int64_t bytes, char *buffer, const char *&rows) {
    for (; first >= parts->count; parts++) first -= parts->count;
    rows = buffer;
    if (parts->memory && first + count <= parts->count) {
        rows = parts->memory + first * bytes;
        return 0;
    }
    for (; count > 0; parts++, first = 0) {
        const int64_t here = std::min(count, parts->count - first);
        if (parts->memory) {
            std::memcpy(buffer, parts->memory + first * bytes, here * bytes);
        } else if (const int failed = read_fully(parts->file, parts->start + first * bytes, here * bytes, buffer)) {
            return failed;
        }
        buffer += here * bytes, count -= here;
    }
    return 0;
}

// Runs pack(rows, scratch, first, count, panel, column) for every strip of the n rows of a matrix: `count` rows from `first`
// on, which become columns of a panel from `column` on. They are columns [offset, offset + width) of each panel: 64 alone, or
// two matrices of 32 side by side. scratch: of every thread kStrip rows of k numbers of `size` bytes, and of k bytes for
// `pack`. Returns 0 or why a strip could not be read.
template <typename Pack>
int for_strips(const penstock_rows *parts, char *scratch, int64_t n, int64_t k, int64_t size, int64_t offset, int64_t width,
               const Pack &pack) {
    const int64_t strips = (n + kStrip - 1) / kStrip;
    const int share = task_share(strips);
    int failed = 0;
#pragma omp parallel for schedule(dynamic, share)
    for (int64_t s = 0; s < strips; s++) {
        int before;
#pragma omp atomic read
        before = failed;
        if (before) continue;
        char *own = scratch + omp_get_thread_num() * kStrip * k * (size + 1);
        const int64_t first = s * kStrip;
        const int count = static_cast<int>(std::min<int64_t>(kStrip, n - first));
        const char *rows;
        if (const int why = fetch(parts, first, count, k * size, own, rows)) {
#pragma omp atomic write
            failed = why;
            continue;
        }
        pack(rows, own + kStrip * k * size, first, count, first / width, first % width + offset);
    }
    return failed;
}

#if defined(__AVX512F__)

// 16 rows of 16 numbers, `stride` bytes apart, turned over.
inline void turn(const char *from, int64_t stride, __m512i (&out)[16]) {
    __m512i a[16], b[16];
    for (int i = 0; i < 16; i++) a[i] = _mm512_loadu_si512(from + i * stride);
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        for (int j = 0; j < 2; j++) {
            a[i + j * 2] = _mm512_unpacklo_epi64(b[i + j], b[i + j + 2]);
            a[i + j * 2 + 1] = _mm512_unpackhi_epi64(b[i + j], b[i + j + 2]);
        }
    }
    for (int i = 0; i < 4; i++) {  // now a[4 * g + i] has numbers i, 4 + i, 8 + i, 12 + i of rows 4 * g to 4 * g + 3
        const __m512i low = _mm512_shuffle_i32x4(a[i], a[4 + i], 0x88), high = _mm512_shuffle_i32x4(a[i], a[4 + i], 0xdd);
        const __m512i low2 = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0x88);
        const __m512i high2 = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0xdd);
        out[i] = _mm512_shuffle_i32x4(low, low2, 0x88);
        out[4 + i] = _mm512_shuffle_i32x4(high, high2, 0x88);
        out[8 + i] = _mm512_shuffle_i32x4(low, low2, 0xdd);
        out[12 + i] = _mm512_shuffle_i32x4(high, high2, 0xdd);
    }
}

#endif

// Rows of `bytes`, as many apart, become columns of a panel: four bytes of each after the other.
void interleave(const char *rows, int count, int64_t bytes, char *panel, int64_t column) {
    panel += column * 4;
    int64_t done = 0;
#if defined(__AVX512F__)
    if (count == kStrip) {
        for (; done + 64 <= bytes; done += 64) {
            for (int half = 0; half < kStrip; half += 16) {
                __m512i lines[16];
                turn(rows + half * bytes + done, bytes, lines);
                for (int i = 0; i < 16; i++) {
                    _mm512_store_si512(panel + done * kPanel + i * kPanel * 4 + half * 4, lines[i]);
                }
            }
        }
    }
#endif
    for (int64_t start = done; start < bytes; start += 64) {  // a cache line of each row at a time
        const int64_t end = std::min<int64_t>(start + 64, bytes);
        for (int c = 0; c < count; c++) {
            for (int64_t i = start; i < end; i += 4) std::memcpy(panel + i * kPanel + c * 4, rows + c * bytes + i, 4);
        }
    }
}

// A row of k weights as 8-bit numbers of scale `scale`. Returns their sum.
int32_t quantize(const bf16 *w, int64_t k, int8_t *out, float &scale) {
    float top = 0;
#pragma omp simd reduction(max : top)
    for (int64_t i = 0; i < k; i++) {
        const float size = std::fabs(widen(w[i]));
        top = size > top ? size : top;
    }
    const float inverse = top > 0 ? 127.0f / top : 0.0f;
    int32_t total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < k; i++) {
        const float q = std::nearbyint(widen(w[i]) * inverse);
        const int32_t value = q >= -127.0f && q <= 127.0f ? static_cast<int32_t>(q) : 0;
        out[i] = static_cast<int8_t>(value);
        total += value;
    }
    scale = top / 127.0f;
    return total;
}

constexpr int kColumns = 16;  // of 4-bit weights that are quantized together: they are the low or high halves of a line

// The scales of one group of inputs of each column, of a few tried those that leave the least squared error: with 4 bits the
// largest weight is not always worth its reach. w: [kGroup][kColumns].
void best_scales(const float (&w)[kGroup][kColumns], float (&best)[kColumns]) {
    float top[kColumns] = {}, signed_top[kColumns] = {}, least[kColumns];
    for (int i = 0; i < kGroup; i++) {
#pragma omp simd
        for (int c = 0; c < kColumns; c++) {
            const bool larger = std::fabs(w[i][c]) > top[c];
            top[c] = larger ? std::fabs(w[i][c]) : top[c];
            signed_top[c] = larger ? w[i][c] : signed_top[c];
        }
    }
    for (int c = 0; c < kColumns; c++) least[c] = std::numeric_limits<float>::infinity(), best[c] = 0;
    for (const float reach : {-8.6f, -8.0f, -7.4f, 7.0f, 7.6f, 8.2f}) {  // of 4 bits, -8 is the furthest
        alignas(64) float scale[kColumns], inverse[kColumns];
#pragma omp simd
        for (int c = 0; c < kColumns; c++) {
            bf16 stored;
            narrow((reach < 0 ? signed_top[c] : top[c]) / reach, stored);
            scale[c] = widen(stored);
            inverse[c] = 1.0f / scale[c];
        }
        for (int from = 0; from < kColumns; from += kLanes) {
            const Floats by = *reinterpret_cast<const Floats *>(inverse + from);
            const Floats back = *reinterpret_cast<const Floats *>(scale + from);
            Floats error{};
            for (int i = 0; i < kGroup; i++) {
                const Floats x = *reinterpret_cast<const Floats *>(w[i] + from);
                Floats q = x * by + 8.5f;  // what is stored: 0 to 15, 8 up; whole numbers by cutting off
                q = q > every(0.0f) ? q : every(0.0f);
                q = q < every(15.5f) ? q : every(15.5f);
                const Floats left = x - (to_floats(__builtin_convertvector(q, Ints)) - 8.0f) * back;
                error = fmadd(left, left, error);
            }
            for (int c = 0; c < kLanes; c++) {
                if (error[c] < least[from + c]) least[from + c] = error[c], best[from + c] = scale[from + c];
            }
        }
    }
    for (int c = 0; c < kColumns; c++) best[c] = top[c] > 1e-30f ? best[c] : 0.0f;
}

}  // namespace
}  // namespace penstock

using namespace penstock;

extern "C" {

// All of these: parts hold the n rows of a matrix [n, k] of bfloat16 (f32: of float32), which become columns of the panels of `out`, see
// for_strips. scratch: of every thread 32 rows of k numbers and k bytes. They return 0, an errno, or -1 when a file ends early.

// k even. out: [panels][k / 2][64][2].
int penstock_pack_bf16(const penstock_rows *parts, void *scratch, uint16_t *out, int64_t n, int64_t k, int64_t offset,
                       int64_t width) {
    return for_strips(parts, static_cast<char *>(scratch), n, k, 2, offset, width,
                      [&](const char *rows, char *, int64_t, int count, int64_t panel, int64_t column) {
                          interleave(rows, count, k * 2, reinterpret_cast<char *>(out + panel * k * kPanel), column);
                      });
}

// out: [panels][k][64].
int penstock_pack_f32(const penstock_rows *parts, void *scratch, float *out, int64_t n, int64_t k, int64_t offset,
                      int64_t width) {
    return for_strips(parts, static_cast<char *>(scratch), n, k, 4, offset, width,
                      [&](const char *rows, char *, int64_t, int count, int64_t panel, int64_t column) {
                          interleave(rows, count, k * 4, reinterpret_cast<char *>(out + panel * k * kPanel), column);
                      });
}

// k a multiple of 4. out: [panels][k / 4][64][4]; scales: [n], the largest of each row / 127; offsets: [n], kRaised times the
// sum of each column.
int penstock_pack_int8(const penstock_rows *parts, void *scratch, int8_t *out, float *scales, int32_t *offsets, int64_t n,
                       int64_t k, int64_t offset, int64_t width) {
    return for_strips(parts, static_cast<char *>(scratch), n, k, 2, offset, width,
                      [&](const char *rows, char *own, int64_t first, int count, int64_t panel, int64_t column) {
                          const bf16 *w = reinterpret_cast<const bf16 *>(rows);
                          for (int c = 0; c < count; c++) {
                              int8_t *to = reinterpret_cast<int8_t *>(own) + c * k;
                              offsets[first + c] = kRaised * quantize(w + c * k, k, to, scales[first + c]);
                          }
                          interleave(own, count, k, reinterpret_cast<char *>(out) + panel * k * kPanel, column);
                      });
}

// k a multiple of the group. out: [panels][k / group][kGroupBytes], see matmul_int4.cpp; offsets: [n], kRaised times the sum
// of each column.
int penstock_pack_int4(const penstock_rows *parts, void *scratch, uint8_t *out, float *offsets, int64_t n, int64_t k,
                       int64_t offset, int64_t width) {
    const auto pack = [&](const char *rows, char *, int64_t first, int count, int64_t panel, int64_t column) {
        uint8_t *groups = out + panel * (k / kGroup) * kGroupBytes;
        const int64_t line = column / kStrip * 64;
        alignas(64) float w[kGroup][kColumns], scale[kColumns], total[kStrip] = {};
        for (int64_t group = 0; group < k / kGroup; group++) {
            uint8_t *to = groups + group * kGroupBytes;
            alignas(64) uint32_t quads[kGroup / 4][kColumns] = {};
            for (int half = 0; half < kStrip; half += kColumns) {
                for (int c = 0; c < kColumns; c++) {
                    const bf16 *row = reinterpret_cast<const bf16 *>(rows) + (half + c) * k + group * kGroup;
                    for (int i = 0; i < kGroup; i++) w[i][c] = half + c < count ? widen(row[i]) : 0.0f;
                }
                best_scales(w, scale);
                for (int i = 0; i < kGroup; i++) {
#pragma omp simd
                    for (int c = 0; c < kColumns; c++) {
                        float q = w[i][c] * (scale[c] != 0 ? 1.0f / scale[c] : 0.0f) + 8.5f;
                        q = q > 0 ? q : 0.0f;
                        q = q < 15.5f ? q : 15.5f;
                        const uint32_t value = static_cast<uint32_t>(static_cast<int32_t>(q));
                        total[half + c] += scale[c] * (static_cast<float>(static_cast<int32_t>(value)) - 8.0f);
                        quads[i / 4][c] |= value << (i % 4 * 8 + half / kColumns * 4);
                    }
                }
                for (int c = 0; c < kColumns; c++) narrow(scale[c], reinterpret_cast<bf16 *>(to)[column + half + c]);
            }
            for (int i = 0; i < kGroup / 4; i++) std::memcpy(to + kPanel * 2 + i * 128 + line, quads[i], 64);
        }
        for (int c = 0; c < count; c++) offsets[first + c] = kRaised * total[c];
    };
    return for_strips(parts, static_cast<char *>(scratch), n, k, 2, offset, width, pack);
}
}
