// Rounding to int8 and int4 (checkpoint/rounding.py says what is sought): a row to a lane, 128 inputs at a time.

constexpr int64_t kTurned = 128;  // inputs that are turned at once: whole groups

// Inputs first … first + count - 1 of a block's rows as [count][16] floats; zeros beyond the last row and input.
inline void turn_rows(const StoredRows& rows, int64_t block, int64_t first, int64_t count, float* turned) {
  const int64_t width = rows.dtype == Stored::f32 ? 4 : 2;
  for (int64_t i = 0; i < count; i += 16) {
    float some[kBlock][16];
    for (int64_t lane = 0; lane < kBlock; ++lane) {
      const int64_t row = block * kBlock + lane, left = rows.k - first - i;
      alignas(64) uint8_t stored[64] = {};
      if (row < rows.n && left > 0)
        std::memcpy(stored, static_cast<const uint8_t*>(rows.data) + (row * rows.k + first + i) * width,
                    size_t((left < 16 ? left : 16) * width));
      const auto* words = reinterpret_cast<const uint16_t*>(stored);
      store(some[lane], rows.dtype == Stored::f32    ? load(reinterpret_cast<const float*>(stored))
                        : rows.dtype == Stored::bf16 ? load_bf16(words)
                                                     : load_half(words));
    }
    for (int64_t j = 0; j < 16; ++j)
      for (int64_t lane = 0; lane < kBlock; ++lane) turned[(i + j) * kBlock + lane] = some[lane][j];
  }
}

inline Ints size_bits(Floats x) { return floats_to_bits(x) & ints(0x7fffffff); }  // NaN is larger than every number
inline Floats size_of(Floats x) { return bits_to_floats(size_bits(x)); }
inline Floats inverse_of(Floats scale) { return if_less(floats(1e-30f), size_of(scale), floats(1) / scale, floats(0)); }
inline Ints code(Floats x, Floats inverse, float low, float high) {
  return to_ints(smaller(floats(high), larger(floats(low), x * inverse)));
}
inline bool none_above(Ints sizes, int32_t limit) {
  const Ints beyond = larger(sizes, ints(limit)) - ints(limit);
  int32_t lanes[16];
  const Floats bits = bits_to_floats(beyond);
  std::memcpy(lanes, &bits, sizeof lanes);
  for (int32_t lane : lanes)
    if (lane) return false;
  return true;
}
inline void store_lanes(void* p, Ints a) { std::memcpy(p, &a, 64); }

// The float16 nearest to each lane, as a float; what is beyond float16 stays beyond it.
inline Floats to_half(Floats x) {
  const Ints all = floats_to_bits(x);
  const Floats rounded = bits_to_floats((all + ints(0xfff) + (right<13>(all) & ints(1))) & ints(~0x1fff));
  const Floats small = (x + floats(0.75f)) - floats(0.75f);  // steps of 2^-24: numbers without a leading one
  return if_less(size_of(x), floats(0x1p-14f), small, rounded);
}

// The pattern of a float that is a float16.
inline uint16_t half_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
  if (size >= 113u << 23) return uint16_t(sign | ((size >> 13) - (112u << 10)));
  return uint16_t(sign | uint32_t(std::fabs(x) * 0x1p24f));
}

inline bool round_int8(const StoredRows& rows, int64_t block, const Rounded& to) {
  float turned[kTurned * kBlock];
  Ints most = ints(0), sums = ints(0);
  for (int64_t first = 0; first < rows.k; first += kTurned) {
    turn_rows(rows, block, first, kTurned, turned);
    for (int64_t i = 0; i < kTurned; ++i) most = larger(most, size_bits(load(turned + i * kBlock)));
  }
  const Floats scale = bits_to_floats(most) / floats(127), inverse = inverse_of(scale);
  const int64_t steps = (rows.k + 3) / 4;
  uint8_t* data = to.data + block * steps * 64;
  for (int64_t first = 0; first < rows.k; first += kTurned) {
    turn_rows(rows, block, first, kTurned, turned);
    for (int64_t step = first / 4; step < steps && step < (first + kTurned) / 4; ++step) {
      const float* x = turned + (step * 4 - first) * kBlock;
      Ints codes[4];
      for (int j = 0; j < 4; ++j) sums = sums + (codes[j] = code(load(x + j * kBlock), inverse, -127, 127));
      for (int j = 0; j < 4; ++j) codes[j] = codes[j] & ints(255);
      store_lanes(data + step * 64, codes[0] + left<8>(codes[1]) + left<16>(codes[2]) + left<24>(codes[3]));
    }
  }
  store(to.row_scales + block * kBlock, scale);
  store_lanes(to.sums + block * kBlock, sums);
  return none_above(most, 0x7f7fffff);
}

inline bool round_int4(const StoredRows& rows, int64_t block, const Rounded& to) {
  constexpr int kTries = 5;
  constexpr float kSteps[kTries] = {8, 7.5f, 7, 8.5f, 6.5f};
  const int64_t group = to.group, left_over = rows.n - block * kBlock;
  alignas(64) int32_t within[kBlock];  // lanes of rows that there are
  for (int64_t lane = 0; lane < kBlock; ++lane) within[lane] = lane < left_over ? -1 : 0;
  float turned[kTurned * kBlock];
  Ints most = ints(0), worst = ints(0);
  for (int64_t first = 0; first < rows.k; first += group) {
    turn_rows(rows, block, first, group, turned);
    Floats widest = floats(0);
    for (int64_t i = 0; i < group; ++i) {
      const Floats x = load(turned + i * kBlock);
      most = larger(most, size_bits(x));
      widest = if_less(size_of(widest), size_of(x), x, widest);
    }
    Floats inverses[kTries], products[kTries], squares[kTries];
    times<kTries>([&](auto t) {
      inverses[t] = inverse_of(floats(0) - widest / floats(kSteps[t]));
      products[t] = squares[t] = floats(0);
    });
    for (int64_t i = 0; i < group; ++i) {
      const Floats x = load(turned + i * kBlock);
      times<kTries>([&](auto t) {
        const Floats c = to_floats(code(x, inverses[t], -8, 7));
        products[t] = fma(x, c, products[t]);
        squares[t] = fma(c, c, squares[t]);
      });
    }
    Floats best = floats(0), least = floats(HUGE_VALF);
    times<kTries>([&](auto t) {
      const Floats scale = to_half(if_less(floats(0), squares[t], products[t] / squares[t], floats(0)));
      worst = larger(worst, size_bits(scale));
      const Floats error = scale * (scale * squares[t] - floats(2) * products[t]);  // less Σ w², the same for all
      best = if_less(error, least, scale, best);
      least = if_less(error, least, error, least);
    });
    float scales[kBlock];
    store(scales, best);
    for (int64_t lane = 0; lane < kBlock; ++lane)
      to.scales[(block * (rows.k / group) + first / group) * kBlock + lane] = half_bits(scales[lane]);
    const Floats inverse = inverse_of(best);
    for (int64_t i = 0; i < group; i += 8) {
      Ints word = ints(0);
      times<4>([&](auto j) {
        const Ints low = code(load(turned + (i + j) * kBlock), inverse, -8, 7) + ints(8);
        const Ints high = code(load(turned + (i + j + 4) * kBlock), inverse, -8, 7) + ints(8);
        word = word + left<8 * j>(low + left<4>(high));
      });
      store_lanes(to.data + (block * rows.k + first + i) / 8 * 64, word & load(within));
    }
  }
  return none_above(most, 0x7f7fffff) && none_above(worst, 0x477fe000);  // the largest float and float16
}

inline bool round_block(const StoredRows& rows, int64_t block, const Rounded& to) {
  return (to.format == Format::int8 ? round_int8 : round_int4)(rows, block, to);
}
