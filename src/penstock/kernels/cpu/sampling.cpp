// Choosing among scores: what a row may not take, the largest score of each row, draws.

#include "common.h"

#include <limits>

extern "C" {

// How a token is drawn. temperature: above 0; top_k: 0 for all; top_p: 1 for all; min_p: 0 for all, as in
// engine/sampler.py, and in that order. at: in [0, 1).
struct penstock_draw {
    float temperature, top_p, min_p;
    int64_t top_k;
    double at;
};

// What scores less because it was there before. ids: [count], all different; often, made: [count], how often each is in
// the text, and in what was generated of it. repetition: 1 is none; length: of the text.
struct penstock_penalty {
    const int64_t *ids;
    const float *often, *made;
    int64_t count;
    float repetition, frequency, length, each, once;
};
}

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

// A row of scores on its way to a draw. Every rule that keeps only the likelier tokens is a bound on the score, so nothing
// is sorted: the bound is found bit by bit, from counts or masses of all tokens that share their leading bits.
struct Row {
    static constexpr int kBlock = 512;

    const float *x;
    int64_t n;
    float top, scale;             // scores are taken from the largest down and divided by the temperature
    uint32_t bound = 0x7f7fffff;  // the largest key that is kept; infinity is none

    int size(int64_t start) const { return static_cast<int>(start + kBlock < n ? kBlock : n - start); }

    // Of a block: how far each score lies below the largest, as a number and as the bits that order it so.
    void look(int64_t start, float *down, uint32_t *key) const {
        const int count = size(start);
#pragma omp simd
        for (int i = 0; i < count; i++) down[i] = (top - x[start + i]) * scale;
        std::memcpy(key, down, count * sizeof *key);
#pragma omp simd
        for (int i = 0; i < count; i++) key[i] &= 0x7fffffff;  // no zero is below another
    }

    // Also the mass of each, zero for what is not kept; returns their sum.
    float weigh(int64_t start, float *mass, uint32_t *key) const {
        const int count = size(start);
        look(start, mass, key);
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int i = 0; i < count; i++) {
            mass[i] = key[i] <= bound ? exp_nonpositive(-mass[i]) : 0.0f;
            sum += mass[i];
        }
        return sum;
    }

    double total() const {
        float mass[kBlock];
        uint32_t key[kBlock];
        double all = 0;
        for (int64_t start = 0; start < n; start += kBlock) all += weigh(start, mass, key);
        return all;
    }

    // Lowers the bound to the first token, in falling order, with which what is kept reaches `wanted` in number or mass.
    void keep_until(double wanted, bool counts) {
        constexpr int kShifts[] = {21, 10, 0}, kBits[] = {10, 11, 10};
        float mass[kBlock];
        uint32_t key[kBlock], prefix = 0;
        double before = 0;
        for (int level = 0; level < 3; level++) {
            const int shift = kShifts[level], above = shift + kBits[level];
            const uint32_t mask = (1u << kBits[level]) - 1;
            double weights[2048] = {};
            for (int64_t start = 0; start < n; start += kBlock) {
                if (counts) look(start, mass, key);
                else weigh(start, mass, key);
                for (int i = 0, count = size(start); i < count; i++) {
                    if (key[i] <= bound && key[i] >> above == prefix) {
                        weights[key[i] >> shift & mask] += counts ? 1.0 : mass[i];
                    }
                }
            }
            uint32_t found = 0;
            for (uint32_t b = 0; b <= mask; b++) {
                if (weights[b] <= 0) continue;
                found = b;  // the last one, should rounding keep their sum below
                if (before + weights[b] >= wanted) break;
                before += weights[b];
            }
            prefix = prefix << kBits[level] | found;
        }
        bound = prefix;
    }
};

// See penstock_draw_f32.
void draw(const float *x, int64_t n, const penstock_draw &how, int64_t *id, float *logprob) {
    float top = -std::numeric_limits<float>::infinity();
    int broken = 0;
#pragma omp simd reduction(max : top) reduction(| : broken)
    for (int64_t i = 0; i < n; i++) {
        top = x[i] > top ? x[i] : top;
        broken |= x[i] != x[i];
    }
    *id = 0;
    *logprob = std::numeric_limits<float>::quiet_NaN();
    if (broken || !(std::fabs(top) <= std::numeric_limits<float>::max())) return;
    Row row{x, n, top, 1.0f / how.temperature};
    if (how.top_k > 0 && how.top_k < n) row.keep_until(static_cast<double>(how.top_k), true);
    if (how.top_p < 1.0f) row.keep_until(how.top_p * row.total(), false);
    if (how.min_p > 0.0f) {
        const float down = std::fabs(std::log(how.min_p));
        uint32_t bits;
        std::memcpy(&bits, &down, sizeof bits);
        row.bound = bits < row.bound ? bits : row.bound;
    }
    const double total = row.total(), wanted = how.at * total;
    float mass[Row::kBlock], chosen = 0;
    uint32_t key[Row::kBlock];
    double sum = 0;
    for (int64_t start = 0; start < n && sum <= wanted; start += Row::kBlock) {
        const double more = row.weigh(start, mass, key);
        if (sum + more <= wanted && start + Row::kBlock < n) {
            sum += more;
            continue;
        }
        for (int i = 0, count = row.size(start); i < count && sum <= wanted; i++) {
            if (mass[i] <= 0) continue;
            *id = start + i;  // the last that can be drawn, should rounding lead past it
            chosen = mass[i];
            sum += mass[i];
        }
    }
    *logprob = static_cast<float>(std::log(chosen) - std::log(total));
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

// kernels.sampling.penalize, in place. x: [m, n]; how: [m].
void penstock_penalize_f32(float *x, const penstock_penalty *how, int64_t m, int64_t n) {
    for (int64_t r = 0; r < m; r++) {
        const penstock_penalty &h = how[r];
        float *row = x + r * n;
        for (int64_t i = 0; i < h.count; i++) {
            float score = row[h.ids[i]];
            if (h.repetition != 1.0f) score = score < 0 ? score * h.repetition : score / h.repetition;
            score -= h.frequency * h.often[i] / h.length;
            if (h.made[i] > 0) score -= h.each * h.made[i] + h.once;
            row[h.ids[i]] = score;
        }
    }
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

// x: [m, n] float32, minus infinity for what may not come. ids: [m], the token at which the cumulative distribution of what
// is kept, in the order of the ids, passes `at`; logprobs: [m], of these, among what is kept. A row with a NaN or an
// infinity, or with nothing allowed, has the log-probability NaN.
void penstock_draw_f32(const float *x, const penstock_draw *how, int64_t *ids, float *logprobs, int64_t m, int64_t n) {
#pragma omp parallel for schedule(dynamic)
    for (int64_t r = 0; r < m; r++) draw(x + r * n, n, how[r], ids + r, logprobs + r);
}
}
