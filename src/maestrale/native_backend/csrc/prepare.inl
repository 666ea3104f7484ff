// Rows of activations in the form that the products of this instruction set read (`Rows` in linear.h).

inline Floats load_some(const float* x, int64_t left) { return left >= 16 ? load(x) : load_first(x, left); }

inline void prepare_bf16(const float* x, int64_t k, uint16_t* row, int64_t padded) {
  for (int64_t i = 0; i < padded; i += 16)
    store_words(row + i, to_bf16(i < k ? load_some(x + i, k - i) : floats(0)));
}

// The largest |x[i]|; NaN if one is NaN: as bits NaN is larger than every number.
inline float largest_size(const float* x, int64_t k) {
  Ints size = ints(0);
  for (int64_t i = 0; i < k; i += 16) size = larger(size, floats_to_bits(load_some(x + i, k - i)) & ints(0x7fffffff));
  float as_floats[16];
  int32_t lanes[16];
  store(as_floats, bits_to_floats(size));
  std::memcpy(lanes, as_floats, sizeof lanes);
  for (int32_t lane : lanes) lanes[0] = lane > lanes[0] ? lane : lanes[0];
  std::memcpy(as_floats, lanes, 4);
  return as_floats[0];
}

// Writes q + shift and returns the scale of q. In a row that holds NaN or an infinite number the scale is NaN, and so
// is every product.
inline float prepare_bytes(const float* x, int64_t k, uint8_t* row, int64_t padded, int shift) {
  const float most = largest_size(x, k);
  const bool usable = most > 1e-30f && most <= FLT_MAX;  // else 127 / most is no number
  const Floats inverse = floats(usable ? 127 / most : 0);
  for (int64_t i = 0; i < padded; i += 16) {
    const Floats in = usable && i < k ? load_some(x + i, k - i) : floats(0);
    store_bytes(row + i, to_ints(in * inverse) + ints(shift));
  }
  return most <= FLT_MAX ? most / 127 : NAN;
}

inline void sum_groups(const uint8_t* row, int64_t k, int64_t group, int32_t* sums) {
  for (int64_t g = 0; g < k / group; ++g) {
    int32_t sum = 0;
    for (int64_t i = 0; i < group; ++i) sum += int8_t(row[g * group + i]);
    sums[g] = -8 * sum;
  }
}

inline void prepare(const float* x, int64_t stride, int64_t first, int64_t last, const Rows& rows) {
  for (int64_t t = first; t < last; ++t) {
    const float* from = x + t * stride;
    uint8_t* row = static_cast<uint8_t*>(rows.data) + t * rows.stride;
    switch (rows.format) {
      case Format::f32:
        std::memcpy(row, from, size_t(rows.k) * 4);
        std::memset(row + rows.k * 4, 0, size_t(rows.stride - rows.k * 4));
        break;
      case Format::bf16:
        prepare_bf16(from, rows.k, reinterpret_cast<uint16_t*>(row), rows.stride / 2);
        break;
      case Format::int8:
        rows.scales[t] = prepare_bytes(from, rows.k, row, rows.stride, kUnsignedRows ? 128 : 0);
        break;
      case Format::int4:
        rows.scales[t] = prepare_bytes(from, rows.k, row, rows.stride, 0);
        sum_groups(row, rows.k, rows.group, rows.sums + t * (rows.k / rows.group));
        break;
    }
  }
}
