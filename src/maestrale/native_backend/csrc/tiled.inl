// Linear layers on tile registers: 16 or 32 rows times blocks of 16 outputs, whose bytes lie in memory as a tile has them.
//
// Bytes are summed in integers, so int8 and int4 products have the bits of the vector path, which takes few rows. bf16
// products add in an order of their own, so all of them go through tiles, whatever the number of rows.

constexpr int64_t kTiledRows = 8;  // from here on int8 and int4 weights are multiplied in tiles

// Tiles 0 to 3 are sums: 2 r + v those of the r-th 16 rows and of block v. 4 and 5 are rows, 6 and 7 weights in turn.
// rows: how many the last of R tiles has; depth: how many bytes of a row meet weights at once.
template <int R>
inline void shape_tiles(int64_t rows, int64_t depth) {
  TileConfig config{};
  config.palette = 1;
  const auto shape = [&](int tile, int64_t count, int64_t bytes) {
    config.rows[tile] = uint8_t(count), config.bytes[tile] = uint16_t(bytes);
  };
  for (int tile = 0; tile < 4; ++tile) shape(tile, R == 1 || tile > 1 ? rows : kTileRows, kTileBytes);
  for (int r = 0; r < R; ++r) shape(4 + r, r + 1 == R ? rows : kTileRows, depth);
  for (int tile = 6; tile < 8; ++tile) shape(tile, depth / 4, kTileBytes);
  set_tiles(config);
}

// The sums += rows from x on times V blocks of weights, whose tiles lie `apart` bytes from each other.
template <class Product, int R, int V>
[[gnu::always_inline]] inline void add_tiles(const uint8_t* x, int64_t stride, const uint8_t* weights, int64_t apart) {
  times<R>([&](auto r) __attribute__((always_inline)) { load_tile<4 + r>(x + r * kTileRows * stride, stride); });
  times<V>([&](auto v) __attribute__((always_inline)) {
    load_tile<6 + v % 2>(weights + v * apart, kTileBytes);
    times<R>([&](auto r) __attribute__((always_inline)) { Product::template add<2 * r + v, 4 + r, 6 + v % 2>(); });
  });
}

template <int R, int V>
[[gnu::always_inline]] inline void zero_sums() {
  each<R, V>(EACH { zero_tile<2 * r + v>(); });
}

template <int R, int V, class T>
[[gnu::always_inline]] inline void store_sums(T (&sums)[R * kTileRows][V * kBlock]) {
  each<R, V>(EACH { store_tile<2 * r + v>(&sums[r * kTileRows][v * kBlock], V * kTileBytes); });
}

struct ByteTiles : ByteProduct {
  using Lane = int32_t;
  template <int d, int a, int b> static void add() { dot_unsigned<d, a, b>(); }
};
struct PairTiles : PairProduct {
  using Lane = float;
  template <int d, int a, int b> static void add() { dot_bf16<d, a, b>(); }
};

template <class Product>
struct PlainTiles {
  static int64_t depth(const Weight&) { return kTileBytes; }

  template <int R, int V>
  static void tile(const Weight& w, const Rows& rows, int64_t row, int64_t count, int64_t block, const Output& out,
                   const Ahead& ahead) {
    const int64_t steps = (w.k + Product::kInputs - 1) / Product::kInputs, whole = steps / kTileRows * kTileRows;
    const uint8_t* data = static_cast<const uint8_t*>(w.data) + block * steps * 64;
    const uint8_t* x = static_cast<const uint8_t*>(rows.data) + row * rows.stride;
    zero_sums<R, V>();
    for (int64_t step = 0; step < whole; step += kTileRows) {
      for (int64_t line = step; line < step + kTileRows; ++line)
        for (int v = 0; v < V; ++v) __builtin_prefetch(data + ahead.data + v * steps * 64 + line * ahead.step);
      add_tiles<Product, R, V>(x + step * 4, rows.stride, data + step * 64, steps * 64);
    }
    if (whole < steps) {  // the last tile of a block is filled with zeros, which meet whatever fills the rows
      alignas(64) uint8_t rest[V][kTileRows * kTileBytes] = {};
      for (int v = 0; v < V; ++v) std::memcpy(rest[v], data + (v * steps + whole) * 64, size_t(steps - whole) * 64);
      add_tiles<Product, R, V>(x + whole * 4, rows.stride, rest[0], sizeof rest[0]);
    }
    alignas(64) typename Product::Lane sums[R * kTileRows][V * kBlock];
    store_sums<R, V>(sums);
    for (int64_t t = 0; t < count; ++t) {
      Floats results[1][V];
      times<V>([&](auto v) __attribute__((always_inline)) {
        results[0][v] = Product::finish(load(&sums[t][v * kBlock]) + Product::start(w, block + v), w, rows, row + t,
                                        block + v);
      });
      put<1, V>(results, w, row + t, block, out);
    }
  }
};

struct NibbleTiles {
  template <int d, int a, int b> static void add() { dot_signed<d, a, b>(); }
};

// The same sums as `Grouped`: exact within a group, in fp32 over the groups in ascending order.
template <bool affine>
struct GroupedTiles {
  static int64_t depth(const Weight& w) { return w.group % 64 ? 32 : 64; }

  template <int R, int V>
  static void tile(const Weight& w, const Rows& rows, int64_t row, int64_t count, int64_t block, const Output& out,
                   const Ahead& ahead) {
    const int64_t groups = w.k / w.group, apart = w.k / 8 * 64, deep = depth(w);
    const uint8_t* data = static_cast<const uint8_t*>(w.data) + block * apart;
    const uint8_t* x = static_cast<const uint8_t*>(rows.data) + row * rows.stride;
    const int32_t* row_sums = rows.sums + row * groups;
    alignas(64) uint8_t codes[V][kTileRows * kTileBytes];
    alignas(64) int32_t sums[R * kTileRows][V * kBlock];
    alignas(64) float totals[R * kTileRows][V * kBlock] = {};
    for (int64_t g = 0; g < groups; ++g) {
      zero_sums<R, V>();
      for (int64_t i = g * w.group; i < (g + 1) * w.group; i += deep) {
        for (int64_t line = 0; line < deep / 8; ++line)
          for (int v = 0; v < V; ++v) {
            const int64_t at = v * apart + (i / 8 + line) * 64;
            __builtin_prefetch(data + ahead.data + v * apart + (i / 8 + line) * ahead.step);
            const Bytes both = load_bytes(data + at);
            _mm512_store_si512(codes[v] + 2 * line * kTileBytes, low_nibbles(both));
            _mm512_store_si512(codes[v] + (2 * line + 1) * kTileBytes, high_nibbles(both));
          }
        add_tiles<NibbleTiles, R, V>(x + i, rows.stride, codes[0], sizeof codes[0]);
      }
      store_sums<R, V>(sums);
      for (int v = 0; v < V; ++v) {
        const int64_t at = ((block + v) * groups + g) * kBlock;
        __builtin_prefetch(reinterpret_cast<const uint8_t*>(w.scales + at) + ahead.scales);
        const Floats scale = load_half(w.scales + at);
        for (int64_t t = 0; t < count; ++t) {
          const int32_t row_sum = row_sums[t * groups + g];
          float* total = &totals[t][v * kBlock];
          Floats sum = fma(to_floats(load(&sums[t][v * kBlock]) + ints(affine ? 0 : row_sum)), scale, load(total));
          if constexpr (affine) sum = fma(load(w.offsets + at), floats(-0.125f * float(row_sum)), sum);
          store(total, sum);
        }
      }
    }
    for (int64_t t = 0; t < count; ++t) {
      Floats results[1][V];
      for (int v = 0; v < V; ++v) results[0][v] = load(&totals[t][v * kBlock]) * floats(rows.scales[row + t]);
      put<1, V>(results, w, row + t, block, out);
    }
  }
};

// Rows two times 16 at once, the last 32 or 16 as many as there are.
template <class Kind, int V>
inline void every_tile(const Weight& w, const Rows& rows, int64_t block, int64_t& shaped, const Output& out) {
  const int64_t passes = (rows.count + 2 * kTileRows - 1) / (2 * kTileRows);
  for (int64_t row = 0; row < rows.count; row += 2 * kTileRows) {
    const int64_t left = rows.count - row, count = left < 2 * kTileRows ? left : 2 * kTileRows;
    const Ahead ahead(w, V, row / (2 * kTileRows), passes);
    const bool pair = count > kTileRows;
    if (std::exchange(shaped, count) != count) {
      if (pair)
        shape_tiles<2>(count - kTileRows, Kind::depth(w));
      else
        shape_tiles<1>(count, Kind::depth(w));
    }
    if (!pair)
      Kind::template tile<1, V>(w, rows, row, count, block, out, ahead);
    else if constexpr (V <= 2)
      Kind::template tile<2, V>(w, rows, row, count, block, out, ahead);
  }
}

template <class Kind>
inline void multiply_tiled(const Weight& w, const Rows& rows, int64_t first, int64_t last, const Output& out) {
  int64_t block = first, shaped = 0;  // the rows that the tiles are shaped for
  if (rows.count <= kTileRows)
    for (; last - block >= 4; block += 4) every_tile<Kind, 4>(w, rows, block, shaped, out);
  for (; last - block >= 2; block += 2) every_tile<Kind, 2>(w, rows, block, shaped, out);
  if (block < last) every_tile<Kind, 1>(w, rows, block, shaped, out);
  release_tiles();
}

inline void linear_tiled(const Weight& w, const Rows& rows, int64_t first, int64_t last, const Output& out) {
  if (rows.count == 0 || first >= last) return;
  if (w.format == Format::bf16) return multiply_tiled<PlainTiles<PairTiles>>(w, rows, first, last, out);
  if (rows.count >= kTiledRows) {
    if (w.format == Format::int8) return multiply_tiled<PlainTiles<ByteTiles>>(w, rows, first, last, out);
    if (w.format == Format::int4 && w.group % 32 == 0)
      return w.offsets ? multiply_tiled<GroupedTiles<true>>(w, rows, first, last, out)
                       : multiply_tiled<GroupedTiles<false>>(w, rows, first, last, out);
  }
  avx512::table.linear(w, rows, first, last, out);
}

inline void swiglu_tiled(const Weight& w1, const Weight& w3, const Rows& rows, int64_t first, int64_t last,
                         const Output& out) {
  swiglu_of<linear_tiled, 2 * kTileRows>(w1, w3, rows, first, last, out);
}

// What one thread can multiply at most, as `multiply_all` in limits.inl says it of vectors.
template <class Product>
inline double multiply_tile_rounds(int64_t rounds) {
  alignas(64) uint8_t some[2 * kTileRows * kTileBytes] = {};
  shape_tiles<2>(kTileRows, kTileBytes);
  zero_sums<2, 2>();
  add_tiles<Product, 2, 2>(some, kTileBytes, some, kTileRows * kTileBytes);
  for (int64_t i = 0; i < rounds; ++i) each<2, 2>(EACH { Product::template add<2 * r + v, 4 + r, 6 + v>(); });
  release_tiles();
  return 2.0 * 4 * kTileRows * kBlock * 16 * Product::kInputs * double(rounds);
}

inline double multiply_tiles(Format format, int64_t rounds) {
  if (format == Format::f32) return avx512::table.multiply(format, rounds);
  if (format == Format::bf16) return multiply_tile_rounds<PairTiles>(rounds);
  return multiply_tile_rounds<ByteTiles>(rounds);
}

inline Kernels tiled_table(const char* name) {
  Kernels made = avx512::table;
  made.isa = name, made.linear = linear_tiled, made.swiglu = swiglu_tiled, made.multiply = multiply_tiles;
  return made;
}
