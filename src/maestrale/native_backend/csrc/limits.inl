// What one thread can do at most, for benchmarks to stand beside: plain reading, and products of registers.

// Reads `size` bytes at p once, four streams at a time.
inline void read_all(const uint8_t* p, int64_t size) {
  constexpr int64_t kStreams = 4, kStep = 256;
  const int64_t part = size / kStreams / kStep * kStep;
  Ints all = ints(0);
  for (int64_t i = 0; i < part; i += kStep)
    for (int64_t s = 0; s < kStreams; ++s)
      for (int64_t line = 0; line < kStep; line += 64) {
        const uint8_t* from = p + s * part + i + line;
        __builtin_prefetch(from + 1024);
        all = all + load(reinterpret_cast<const int32_t*>(from));
      }
  volatile float used = sum(to_floats(all));  // so that nothing is left out
  (void)used;
}

// Multiplies and adds in registers; returns the number of multiplications and additions.
template <class Product>
inline double multiply_rounds(int64_t rounds) {
  constexpr int kChains = kPlainTile.rows * (kPlainTile.blocks > 1 ? 2 : 1);
  typename Product::Sum sums[kChains];
  uint8_t some[sizeof sums];
  for (size_t i = 0; i < sizeof some; ++i) some[i] = uint8_t(rounds + i);  // chains that differ stay as many
  std::memcpy(static_cast<void*>(sums), some, sizeof sums);
  const auto w = Product::load_weights(some);
  const Four x = spread(some);
  for (int64_t i = 0; i < rounds; ++i)
    times<kChains>([&](auto chain) __attribute__((always_inline)) { sums[chain] = Product::add(sums[chain], w, x); });
  std::memcpy(some, sums, sizeof sums);
  volatile int used = 0;
  for (uint8_t byte : some) used = used + byte;
  return 2.0 * 16 * Product::kInputs * kChains * double(rounds);
}

inline double multiply_all(Format format, int64_t rounds) {
  if (format == Format::f32) return multiply_rounds<FloatProduct>(rounds);
  if (format == Format::bf16) return multiply_rounds<PairProduct>(rounds);
  return multiply_rounds<ByteProduct>(rounds);
}
