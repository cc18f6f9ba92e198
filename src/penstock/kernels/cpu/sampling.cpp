// Choosing among scores: what a row may not take, and the largest score of each row.

#include "common.h"

#include <limits>

using namespace penstock;

namespace {

constexpr int64_t kStretch = 512;

// Scores are looked at as bit patterns: kExcluded is minus infinity.
template <typename T, T kExcluded>
void restrict_rows(T *x, int64_t m, int64_t n, const uint32_t *const *masks, const int64_t *ids,
                   const int64_t *bounds) {
#pragma omp parallel for if (m * n > 65536)
    for (int64_t r = 0; r < m; r++) {
        T *row = x + r * n;
        int64_t open = n;  // tokens that may come
        if (masks[r]) {
            open = 0;
            for (int64_t start = 0; start < n; start += 32) {
                const uint32_t word = masks[r][start / 32];
                const int64_t width = n - start < 32 ? n - start : 32;
                for (int64_t i = 0; i < width; i++) {
                    const T score = word >> i & 1 ? row[start + i] : kExcluded;
                    row[start + i] = score;
                    open += score != kExcluded;
                }
            }
        }
        for (int64_t i = bounds[r]; i < bounds[r + 1]; i++) open -= row[ids[i]] != kExcluded;
        for (int64_t i = bounds[r]; open > 0 && i < bounds[r + 1]; i++) row[ids[i]] = kExcluded;
    }
}

}  // namespace

extern "C" {

// In place: minus infinity for every token whose bit is not set in the row's mask (lowest bit first; null: all may come),
// and for ids[bounds[r]] .. ids[bounds[r + 1] - 1], all different, unless the row would have nothing left. x: [m, n].
void penstock_restrict_bf16(uint16_t *x, int64_t m, int64_t n, const uint32_t *const *masks, const int64_t *ids,
                            const int64_t *bounds) {
    restrict_rows<uint16_t, 0xFF80>(x, m, n, masks, ids, bounds);
}

void penstock_restrict_f32(uint32_t *x, int64_t m, int64_t n, const uint32_t *const *masks, const int64_t *ids,
                           const int64_t *bounds) {
    restrict_rows<uint32_t, 0xFF800000>(x, m, n, masks, ids, bounds);
}

// x: [m, n] contiguous. ids, values: [m]; the first of equal scores. A row with a NaN has the value NaN.
void penstock_argmax_bf16(const uint16_t *x, int64_t *ids, float *values, int64_t m, int64_t n) {
#pragma omp parallel for if (m * n > 16384)
    for (int64_t r = 0; r < m; r++) {
        const bf16 *row = reinterpret_cast<const bf16 *>(x) + r * n;
        float top = -std::numeric_limits<float>::infinity();
        int broken = 0;
        int64_t place = 0;  // first where the best stretch begins, for looking number by number is slow
        for (int64_t start = 0; start < n; start += kStretch) {
            const int64_t end = start + kStretch < n ? start + kStretch : n;
            float best = -std::numeric_limits<float>::infinity();
#pragma omp simd reduction(max : best) reduction(| : broken)
            for (int64_t i = start; i < end; i++) {
                const float score = widen(row[i]);
                best = score > best ? score : best;
                broken |= score != score;
            }
            if (best > top) top = best, place = start;
        }
        while (!broken && widen(row[place]) != top) place++;
        ids[r] = place;
        values[r] = broken ? std::numeric_limits<float>::quiet_NaN() : top;
    }
}
}
