// What a step does to rows of fp32 between its products: RMSNorm, router scores, the mixing of experts' outputs.

inline void store_some(float* y, Floats a, int64_t left) { left >= 16 ? store(y, a) : store_first(y, a, left); }

// N3: y = x / sqrt(mean(x²) + eps) * weight.
inline void norm(const float* x, const float* weight, int64_t n, float eps, float* y) {
  Floats sums[4] = {floats(0), floats(0), floats(0), floats(0)};
  for (int64_t i = 0; i < n; i += 16) {
    const Floats a = load_some(x + i, n - i);
    sums[i / 16 % 4] = fma(a, a, sums[i / 16 % 4]);
  }
  const float mean = sum((sums[0] + sums[1]) + (sums[2] + sums[3])) / float(n);
  const Floats factor = floats(1 / std::sqrt(mean + eps));
  for (int64_t i = 0; i < n; i += 16)
    store_some(y + i, load_some(x + i, n - i) * factor * load_some(weight + i, n - i), n - i);
}

// y[e] = the product of x and row e of gate [experts][n].
inline void scores(const float* gate, int64_t experts, const float* x, int64_t n, float* y) {
  for (int64_t e = 0; e < experts; ++e) {
    Floats all = floats(0);
    for (int64_t i = 0; i < n; i += 16) all = fma(load_some(gate + e * n + i, n - i), load_some(x + i, n - i), all);
    y[e] = sum(all);
  }
}

// x += the sum over k of weights[k] * rows[k], in the order of k.
inline void mix(float* x, const float* const* rows, const float* weights, int64_t count, int64_t n) {
  for (int64_t i = 0; i < n; i += 16) {
    Floats all = floats(0);
    for (int64_t k = 0; k < count; ++k) all = fma(load_some(rows[k] + i, n - i), floats(weights[k]), all);
    store_some(x + i, load_some(x + i, n - i) + all, n - i);
  }
}
