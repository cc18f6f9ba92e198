// What the kernels of attention share: where keys and values lie, and which of them a query sees.
#pragma once

#include "common.h"

#include <algorithm>

namespace penstock {

constexpr int kMaxDim = 256;  // head_dim; the Python side checks it

// Blocks of one layer: keys and values are [kv_heads, num_blocks, block_size, dim].
struct Cache {
    int64_t num_blocks, block_size, dim;

    int64_t head_size() const { return num_blocks * block_size * dim; }
};

}  // namespace penstock

extern "C" {

// How scores are made and which keys are seen (kernels/attention.py has the words). Zero or null where there is none.
struct penstock_rule {
    float scale;
    float softcap;
    int64_t window;      // tokens back that a query sees, itself included
    int64_t chunk;       // a query sees only its own stretch of so many tokens
    const float *alibi;  // [heads, alibi_stride], added by the place of the key
    int64_t alibi_stride;
};
}

namespace penstock {

using Rule = penstock_rule;

// The first key that a query at `position` sees.
inline int64_t first_key(const Rule &rule, int64_t position) {
    int64_t first = 0;
    if (rule.window > 0) first = std::max<int64_t>(first, position + 1 - rule.window);
    if (rule.chunk > 0) first = std::max<int64_t>(first, position / rule.chunk * rule.chunk);
    return first;
}

// Products of queries and keys [first, first + count), `scores`, become what softmax takes. alibi: of the head, or null.
inline void finish_scores(float *scores, int count, const Rule &rule, const float *alibi, int64_t first) {
#pragma omp simd
    for (int j = 0; j < count; j++) scores[j] *= rule.scale;
    if (rule.softcap > 0) {
        const float inverse = 2.0f / rule.softcap;
#pragma omp simd
        for (int j = 0; j < count; j++) {  // tanh(x) = (1 - e^-2x) / (1 + e^-2x), by the sign that keeps e^ small
            const float z = scores[j] * inverse, e = exp_nonpositive(z < 0 ? z : -z);
            const float size = rule.softcap * ((1.0f - e) / (1.0f + e));
            scores[j] = z < 0 ? -size : size;
        }
    }
    if (alibi) {
#pragma omp simd
        for (int j = 0; j < count; j++) scores[j] += alibi[first + j];
    }
}

}  // namespace penstock
