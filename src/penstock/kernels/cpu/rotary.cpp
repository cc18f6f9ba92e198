// Rotary positions (Su et al. 2021), and the way of keys and values into the cache.

#include "attention.h"

#include <limits>
#include <type_traits>

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

// A vector of a head as the cache holds it, [-127, 127] times the largest size / 127. One with a NaN or an infinity gets
// the scale NaN, and so does everything that is made of it.
template <typename T>
inline void put_bytes(const T *__restrict x, int8_t *__restrict to, int8_t *scale_to, int64_t dim) {
    float top = 0;
    int broken = 0;
#pragma omp simd reduction(max : top) reduction(| : broken)
    for (int64_t i = 0; i < dim; i++) {
        const float size = std::fabs(widen(x[i]));
        top = size > top ? size : top;
        broken |= !(size <= std::numeric_limits<float>::max());
    }
    const float scale = broken ? std::numeric_limits<float>::quiet_NaN() : top / 127.0f;
    const float inverse = top > 1e-30f && !broken ? 127.0f / top : 0.0f;
#pragma omp simd
    for (int64_t i = 0; i < dim; i++) {
        const float value = broken ? 0.0f : widen(x[i]) * inverse;
        to[i] = static_cast<int8_t>(static_cast<int32_t>(value + 128.5f) - 128);
    }
    std::memcpy(scale_to, &scale, sizeof scale);
}

struct Rows {
    const void *data;
    int64_t stride;  // elements from one token to the next
};

// C: of the cache.
template <typename T, typename C>
void rotary_kv(Rows q, Rows k, Rows v, const T *cosine, const T *sine, const int64_t *slots, T *out, C *keys, C *values,
               int64_t tokens, int64_t heads, int64_t kv_heads, int64_t dim, int64_t block_size) {
    const Cache cache = cache_of<C>(kv_heads, block_size, dim);
#pragma omp parallel for if (tokens * heads * dim > 16384)
    for (int64_t t = 0; t < tokens; t++) {
        const T *query = static_cast<const T *>(q.data) + t * q.stride, *c = cosine + t * dim, *s = sine + t * dim;
        const T *key = static_cast<const T *>(k.data) + t * k.stride;
        const T *value = static_cast<const T *>(v.data) + t * v.stride;
        for (int64_t h = 0; h < heads; h++) turn(query + h * dim, c, s, out + (t * heads + h) * dim, dim);
        for (int64_t h = 0; h < kv_heads; h++) {
            const int64_t block = cache.block(slots[t] / block_size, h), place = slots[t] % block_size;
            const int64_t at = block + place * dim;
            if constexpr (std::is_same_v<C, int8_t>) {
                const int64_t scale = block + block_size * dim + place * cache.scale_size;
                T turned[kMaxDim];
                turn(key + h * dim, c, s, turned, dim);
                put_bytes(turned, keys + at, keys + scale, dim);
                put_bytes(value + h * dim, values + at, values + scale, dim);
            } else {
                turn(key + h * dim, c, s, keys + at, dim);
                std::memcpy(values + at, value + h * dim, sizeof(T) * dim);
            }
        }
    }
}

}  // namespace
}  // namespace penstock

using namespace penstock;

extern "C" {

// q: [tokens, heads, dim]; k, v: [tokens, kv_heads, dim]; each token's heads lie together, tokens `stride` apart. cosine,
// sine: [tokens, dim]. slots: [tokens] places in the cache, block * block_size + place in it. out: [tokens, heads, dim], the turned q. keys, values:
// [num_blocks, kv_heads, block_size, dim]. All contiguous but for the strides. dim is even. _int8: into a cache of bytes and
// scales (see Cache), dim <= 256.
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

void penstock_rotary_kv_f32_int8(const float *q, int64_t q_stride, const float *k, int64_t k_stride, const float *v,
                                 int64_t v_stride, const float *cosine, const float *sine, const int64_t *slots,
                                 float *out, int8_t *keys, int8_t *values, int64_t tokens, int64_t heads,
                                 int64_t kv_heads, int64_t dim, int64_t block_size) {
    rotary_kv(Rows{q, q_stride}, Rows{k, k_stride}, Rows{v, v_stride}, cosine, sine, slots, out, keys, values, tokens,
              heads, kv_heads, dim, block_size);
}

void penstock_rotary_kv_bf16_int8(const uint16_t *q, int64_t q_stride, const uint16_t *k, int64_t k_stride,
                                  const uint16_t *v, int64_t v_stride, const uint16_t *cosine, const uint16_t *sine,
                                  const int64_t *slots, uint16_t *out, int8_t *keys, int8_t *values, int64_t tokens,
                                  int64_t heads, int64_t kv_heads, int64_t dim, int64_t block_size) {
    rotary_kv(Rows{q, q_stride}, Rows{k, k_stride}, Rows{v, v_stride}, reinterpret_cast<const bf16 *>(cosine),
              reinterpret_cast<const bf16 *>(sine), slots, reinterpret_cast<bf16 *>(out), keys, values, tokens, heads,
              kv_heads, dim, block_size);
}
}
