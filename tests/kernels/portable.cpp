// The kernels against plain loops, for processors that only an emulator has here. Prints nothing when all is well.
#include "attention.h"
#include "product.h"

#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

using namespace penstock;

extern "C" {
struct penstock_rows {
    const uint16_t *memory;
    int64_t file, start, count;
};
int penstock_pack_bf16(const penstock_rows *, void *, uint16_t *, int64_t, int64_t, int64_t, int64_t);
int penstock_pack_int8(const penstock_rows *, void *, int8_t *, float *, int32_t *, int64_t, int64_t, int64_t, int64_t);
int penstock_pack_int4(const penstock_rows *, void *, uint8_t *, float *, int64_t, int64_t, int64_t, int64_t);
using Multiply = void(const penstock_matrix *, const uint16_t *, int64_t, int64_t, const uint16_t *, uint16_t *, void *);
Multiply penstock_matmul_bf16, penstock_matmul_int8, penstock_matmul_int4;
using Attend = void(const float *, float *, const float *, const float *, const int64_t *, int64_t, const int64_t *, int64_t,
                    int64_t, int64_t, int64_t, int64_t, int64_t, const penstock_rule *);
Attend penstock_attention_f32, penstock_attention_long_f32;
using AttendBytes = void(const float *, float *, const int8_t *, const int8_t *, const int64_t *, int64_t, const int64_t *,
                         int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, const penstock_rule *);
AttendBytes penstock_attention_f32_int8, penstock_attention_long_f32_int8;
void penstock_rotary_kv_f32_int8(const float *, int64_t, const float *, int64_t, const float *, int64_t, const float *,
                                 const float *, const int64_t *, float *, int8_t *, int8_t *, int64_t, int64_t, int64_t,
                                 int64_t, int64_t);
}

namespace {

std::mt19937 generator(1);

std::vector<uint16_t> random_bf16(int64_t count) {
    std::normal_distribution<float> normal;
    std::vector<uint16_t> out(count);
    for (auto &x : out) {
        bf16 narrow_one;
        narrow(normal(generator), narrow_one);
        x = narrow_one.bits;
    }
    return out;
}

float value(uint16_t bits) { return widen(bf16{bits}); }

void fail(const char *what, double got, double expected) {
    std::printf("%s: %g instead of %g\n", what, got, expected);
    std::exit(1);
}

// allowed: the error, as a share of the size of a whole product.
void products(const char *what, int64_t m, int64_t n, int64_t k, Multiply *multiply, double allowed) {
    const auto x = random_bf16(m * k), w = random_bf16(n * k), residual = random_bf16(m * n);
    const int64_t panels = (n + kPanel - 1) / kPanel;
    char *packed = static_cast<char *>(std::aligned_alloc(64, panels * k * kPanel * 2));
    std::memset(packed, 0, panels * k * kPanel * 2);
    std::vector<float> scales(n), sums(n);
    std::vector<int32_t> offsets(n);
    penstock_matrix matrix{packed, {}, {}, {}, n, k, 0};
    const penstock_rows rows{w.data(), 0, 0, n};
    std::vector<char> strips(omp_get_max_threads() * 96 * k);
    if (multiply == penstock_matmul_bf16) {
        penstock_pack_bf16(&rows, strips.data(), reinterpret_cast<uint16_t *>(packed), n, k, 0, kPanel);
    } else if (multiply == penstock_matmul_int8) {
        penstock_pack_int8(&rows, strips.data(), reinterpret_cast<int8_t *>(packed), scales.data(), offsets.data(), n, k, 0,
                           kPanel);
        matrix.scales[0] = scales.data(), matrix.offsets[0] = offsets.data();
    } else {
        penstock_pack_int4(&rows, strips.data(), reinterpret_cast<uint8_t *>(packed), sums.data(), n, k, 0, kPanel);
        matrix.offsets[0] = sums.data();
    }
    std::vector<uint16_t> out(m * n), scratch(m * (k + 4));
    multiply(&matrix, x.data(), k, m, residual.data(), out.data(), scratch.data());
    double error = 0, size = 0;
    for (int64_t r = 0; r < m; r++) {
        for (int64_t c = 0; c < n; c++) {
            double sum = value(residual[r * n + c]);
            for (int64_t i = 0; i < k; i++) sum += static_cast<double>(value(x[r * k + i])) * value(w[c * k + i]);
            error += std::pow(value(out[r * n + c]) - sum, 2);
            size += sum * sum;
        }
    }
    if (!(std::sqrt(error / size) <= allowed)) fail(what, std::sqrt(error / size), allowed);
    std::free(packed);
}

// Each token's keys and values go into caches of bytes, and what they stand for there into `keys` and `values`.
void in_bytes(std::vector<float> &keys, std::vector<float> &values, std::vector<int8_t> *bytes, int64_t blocks, const Cache &plain) {
    const Cache small = cache_of<int8_t>(plain.kv_heads, plain.block_size, plain.dim);
    const int64_t width = plain.kv_heads * plain.dim;
    const std::vector<float> ones(plain.dim, 1), none(plain.dim);
    std::vector<float> k(width), v(width), turned(width);
    for (int i = 0; i < 2; i++) bytes[i].resize(small.block(blocks, 0));
    for (int64_t slot = 0; slot < blocks * plain.block_size; slot++) {
        const int64_t block = slot / plain.block_size, place = slot % plain.block_size;
        const auto at = [&](const Cache &cache, int64_t h) { return cache.block(block, h) + place * plain.dim; };
        for (int64_t h = 0; h < plain.kv_heads; h++) {
            std::copy_n(&keys[at(plain, h)], plain.dim, &k[h * plain.dim]);
            std::copy_n(&values[at(plain, h)], plain.dim, &v[h * plain.dim]);
        }
        penstock_rotary_kv_f32_int8(k.data(), width, k.data(), width, v.data(), width, ones.data(), none.data(), &slot,
                                    turned.data(), bytes[0].data(), bytes[1].data(), 1, plain.kv_heads, plain.kv_heads,
                                    plain.dim, plain.block_size);
        for (int64_t h = 0; h < plain.kv_heads; h++) {
            for (int i = 0; i < 2; i++) {
                auto &numbers = i ? values : keys;
                const Stretch<int8_t> row(bytes[i].data(), small, &block, h, place);
                for (int64_t d = 0; d < plain.dim; d++) {
                    float &x = numbers[at(plain, h) + d];
                    const float kept = row.rows[d] * row.scale(0);
                    if (!(std::fabs(kept - x) <= row.scale(0) * 0.5001f)) fail("a byte of the cache", kept, x);
                    x = kept;
                }
            }
        }
    }
}

void attention(int64_t length, int64_t context, Attend *attend, AttendBytes *attend_bytes = nullptr) {
    const int64_t kv_heads = 2, repeats = 3, heads = kv_heads * repeats, dim = 20, block = 16, blocks = (context + block - 1) / block;
    std::normal_distribution<float> normal;
    std::vector<float> q(length * heads * dim), out(q.size()), keys(blocks * kv_heads * block * dim), values(keys.size());
    for (auto *numbers : {&q, &keys, &values}) {
        for (float &x : *numbers) x = normal(generator);
    }
    std::vector<int64_t> table(blocks);
    for (int64_t i = 0; i < blocks; i++) table[i] = blocks - 1 - i;
    const penstock_rule rule{0.2f, 5.0f, 40, 0, nullptr, 0};
    const Cache cache{kv_heads, block, dim};
    if (attend_bytes) {
        std::vector<int8_t> bytes[2];
        in_bytes(keys, values, bytes, blocks, cache);
        attend_bytes(q.data(), out.data(), bytes[0].data(), bytes[1].data(), table.data(), blocks, &context, 1, length, heads,
                     kv_heads, block, dim, &rule);
    } else {
        attend(q.data(), out.data(), keys.data(), values.data(), table.data(), blocks, &context, 1, length, heads, kv_heads,
               block, dim, &rule);
    }
    for (int64_t i = 0; i < length; i++) {
        const int64_t position = context - length + i;
        for (int64_t h = 0; h < heads; h++) {
            std::vector<double> mixed(dim);
            double total = 0;
            for (int64_t j = std::max<int64_t>(0, position - 39); j <= position; j++) {
                const int64_t place = cache.place(table.data(), h / repeats, j);
                double score = 0;
                for (int64_t d = 0; d < dim; d++) score += q[(i * heads + h) * dim + d] * keys[place + d];
                const double weight = std::exp(5 * std::tanh(score * rule.scale / 5));
                total += weight;
                for (int64_t d = 0; d < dim; d++) mixed[d] += weight * values[place + d];
            }
            for (int64_t d = 0; d < dim; d++) {
                const double expected = mixed[d] / total, got = out[(i * heads + h) * dim + d];
                if (!(std::fabs(got - expected) < 1e-4)) fail("attention", got, expected);
            }
        }
    }
}

}  // namespace

int main() {
    for (const int64_t m : {1, 5, 13}) {
        products("bf16", m, 70, 96, penstock_matmul_bf16, 0.004);
        products("int8", m, 70, 96, penstock_matmul_int8, 0.02);
        products("int4", m, 70, 96, penstock_matmul_int4, 0.12);
    }
    attention(1, 50, penstock_attention_f32);
    attention(4, 50, penstock_attention_f32);
    attention(33, 90, penstock_attention_long_f32);
    attention(4, 50, nullptr, penstock_attention_f32_int8);
    attention(33, 90, nullptr, penstock_attention_long_f32_int8);
}
