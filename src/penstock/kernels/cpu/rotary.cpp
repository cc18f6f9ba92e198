// Rotary positions (Su et al. 2021), and the way of keys and values into the cache.

#include "common.h"

namespace penstock {
namespace {

// Turns the pairs (i, i + dim / 2) of one head.
template <typename T>
inline void turn(const T *__restrict x, const T *__restrict cosine, const T *__restrict sine, T *__restrict out,
                 int64_t dim) {
    const int64_t half = dim / 2;
#pragma omp simd
    for (int64_t i = 0; i < half; i++) {
        const float first = widen(x[i]), second = widen(x[i + half]);
        narrow(first * widen(cosine[i]) - second * widen(sine[i]), out[i]);
        narrow(second * widen(cosine[i + half]) + first * widen(sine[i + half]), out[i + half]);
    }
}

struct Rows {
    const void *data;
    int64_t stride;  // elements from one token to the next
};

template <typename T>
void rotary_kv(Rows q, Rows k, Rows v, const T *cosine, const T *sine, const int64_t *slots, T *out, T *keys, T *values,
               int64_t tokens, int64_t heads, int64_t kv_heads, int64_t dim, int64_t block_size) {
#pragma omp parallel for if (tokens * heads * dim > 16384)
    for (int64_t t = 0; t < tokens; t++) {
        const T *query = static_cast<const T *>(q.data) + t * q.stride, *c = cosine + t * dim, *s = sine + t * dim;
        const T *key = static_cast<const T *>(k.data) + t * k.stride;
        const T *value = static_cast<const T *>(v.data) + t * v.stride;
        for (int64_t h = 0; h < heads; h++) turn(query + h * dim, c, s, out + (t * heads + h) * dim, dim);
        for (int64_t h = 0; h < kv_heads; h++) {
            const int64_t at = ((slots[t] / block_size * kv_heads + h) * block_size + slots[t] % block_size) * dim;
            turn(key + h * dim, c, s, keys + at, dim);
            std::memcpy(values + at, value + h * dim, sizeof(T) * dim);
        }
    }
}

}  // namespace
}  // namespace penstock

using namespace penstock;

extern "C" {

// q: [tokens, heads, dim]; k, v: [tokens, kv_heads, dim]; each token's heads lie together, tokens `stride` apart. cosine,
// sine: [tokens, dim]. slots: [tokens] places in the cache, block * block_size + place in it. out: [tokens, heads, dim], the turned q. keys, values:
// [num_blocks, kv_heads, block_size, dim]. All contiguous but for the strides. dim is even.
void penstock_rotary_kv_f32(const float *q, int64_t q_stride, const float *k, int64_t k_stride, const float *v,
                            int64_t v_stride, const float *cosine, const float *sine, const int64_t *slots, float *out,
                            float *keys, float *values, int64_t tokens, int64_t heads, int64_t kv_heads, int64_t dim,
                            int64_t block_size) {
    rotary_kv(Rows{q, q_stride}, Rows{k, k_stride}, Rows{v, v_stride}, cosine, sine, slots, out, keys, values, tokens,
              heads, kv_heads, dim, block_size);
}

void penstock_rotary_kv_bf16(const uint16_t *q, int64_t q_stride, const uint16_t *k, int64_t k_stride,
                             const uint16_t *v, int64_t v_stride, const uint16_t *cosine, const uint16_t *sine,
                             const int64_t *slots, uint16_t *out, uint16_t *keys, uint16_t *values, int64_t tokens,
                             int64_t heads, int64_t kv_heads, int64_t dim, int64_t block_size) {
    rotary_kv(Rows{q, q_stride}, Rows{k, k_stride}, Rows{v, v_stride}, reinterpret_cast<const bf16 *>(cosine),
              reinterpret_cast<const bf16 *>(sine), slots, reinterpret_cast<bf16 *>(out),
              reinterpret_cast<bf16 *>(keys), reinterpret_cast<bf16 *>(values), tokens, heads, kv_heads, dim, block_size);
}
}
