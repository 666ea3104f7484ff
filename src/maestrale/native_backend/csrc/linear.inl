// Linear layers: tiles of a few rows times a few blocks of 16 outputs, whose sums stay in registers over all inputs.
//
// A tile's size never shows in its bits: every lane of every sum adds the inputs in ascending order.

// What a tile asks of memory ahead of its own reading, at 64 bytes from the place for each 64 that it reads, or less.
// A single pass over the blocks asks for its own next bytes. Of several passes, which read the first's bytes again from
// the cache, each asks for its share of the next blocks: so memory and multiplication go on together.
struct Ahead {
  int64_t data, step;  // bytes from the tile's block to the first, and from one step to the next
  int64_t scales;      // int4: the same for its scales, which every pass asks for

  static constexpr int64_t kNear = 2048;

  Ahead(const Weight& w, int64_t blocks, int64_t pass, int64_t passes) : data(kNear), step(64), scales(kNear / 2) {
    if (passes == 1) return;
    int64_t shares = 2;
    while (shares < 16 && shares * 2 <= passes) shares *= 2;
    const int64_t block = block_bytes(w);
    data = blocks * block + pass % shares * (block / shares), step = 64 / shares;
    if (w.scales) scales = blocks * (w.k / w.group) * 2 * kBlock;
  }
};

// body(0), body(1), … with constants for numbers: what an array holds stays in registers, which loops do not promise.
template <int N, class Body>
[[gnu::always_inline]] inline void times(const Body& body) {
  [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
    (body(std::integral_constant<int, I>()), ...);
  }(std::make_integer_sequence<int, N>());
}

// body(r, v) for every row and block of a tile.
template <int R, int V, class Body>
[[gnu::always_inline]] inline void each(const Body& body) {
  times<V>([&](auto v) __attribute__((always_inline)) {
    times<R>([&](auto r) __attribute__((always_inline)) { body(r, v); });
  });
}
#define EACH [&](auto r, auto v) __attribute__((always_inline))

// Asks for the lines that `put` will write, which come while a tile's sums are made.
template <int R, int V>
[[gnu::always_inline]] inline void ask(const Output& out, int64_t row, int64_t block) {
  each<R, V>(EACH { __builtin_prefetch(out.y + (row + r) * out.stride + (block + v) * kBlock, 1); });
}

template <int R, int V>
inline void put(const Floats (&sums)[R][V], const Weight& w, int64_t row, int64_t block, const Output& out) {
  each<R, V>(EACH {
    const int64_t o = (block + v) * kBlock;
    float* y = out.y + (row + r) * out.stride + o;
    if (o + kBlock <= w.n)
      store(y, out.add ? load(y) + sums[r][v] : sums[r][v]);
    else
      store_first(y, out.add ? load_first(y, w.n - o) + sums[r][v] : sums[r][v], w.n - o);
  });
}

// A product of rows and weights of one format, 64 bytes of a block and 4 bytes of a row at a time.
struct FloatProduct {
  using Sum = Floats;
  static constexpr int64_t kInputs = 1;
  static Floats start(const Weight&, int64_t) { return floats(0); }
  static Floats load_weights(const uint8_t* p) { return load(reinterpret_cast<const float*>(p)); }
  static Floats add(Floats s, Floats w, Four x) { return dot_floats(s, w, x); }
  static Floats finish(Floats s, const Weight&, const Rows&, int64_t, int64_t) { return s; }
};

struct PairProduct {
  using Sum = Floats;
  static constexpr int64_t kInputs = 2;
  static Floats start(const Weight&, int64_t) { return floats(0); }
  static Pairs load_weights(const uint8_t* p) { return load_pairs(p); }
  static Floats add(Floats s, Pairs w, Four x) { return dot_pairs(s, w, x); }
  static Floats finish(Floats s, const Weight&, const Rows&, int64_t, int64_t) { return s; }
};

struct ByteProduct {
  using Sum = Ints;
  static constexpr int64_t kInputs = 4;
  static Ints start(const Weight& w, int64_t block) {  // what rows of q + 128 bring in too much
    return kUnsignedRows ? ints(0) - left<7>(load(w.sums + block * kBlock)) : ints(0);
  }
  static Bytes load_weights(const uint8_t* p) { return load_bytes(p); }
  static Ints add(Ints s, Bytes w, Four x) { return dot_bytes(s, w, x); }
  static Floats finish(Ints s, const Weight& w, const Rows& rows, int64_t row, int64_t block) {
    return to_floats(s) * load(w.row_scales + block * kBlock) * floats(rows.scales[row]);
  }
};

template <class Product>
struct Plain {
  template <int R, int V>
  static void tile(const Weight& w, const Rows& rows, int64_t row, int64_t block, const Output& out,
                   const Ahead& ahead) {
    const int64_t steps = (w.k + Product::kInputs - 1) / Product::kInputs;
    const uint8_t* data = static_cast<const uint8_t*>(w.data) + block * steps * 64;
    const uint8_t* next = data + ahead.data;
    const uint8_t* x = static_cast<const uint8_t*>(rows.data) + row * rows.stride;
    typename Product::Sum sums[R][V];
    each<R, V>(EACH { sums[r][v] = Product::start(w, block + v); });
    constexpr int kFours = (R + 3) / 4;  // an address for four rows each: one for each row would not fit in registers
    const uint8_t* fours[kFours];
    times<kFours>([&](auto f) __attribute__((always_inline)) { fours[f] = x + f * 4 * rows.stride; });
    for (int64_t step = 0; step < steps; ++step) {
      decltype(Product::load_weights(data)) weights[V];
      times<V>([&](auto v) __attribute__((always_inline)) {
        __builtin_prefetch(next + v * steps * 64 + step * ahead.step);
        weights[v] = Product::load_weights(data + (v * steps + step) * 64);
      });
      times<R>([&](auto r) __attribute__((always_inline)) {
        const Four four = spread(fours[r / 4] + r % 4 * rows.stride);
        times<V>([&](auto v) __attribute__((always_inline)) { sums[r][v] = Product::add(sums[r][v], weights[v], four); });
      });
      times<kFours>([&](auto f) __attribute__((always_inline)) {
        fours[f] += 4;
        asm("" : "+r"(fours[f]));
      });
    }
    Floats results[R][V];
    each<R, V>(EACH { results[r][v] = Product::finish(sums[r][v], w, rows, row + r, block + v); });
    put<R, V>(results, w, row, block, out);
  }
};

// int4: exact integer sums within a group, fp32 sums over the groups in ascending order.
template <bool affine>
struct Grouped {
  template <int R, int V>
  static void tile(const Weight& w, const Rows& rows, int64_t row, int64_t block, const Output& out,
                   const Ahead& ahead) {
    const int64_t groups = w.k / w.group, steps = w.group / 8;
    const uint8_t* data = static_cast<const uint8_t*>(w.data) + block * groups * steps * 64;
    const uint8_t* next = data + ahead.data;
    const uint8_t* x = static_cast<const uint8_t*>(rows.data) + row * rows.stride;
    const int32_t* row_sums = rows.sums + row * groups;
    Floats totals[R][V];
    each<R, V>(EACH { totals[r][v] = floats(0); });
    for (int64_t g = 0; g < groups; ++g) {
      Ints sums[R][V];
      each<R, V>(EACH { sums[r][v] = ints(affine ? 0 : row_sums[r * groups + g]); });
      for (int64_t step = g * steps; step < (g + 1) * steps; ++step)
        times<2>([&](auto half) __attribute__((always_inline)) {
          Four four[R];
          times<R>([&](auto r) __attribute__((always_inline)) {
            four[r] = spread(x + r * rows.stride + step * 8 + half * 4);
          });
          times<V>([&](auto v) __attribute__((always_inline)) {
            if constexpr (!half) __builtin_prefetch(next + v * groups * steps * 64 + step * ahead.step);
            const Bytes both = load_bytes(data + (v * groups * steps + step) * 64);
            const Bytes codes = half ? high_nibbles(both) : low_nibbles(both);
            times<R>([&](auto r) __attribute__((always_inline)) {
              sums[r][v] = dot_nibbles(sums[r][v], codes, four[r]);
            });
          });
        });
      times<V>([&](auto v) __attribute__((always_inline)) {
        const int64_t at = ((block + v) * groups + g) * kBlock;
        __builtin_prefetch(reinterpret_cast<const uint8_t*>(w.scales + at) + ahead.scales);
        const Floats scale = load_half(w.scales + at);
        times<R>([&](auto r) __attribute__((always_inline)) {
          totals[r][v] = fma(to_floats(sums[r][v]), scale, totals[r][v]);
          if constexpr (affine)
            totals[r][v] = fma(load(w.offsets + at), floats(-0.125f * float(row_sums[r * groups + g])), totals[r][v]);
        });
      });
    }
    each<R, V>(EACH { totals[r][v] = totals[r][v] * floats(rows.scales[row + r]); });
    put<R, V>(totals, w, row, block, out);
  }
};

// `count` rows, from `least` to R, times V blocks.
template <class Kind, int least, int R, int V>
inline void some_rows(const Weight& w, const Rows& rows, int64_t row, int64_t count, int64_t block, const Output& out,
                      const Ahead& ahead) {
  if (count == R) {
    ask<R, V>(out, row, block);
    return Kind::template tile<R, V>(w, rows, row, block, out, ahead);
  }
  if constexpr (R > least) some_rows<Kind, least, R - 1, V>(w, rows, row, count, block, out, ahead);
}

// Blocks V at a time, over each of which all rows pass in turns of `least` to R, as even as can be.
template <class Kind, int least, int R, int V>
inline void every_block(const Weight& w, const Rows& rows, int64_t first, int64_t last, const Output& out) {
  const int64_t passes = (rows.count + R - 1) / R;
  int64_t block = first;
  for (; last - block >= V; block += V)
    for (int64_t pass = 0; pass < passes; ++pass) {
      const int64_t row = pass * rows.count / passes, end = (pass + 1) * rows.count / passes;
      some_rows<Kind, least, R, V>(w, rows, row, end - row, block, out, Ahead(w, V, pass, passes));
    }
  if constexpr (V > 1)
    if (block < last) every_block<Kind, least, R, V / 2>(w, rows, block, last, out);
}

// Few rows: a single pass, which waits for memory and likes many streams, as many blocks as the tile's sums allow.
template <class Kind, Tile tile, int R>
inline void every_block_once(const Weight& w, const Rows& rows, int64_t first, int64_t last, const Output& out) {
  constexpr int V = tile.rows * tile.blocks / R < kStreams ? tile.rows * tile.blocks / R : kStreams;
  if (rows.count < R) {
    if constexpr (R > 1) every_block_once<Kind, tile, R - 1>(w, rows, first, last, out);
    return;
  }
  int64_t block = first;
  for (; last - block >= V; block += V) Kind::template tile<R, V>(w, rows, 0, block, out, Ahead(w, V, 0, 1));
  for (; block < last; ++block) Kind::template tile<R, 1>(w, rows, 0, block, out, Ahead(w, 1, 0, 1));
}

template <class Kind, Tile tile>
inline void multiply(const Weight& w, const Rows& rows, int64_t first, int64_t last, const Output& out) {
  if (rows.count <= tile.rows) return every_block_once<Kind, tile, tile.rows>(w, rows, first, last, out);
  every_block<Kind, (tile.rows + 1) / 2, tile.rows, tile.blocks>(w, rows, first, last, out);
}

inline void linear(const Weight& w, const Rows& rows, int64_t first, int64_t last, const Output& out) {
  if (w.format == Format::f32) return multiply<Plain<FloatProduct>, kPlainTile>(w, rows, first, last, out);
  if (w.format == Format::bf16) return multiply<Plain<PairProduct>, kPlainTile>(w, rows, first, last, out);
  if (w.format == Format::int8) return multiply<Plain<ByteProduct>, kPlainTile>(w, rows, first, last, out);
  if (w.offsets) return multiply<Grouped<true>, kGroupedTile>(w, rows, first, last, out);
  multiply<Grouped<false>, kGroupedTile>(w, rows, first, last, out);
}

// A few blocks and rows at a time, so that what the two products leave is still near when it is joined.
template <auto product, int64_t kRows>
inline void swiglu_of(const Weight& w1, const Weight& w3, const Rows& rows, int64_t first, int64_t last,
                      const Output& out) {
  constexpr int64_t kBlocks = 12, kWide = kBlocks * kBlock;
  float gate[kRows * kWide], up[kRows * kWide];
  for (int64_t block = first; block < last; block += kBlocks) {
    const int64_t end = block + kBlocks < last ? block + kBlocks : last, o = block * kBlock;
    const int64_t wide = (end * kBlock < w1.n ? end * kBlock : w1.n) - o;
    for (int64_t row = 0; row < rows.count; row += kRows) {
      Rows some = rows;
      some.count = rows.count - row < kRows ? rows.count - row : kRows;
      some.data = static_cast<uint8_t*>(rows.data) + row * rows.stride;
      if (rows.scales) some.scales += row;
      if (rows.sums) some.sums += row * (rows.k / rows.group);
      product(w1, some, block, end, {gate - o, kWide});
      product(w3, some, block, end, {up - o, kWide});
      for (int64_t t = 0; t < some.count; ++t)
        for (int64_t i = 0; i < wide; i += kBlock) {
          const int64_t n = wide - i < kBlock ? wide - i : kBlock;
          const Floats a = load_first(gate + t * kWide + i, n), b = load_first(up + t * kWide + i, n);
          store_first(out.y + (row + t) * out.stride + o + i, silu(a) * b, n);
        }
    }
  }
}

inline void swiglu(const Weight& w1, const Weight& w3, const Rows& rows, int64_t first, int64_t last,
                   const Output& out) {
  swiglu_of<linear, 24>(w1, w3, rows, first, last, out);
}
