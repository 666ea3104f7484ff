// Linear layers and attention of the arm64 kernels against double sums over the very numbers that the formats stand for;
// run under emulation by test_arm64.py. Prints "ok", or the first difference.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <vector>

#include "activations.h"

using namespace maestrale;

namespace {

uint32_t state = 1;
int number(int below) {  // a linear congruential generator (Knuth's constants for 32 bits), the upper bits
  state = state * 1664525u + 1013904223u;
  return int((state >> 8) % uint32_t(below));
}
float real() { return float(number(2001) - 1000) / 500.0f; }
float bf16_value(uint16_t bits) {
  const uint32_t wide = uint32_t(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

float rounded(float x) {  // to bf16, nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bf16_value(uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16));
}

struct Example {
  Weight weight;
  std::vector<double> values;  // [n][k]
  std::vector<uint8_t> data;
  std::vector<float> row_scales, offsets;
  std::vector<int32_t> sums;
  std::vector<uint16_t> scales;
};

void fill(Example& e, Format format, int64_t n, int64_t k, int64_t group, bool affine) {
  const int64_t blocks = (n + 15) / 16;
  e.weight = {format, n, k, group, nullptr, nullptr, nullptr, nullptr, nullptr};
  e.data.assign(size_t(blocks * block_bytes(e.weight)), 0);
  e.values.assign(size_t(n * k), 0);
  e.row_scales.assign(size_t(blocks * 16), 0.01f);
  e.sums.assign(size_t(blocks * 16), 0);
  e.scales.assign(group ? size_t(blocks * 16 * (k / group)) : 0, 0x2400);  // 2^-6
  e.offsets.assign(e.scales.size(), 0.03125f);
  for (int64_t o = 0; o < n; ++o)
    for (int64_t i = 0; i < k; ++i) {
      uint8_t* block = e.data.data() + o / 16 * block_bytes(e.weight);
      double& value = e.values[size_t(o * k + i)];
      const int64_t lane = o % 16;
      if (format == Format::f32) {
        const float w = real();
        std::memcpy(block + (i * 16 + lane) * 4, &w, 4);
        value = w;
      } else if (format == Format::bf16) {
        const uint16_t w = uint16_t(0x3f00 + number(256) + number(2) * 0x8000);
        std::memcpy(block + (i / 2 * 32 + lane * 2 + i % 2) * 2, &w, 2);
        value = bf16_value(w);
      } else if (format == Format::int8) {
        const int q = number(256) - 128;
        block[i / 4 * 64 + lane * 4 + i % 4] = uint8_t(q);
        e.sums[size_t(o)] += q;
        value = q * double(0.01f);
      } else {
        const int q = number(16);
        block[i / 8 * 64 + lane * 4 + i % 4] |= uint8_t(i % 8 < 4 ? q : q << 4);
        value = affine ? q / 64.0 + 0.03125 : (q - 8) / 64.0;
      }
    }
  e.weight.data = e.data.data();
  e.weight.row_scales = e.row_scales.data(), e.weight.sums = e.sums.data();
  e.weight.scales = group ? e.scales.data() : nullptr, e.weight.offsets = affine ? e.offsets.data() : nullptr;
}

bool check(const Kernels& kernels, const char* name, Format format, int64_t group, bool affine) {
  const int64_t n = 100, k = 384, most = 9;
  Example e;
  fill(e, format, n, k, group, affine);
  std::vector<float> x(size_t(most * k)), whole(size_t(most * n)), part(whole.size());
  for (float& value : x) value = real();
  Activations room;
  room.want(e.weight);
  room.reserve(most);
  room.prepare(kernels, {&e.weight}, x.data(), k, 0, most);
  const Rows rows = room.rows(e.weight, 0, most);
  kernels.linear(e.weight, rows, 0, blocks_of(e.weight), {whole.data(), n});
  for (int64_t t = 0; t < most; ++t) {
    float largest = 0;
    for (int64_t i = 0; i < k; ++i) largest = std::max(largest, std::abs(x[size_t(t * k + i)]));
    for (int64_t o = 0; o < n; ++o) {
      double sum = 0, size = 0;
      for (int64_t i = 0; i < k; ++i) {
        const float one = x[size_t(t * k + i)];
        const double seen = format == Format::f32 ? one
                            : format == Format::bf16
                                ? rounded(one)
                                : std::nearbyint(one * (127 / largest)) * double(largest / 127);
        sum += seen * e.values[size_t(o * k + i)];
        size += std::abs(seen * e.values[size_t(o * k + i)]);
      }
      const double got = whole[size_t(t * n + o)];
      if (!(std::abs(got - sum) <= 2e-6 * size)) {
        std::printf("%s %s: row %d, output %d: expected %.9g, got %.9g\n", kernels.isa, name, int(t), int(o), sum, got);
        return false;
      }
    }
  }
  room.prepare(kernels, {&e.weight}, x.data() + 4 * k, k, 0, 1);
  const Rows one = room.rows(e.weight, 0, 1);
  kernels.linear(e.weight, one, 0, blocks_of(e.weight), {part.data(), n});
  if (std::memcmp(part.data(), whole.data() + 4 * n, size_t(n) * 4) == 0) return true;
  std::printf("%s %s: a row alone has other bits than among nine\n", kernels.isa, name);
  return false;
}

// What a cache keeps of a head's entries.
std::vector<double> held(Kept kept, const float* x, int64_t n) {
  float most = 0;
  for (int64_t i = 0; i < n; ++i) most = std::max(most, std::abs(x[i]));
  std::vector<double> values;
  for (int64_t i = 0; i < n; ++i)
    values.push_back(kept == Kept::f32    ? x[i]
                     : kept == Kept::bf16 ? rounded(x[i])
                                          : std::nearbyint(x[i] * (127 / most)) * double(most / 127));
  return values;
}

// One head of keys and three of queries over 50 positions in four pages, none of them turned.
bool check_attention(const Kernels& kernels, Kept kept, int64_t window) {
  const int64_t T = 50, H = 3, C = 18, P = 16, table[] = {2, 0, 3, 1};
  const HeadLayout head = head_layout(C, P, kept);
  std::vector<uint32_t> pool(size_t(4 * head.size()), 0xffffffffu);
  std::vector<float> q(size_t(T * H * C)), k(size_t(T * C)), v(k.size()), y(q.size()), turns(size_t(T * 2 * head.padded));
  for (auto* all : {&q, &k, &v})
    for (float& x : *all) x = real();
  for (int64_t t = 0; t < T; ++t) std::fill_n(turns.data() + t * 2 * head.padded, head.padded, 1.0f);
  std::vector<char> scratch(size_t(attend_scratch(head, H) + 64));
  void* room = scratch.data() + (64 - reinterpret_cast<uintptr_t>(scratch.data()) % 64) % 64;
  const CacheView cache{pool.data(), head.size(), head, 4, window};
  for (int64_t t = 0; t < T; t += P)
    kernels.write_keys(cache, {t, std::min(P, T - t), t, table}, 0, k.data(), v.data(), C, turns.data());
  for (int64_t t = 0; t < T; t += 10)
    kernels.attend(cache, {t, 10, t, table}, 0, H, q.data(), H * C, turns.data(), y.data() + t * H * C, H * C, room);
  for (int64_t t = 0; t < T; ++t)
    for (int64_t h = 0; h < H; ++h) {
      std::vector<double> scores, expected(size_t(C), 0);
      double sum = 0;
      const int64_t oldest = t < window ? 0 : t - window + 1;
      for (int64_t s = oldest; s <= t; ++s) {
        const auto key = held(kept, k.data() + s * C, C);
        double score = 0;
        for (int64_t i = 0; i < C; ++i) {
          const float one = q[size_t((t * H + h) * C + i)];
          score += (kept == Kept::f32 ? one : rounded(one)) * key[size_t(i)];
        }
        scores.push_back(score / std::sqrt(double(C)));
      }
      const double top = *std::max_element(scores.begin(), scores.end());
      for (int64_t s = oldest; s <= t; ++s) {
        const double weight = std::exp(scores[size_t(s - oldest)] - top);
        const auto value = held(kept, v.data() + s * C, C);
        sum += weight;
        for (int64_t i = 0; i < C; ++i) expected[size_t(i)] += weight * value[size_t(i)];
      }
      for (int64_t i = 0; i < C; ++i) {
        const double wanted = expected[size_t(i)] / sum, got = y[size_t((t * H + h) * C + i)];
        if (!(std::abs(got - wanted) <= (kept == Kept::f32 ? 3e-6 : 1e-2))) {
          std::printf("%s attention, cache %d: row %d, head %d: expected %.9g, got %.9g\n", kernels.isa, int(kept),
                      int(t), int(h), wanted, got);
          return false;
        }
      }
    }
  return true;
}

}  // namespace

int main() {
  const Kernels* neon = find_kernels("neon");
  if (!neon) return std::puts("no neon kernels"), 1;
  for (const Kernels* kernels : {neon, find_kernels("generic")})
    if (!(check(*kernels, "f32", Format::f32, 0, false) && check(*kernels, "bf16", Format::bf16, 0, false) &&
          check(*kernels, "int8", Format::int8, 0, false) && check(*kernels, "int4", Format::int4, 32, false) &&
          check(*kernels, "int4 affine", Format::int4, 64, true)))
      return 1;
  for (const Kernels* kernels : {neon, find_kernels("generic")})
    for (Kept kept : {Kept::f32, Kept::bf16, Kept::int8})
      for (int64_t window : {int64_t(21), std::numeric_limits<int64_t>::max()})
        if (!check_attention(*kernels, kept, window)) return 1;
  std::puts("ok");
}
