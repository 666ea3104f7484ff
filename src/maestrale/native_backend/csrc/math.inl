// What every kernel needs beyond a set's own instructions: rounding to bf16, sums over lanes, e^x and SiLU.

// bf16 of each lane in its lower half: to nearest, ties to even. Infinite stays infinite and NaN stays NaN.
inline Ints to_bf16(Floats a) {
  const Ints all = floats_to_bits(a);
  const Ints rounded = all + ints(0x7fff) + (right<16>(all) & ints(1));
  const Floats size = bits_to_floats(all & ints(0x7fffffff));
  return right<16>(floats_to_bits(if_less(size, floats(HUGE_VALF), bits_to_floats(rounded), a)));
}

// The sum, and the largest, of 16 lanes: halves onto halves.
inline float sum(Floats a) {
  float v[16];
  store(v, a);
  for (int half = 8; half; half /= 2)
    for (int i = 0; i < half; ++i) v[i] += v[i + half];
  return v[0];
}
inline float largest(Floats a) {
  float v[16];
  store(v, a);
  for (int half = 8; half; half /= 2)
    for (int i = 0; i < half; ++i) v[i] = v[i] > v[i + half] ? v[i] : v[i + half];
  return v[0];
}

// e^x within 2 units in the last place; 0 below -87, NaN for NaN, and e^88 for all that is larger than 88.
inline Floats exp(Floats x) {
  const Floats least = floats(-87), in = smaller(floats(88), larger(least, x));
  const Ints n = to_ints(in * floats(1.44269504f));
  const Floats f = to_floats(n);
  const Floats r = fma(f, floats(2.12194440e-4f), fma(f, floats(-0.693359375f), in));  // x - n ln 2, ln 2 in two parts
  Floats p = floats(1.0f / 5040);
  for (float term : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = fma(p, r, floats(term));
  return if_less(x, least, floats(0), bits_to_floats(floats_to_bits(p) + left<23>(n)));
}

inline Floats silu(Floats x) { return x / (floats(1) + exp(floats(0) - x)); }
