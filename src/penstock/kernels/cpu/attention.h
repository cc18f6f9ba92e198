// What the kernels of attention share: where keys and values lie, and which of them a query sees.
#pragma once

#include "common.h"

#include <algorithm>

namespace penstock {

constexpr int kMaxDim = 256;  // head_dim; the Python side checks it

// One layer's keys or values: [num_blocks, kv_heads, block_size, dim]. All heads of a block lie together, so that a
// sequence is read in long stretches.
struct Cache {
    int64_t kv_heads, block_size, dim;

    // Where a head's key of a token lies. table: the blocks of its sequence; token: its place there.
    int64_t place(const int64_t *table, int64_t head, int64_t token) const {
        return ((table[token / block_size] * kv_heads + head) * block_size + token % block_size) * dim;
    }
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
