// The largest score of each row and its place.

#include "common.h"

#include <limits>

using namespace penstock;

namespace {
constexpr int64_t kStretch = 512;
}

extern "C" {

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
