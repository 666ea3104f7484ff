// Attention over pages, once for every instruction set: included after simd_SET.h, math.inl and prepare.inl.
//
// A query's bits depend on its keys alone. The blocks that the running softmax goes by have their borders at absolute
// tiles; keys of a block that a query may not see get the weight 0, which adds nothing; and each sum runs in the
// order of its keys, whatever rows are computed beside it.

const float kLaneNumbers[kTile] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// 2^x for x <= 0, 0 up to -127; NaN stays NaN. The polynomial is (2^f - 1) / f on [-1/2, 1/2], to 7e-8.
inline Floats exp2_negative(Floats x) {
  const Floats held = larger(floats(-127), x);
  const Ints n = to_ints(held);
  const Floats f = held - to_floats(n);
  Floats p = floats(0.00015461447765119374f);
  p = fma(p, f, floats(0.0013390866806730628f));
  p = fma(p, f, floats(0.009618056938052177f));
  p = fma(p, f, floats(0.055503569543361664f));
  p = fma(p, f, floats(0.24022650718688965f));
  p = fma(p, f, floats(0.6931471824645996f));
  p = fma(p, f, floats(1));
  return bits_to_floats(floats_to_bits(p) + left<23>(n));  // at -127 all bits of the exponent go, and 0 is left
}

// Two values in bf16 side by side, or one float: what a lane multiplies at once.
template <bool half> inline Floats dot_unit(Floats sum, const uint32_t* lanes, Four unit) {
  if constexpr (half)
    return dot_pairs(sum, load_pairs(reinterpret_cast<const uint8_t*>(lanes)), unit);
  else
    return dot_floats(sum, load(reinterpret_cast<const float*>(lanes)), unit);
}
inline Four spread_unit(const uint32_t* unit) { return spread(reinterpret_cast<const uint8_t*>(unit)); }

// Turns the pairs (2j, 2j + 1) of a head by its position's angle (N4), then to units: bf16 pairs, or floats.
// turns: [2][padded], the cosine of each entry's pair, and its sine, negative for the first of the pair.
template <bool half>
inline void turned_units(const HeadLayout& head, const float* x, const float* turns, float* turned, uint32_t* units) {
  float* swapped = turned + head.padded;
  for (int64_t i = 0; i < head.head_dim; i += 2) {
    turned[i] = swapped[i + 1] = x[i];
    turned[i + 1] = swapped[i] = x[i + 1];
  }
  for (int64_t i = head.head_dim; i < head.padded; ++i) turned[i] = swapped[i] = 0;
  for (int64_t i = 0; i < head.padded; i += kTile) {
    const Floats y = fma(load(turned + i), load(turns + i), load(swapped + i) * load(turns + head.padded + i));
    if constexpr (half) {
      uint16_t words[kTile];
      store_words(words, to_bf16(y));
      std::memcpy(units + i / 2, words, size_t(head.head_dim - i < kTile ? head.head_dim - i : kTile) * 2);
    } else {
      store_first(reinterpret_cast<float*>(units) + i, y, head.head_dim - i < kTile ? head.head_dim - i : kTile);
    }
  }
}

// As `write_span`, in codes and scales.
inline void write_bytes(const CacheView& cache, const Span& span, int64_t g, const float* k, const float* v,
                        int64_t stride, const float* turns) {
  const HeadLayout& head = cache.head;
  uint32_t* keys = cache.page(span.table, span.position, g);
  uint32_t* values = keys + head.tiles * head.key_size();
  float* scales = reinterpret_cast<float*>(keys + head.scales());
  const int64_t offset = span.position % head.page_size;
  alignas(64) float turned[2 * kMaxHead];
  alignas(64) uint32_t entries[kMaxHead];
  alignas(64) uint8_t codes[kMaxHead];
  for (int64_t row = span.first; row < span.first + span.count; ++row) {
    const int64_t at = offset + row - span.first, tile = at / kTile, lane = at % kTile;
    turned_units<false>(head, k + row * stride, turns + row * 2 * head.padded, turned, entries);
    float* scale = scales + tile * 2 * kTile + lane;
    scale[0] = prepare_bytes(reinterpret_cast<const float*>(entries), head.head_dim, codes, head.padded, 0);
    uint32_t* key = keys + tile * head.key_size() + lane;
    for (int64_t u = 0; u < (head.head_dim + 3) / 4; ++u) std::memcpy(key + u * kTile, codes + 4 * u, 4);
    scale[kTile] = prepare_bytes(v + row * stride, head.head_dim, codes, head.padded, 0);
    auto* slot = reinterpret_cast<uint8_t*>(values + tile * head.value_size() + lane / 4 * head.padded) + lane % 4;
    for (int64_t i = 0; i < head.head_dim; ++i) slot[4 * i] = codes[i];
  }
}

// The bf16 of two codes, each the topmost byte of its lane, side by side.
inline void widen_pair(Ints first, Ints second, uint32_t* pair) {
  const Ints low = right<16>(floats_to_bits(to_floats(right<24>(first)))) & ints(0xffff);
  store(reinterpret_cast<float*>(pair), bits_to_floats(low + floats_to_bits(to_floats(right<24>(second)))));
}

// Four codes of each lane as two pairs of bf16.
inline void widen(const uint32_t* codes, uint32_t* first, uint32_t* second) {
  const Ints four = load(reinterpret_cast<const int32_t*>(codes));
  widen_pair(left<24>(four), left<16>(four), first);
  widen_pair(left<8>(four), four, second);
}

template <bool half>
inline void write_span(const CacheView& cache, const Span& span, int64_t g, const float* k, const float* v,
                       int64_t stride, const float* turns) {
  const HeadLayout& head = cache.head;
  uint32_t* keys = cache.page(span.table, span.position, g);
  uint32_t* values = keys + head.tiles * head.key_size();
  const int64_t offset = span.position % head.page_size;
  alignas(64) float turned[2 * kMaxHead];
  alignas(64) uint32_t units[kMaxHead];
  for (int64_t row = span.first; row < span.first + span.count; ++row) {
    const int64_t at = offset + row - span.first, tile = at / kTile, lane = at % kTile;
    turned_units<half>(head, k + row * stride, turns + row * 2 * head.padded, turned, units);
    uint32_t* key = keys + tile * head.key_size() + lane;
    for (int64_t u = 0; u < head.units(); ++u) key[u * kTile] = units[u];
    const float* value = v + row * stride;
    uint32_t* slot = values + tile * head.value_size() + (half ? lane / 2 : lane) * head.padded;
    for (int64_t i = 0; i < head.head_dim; i += kTile) {
      const int64_t n = head.head_dim - i < kTile ? head.head_dim - i : kTile;
      const Floats x = load_first(value + i, n);
      if constexpr (half) {
        uint16_t words[kTile], *to = reinterpret_cast<uint16_t*>(slot + i) + lane % 2;
        store_words(words, to_bf16(x));
        for (int64_t j = 0; j < n; ++j) to[2 * j] = words[j];
      } else {
        store_first(reinterpret_cast<float*>(slot + i), x, n);
      }
    }
  }
}

inline void write_keys(const CacheView& cache, const Span& span, int64_t g, const float* k, const float* v,
                       int64_t stride, const float* turns) {
  const auto write = cache.head.bytes() ? write_bytes : cache.head.half() ? write_span<true> : write_span<false>;
  write(cache, span, g, k, v, stride, turns);
}

// Copies a tile's values of the first `lanes` keys, and 0 for the others; `copy` may be `values`.
template <bool half>
inline void keep_lanes(const HeadLayout& head, const uint32_t* values, int64_t lanes, uint32_t* copy) {
  const int64_t padded = head.padded, whole = (half ? lanes / 2 : lanes) * padded, size = head.wide_value_size();
  if (copy != values) std::memcpy(copy, values, size_t(whole) * 4);
  int64_t end = whole;
  if (half && lanes % 2)
    for (; end < whole + padded; ++end) copy[end] = values[end] & 0xffff;
  std::memset(copy + end, 0, size_t(size - end) * 4);
}

// Sums of R query rows against N tiles: scores[r][n * 16 + lane]; rows lie `units` apart, scores 64 apart.
template <bool half, int R, int N>
__attribute__((noinline)) void score_tiles(  // alone, so that all registers are its own
    const uint32_t* q, int64_t units, const uint32_t* const* keys, float* scores) {
  Floats sums[R][N];
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < N; ++n) sums[r][n] = floats(0);
  for (int64_t u = 0; u < units; ++u)
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Four unit = spread_unit(q + r * units + u);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) sums[r][n] = dot_unit<half>(sums[r][n], keys[n] + u * kTile, unit);
    }
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < N; ++n) store(scores + r * kTile * kTilesAtOnce + n * kTile, sums[r][n]);
}

// y[r][0 … 16 N - 1] = y * correction[r] + the sum over the block's keys of weight times value.
template <bool half, int R, int N>
__attribute__((noinline)) void add_values(
    const uint32_t* weights, const uint32_t* const* values, int tiles, int64_t key_units,
                       int64_t padded, const float* corrections, float* y) {
  Floats sums[R][N];
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < N; ++n) sums[r][n] = load(y + r * padded + n * kTile) * floats(corrections[r]);
  for (int t = 0; t < tiles; ++t)
    for (int64_t u = 0; u < key_units; ++u)
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const Four unit = spread_unit(weights + (r * kTilesAtOnce + t) * key_units + u);
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n)
          sums[r][n] = dot_unit<half>(sums[r][n], values[t] + u * padded + n * kTile, unit);
      }
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < N; ++n) store(y + r * padded + n * kTile, sums[r][n]);
}

// The tiles of a block: where their keys and values lie, the position of their first key, and how many keys they have.
struct Block {
  int tiles = 0;
  const uint32_t* keys[kTilesAtOnce];
  const uint32_t* values[kTilesAtOnce];
  const float* scales[kTilesAtOnce];  // of keys, then of values; null where there are none
  int32_t positions[kTilesAtOnce], counts[kTilesAtOnce];
};

template <bool half, int R>
inline void attend_rows(const HeadLayout& head, const Block& block, const uint32_t* q, float* scores, uint32_t* weights,
                        float* y, float* tops, float* sums, const int32_t* queries, int64_t window, bool masked) {
  constexpr int kKeys = kTile * kTilesAtOnce;
  const int64_t units = head.units(), key_units = head.key_units(), padded = head.padded;
  int first = 0;
  for (; first + kAcross <= block.tiles; first += kAcross)
    score_tiles<half, R, kAcross>(q, units, block.keys + first, scores + first * kTile);
  for (; first < block.tiles; ++first)
    score_tiles<half, R, 1>(q, units, block.keys + first, scores + first * kTile);

  // N6, N7: scores are scaled by 1 / sqrt(C), here times log2(e); softmax is fp32.
  const float scale = float(1.4426950408889634 / std::sqrt(double(head.head_dim)));
  const Floats none = floats(-HUGE_VALF);
  float corrections[R];
  for (int r = 0; r < R; ++r) {
    Floats s[kTilesAtOnce], top = none;
    for (int t = 0; t < block.tiles; ++t) {
      s[t] = load(scores + r * kKeys + t * kTile);
      if (block.scales[t]) s[t] = s[t] * load(block.scales[t]);
      if (masked) {  // N9: keys p - W + 1 … p
        const int64_t newest = queries[r] - block.positions[t], oldest = window > newest ? 0 : newest - window + 1;
        const Floats lane = load(kLaneNumbers);
        const int64_t last = newest < block.counts[t] - 1 ? newest : block.counts[t] - 1;
        s[t] = if_less(floats(float(last)), lane, none, s[t]);
        s[t] = if_less(lane, floats(float(oldest)), none, s[t]);
      }
      top = larger(s[t], top);
    }
    const float before = tops[r], here = largest(top), now = here > before ? here : before;
    const float base = now == -HUGE_VALF ? 0 : now * scale;  // where no key has been seen yet, -inf - -inf would be NaN
    float kept = 1;
    if (before != now) {
      float lanes[kTile];
      store(lanes, exp2_negative(floats(before * scale - base)));
      kept = lanes[0];
    }
    corrections[r] = kept;
    tops[r] = now;
    Floats total = load(sums + r * kTile) * floats(kept);
    for (int t = 0; t < block.tiles; ++t) {
      Floats p = exp2_negative(fma(s[t], floats(scale), floats(-base)));
      total = total + p;
      if (block.scales[t]) p = p * load(block.scales[t] + kTile);
      uint32_t* to = weights + (r * kTilesAtOnce + t) * key_units;
      if constexpr (half)
        store_words(reinterpret_cast<uint16_t*>(to), to_bf16(p));
      else
        store(reinterpret_cast<float*>(to), p);
    }
    store(sums + r * kTile, total);
  }
  int64_t i = 0;
  const uint32_t* values[kTilesAtOnce];
  for (; i + kAcross * kTile <= padded; i += kAcross * kTile) {
    for (int t = 0; t < block.tiles; ++t) values[t] = block.values[t] + i;
    add_values<half, R, kAcross>(weights, values, block.tiles, key_units, padded, corrections, y + i);
  }
  for (; i < padded; i += kTile) {
    for (int t = 0; t < block.tiles; ++t) values[t] = block.values[t] + i;
    add_values<half, R, 1>(weights, values, block.tiles, key_units, padded, corrections, y + i);
  }
}

template <bool half>
inline void attend_span(const CacheView& cache, const Span& span, int64_t g, int64_t group, const float* q,
                        int64_t q_stride, const float* turns, float* y, int64_t y_stride, void* scratch) {
  constexpr int64_t kKeys = kTile * kTilesAtOnce;
  const HeadLayout& head = cache.head;
  const int64_t rows = span.count * group, units = head.units(), padded = head.padded;
  auto* free = static_cast<float*>(scratch);
  const auto take = [&](int64_t count) { return std::exchange(free, free + (count + 15) / 16 * 16); };
  auto* queries = reinterpret_cast<uint32_t*>(take(rows * units));
  auto* weights = reinterpret_cast<uint32_t*>(take(kRowsAtOnce * kKeys));
  float *scores = take(kRowsAtOnce * kKeys), *sums = take(rows * kTile), *mixed = take(rows * padded);
  float *tops = take(rows), *turned = take(2 * padded);
  auto* positions = reinterpret_cast<int32_t*>(take(rows));
  const int64_t wide_key = head.bytes() ? head.wide_key_size() : 0, wide_value = head.wide_value_size();
  auto* wide_keys = reinterpret_cast<uint32_t*>(take(kTilesAtOnce * wide_key));
  auto* own_values = reinterpret_cast<uint32_t*>(take(kTilesAtOnce * wide_value));
  float* own_scales = take(head.bytes() ? kTilesAtOnce * 2 * kTile : 0);
  for (int64_t m = 0; m < rows; ++m) {
    const int64_t token = m / group, row = span.first + token;
    turned_units<half>(head, q + row * q_stride + m % group * head.head_dim, turns + row * 2 * padded, turned,
                       queries + m * units);
    positions[m] = int32_t(span.position + token);
    tops[m] = -HUGE_VALF;
  }
  std::memset(sums, 0, size_t(rows * kTile) * 4);
  std::memset(mixed, 0, size_t(rows * padded) * 4);

  const int64_t newest = span.position + span.count - 1;
  const int64_t oldest = cache.window > span.position ? 0 : span.position - cache.window + 1;
  const auto tile_of = [&](int64_t p) { return p / head.page_size * head.tiles + p % head.page_size / kTile; };
  const int64_t end = tile_of(newest) + 1;
  for (int64_t tile = tile_of(oldest); tile < end;) {
    const int64_t border = (tile / kTilesAtOnce + 1) * kTilesAtOnce, stop = border < end ? border : end;
    Block block;
    // Where all of these rows see all of these keys, there is nothing to mask.
    bool masked = false;
    for (; tile < stop; ++tile, ++block.tiles) {
      const int64_t inside = tile % head.tiles, first = tile / head.tiles * head.page_size + inside * kTile;
      const int64_t left = head.page_size - inside * kTile, count = left < kTile ? left : kTile;
      const uint32_t* page = cache.page(span.table, first, g);
      const uint32_t* keys = page + inside * head.key_size();
      const uint32_t* values = page + head.tiles * head.key_size() + inside * head.value_size();
      const float* scales = nullptr;
      uint32_t *to_keys = wide_keys + block.tiles * wide_key, *to_values = own_values + block.tiles * wide_value;
      if (head.bytes()) {
        for (int64_t i = 0; i < wide_key; i += 2 * kTile) widen(keys + i / 2, to_keys + i, to_keys + i + kTile);
        for (int64_t i = 0; i < head.value_size(); i += kTile) {
          uint32_t* to = to_values + i / padded * 2 * padded + i % padded;
          widen(values + i, to, to + padded);
        }
        keys = to_keys, values = to_values;
        scales = reinterpret_cast<const float*>(page + head.scales()) + inside * 2 * kTile;
      }
      // What stands behind the newest key, perhaps of another sequence, must not meet a weight of 0: 0 * NaN is NaN.
      const int64_t known = newest - first + 1, lanes = known < count ? known : count;
      if (lanes < kTile) {
        keep_lanes<half>(head, values, lanes, to_values);
        values = to_values;
        if (scales) {
          float* to = own_scales + block.tiles * 2 * kTile;
          std::memcpy(to, scales, size_t(kTile + lanes) * 4);
          std::memset(to + kTile + lanes, 0, size_t(kTile - lanes) * 4);
          scales = to;
        }
      }
      block.keys[block.tiles] = keys, block.values[block.tiles] = values, block.scales[block.tiles] = scales;
      block.positions[block.tiles] = int32_t(first);
      block.counts[block.tiles] = int32_t(count);
      masked |= count < kTile || first + kTile - 1 > span.position || first <= newest - cache.window;
    }
    for (int64_t m = 0; m < rows;) {
      const auto step = [&]<int R>() {
        attend_rows<half, R>(head, block, queries + m * units, scores, weights, mixed + m * padded, tops + m,
                             sums + m * kTile, positions + m, cache.window, masked);
        m += R;
      };
      if (rows - m >= kRowsAtOnce)
        step.template operator()<4>();
      else if (rows - m == 3)
        step.template operator()<3>();
      else if (rows - m == 2)
        step.template operator()<2>();
      else
        step.template operator()<1>();
    }
  }
  for (int64_t m = 0; m < rows; ++m) {
    float lanes[kTile], sum = 0;
    store(lanes, load(sums + m * kTile));
    for (int i = 0; i < kTile; ++i) sum += lanes[i];
    float* to = y + m / group * y_stride + m % group * head.head_dim;
    for (int64_t i = 0; i < head.head_dim; i += kTile)
      store_first(to + i, load(mixed + m * padded + i) / floats(sum),
                  head.head_dim - i < kTile ? head.head_dim - i : kTile);
  }
}

inline void attend(const CacheView& cache, const Span& span, int64_t g, int64_t group, const float* q,
                   int64_t q_stride, const float* turns, float* y, int64_t y_stride, void* scratch) {
  (cache.head.half() ? attend_span<true> : attend_span<false>)(cache, span, g, group, q, q_stride, turns, y, y_stride,
                                                               scratch);
}
