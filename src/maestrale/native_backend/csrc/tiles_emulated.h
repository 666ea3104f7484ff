// What tiles_amx.h does, in plain C++, so that the same kernels are tested on a processor without AMX: the operations as
// the Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, gives them for LDTILECFG, TILELOADD,
// TILESTORED, TDPBUSD, TDPBSUD and TDPBF16PS. What would be a fault there ends the program here.
// Included by kernels_amx_emulated.cpp alone, inside its namespace.

struct TileFile {
  TileConfig config;
  uint8_t data[8][kTileRows][kTileBytes];
};
inline thread_local TileFile tile_file;

inline void demand_tile(bool holds) {
  if (!holds) std::abort();
}

inline void set_tiles(const TileConfig& config) {
  demand_tile(config.palette == 1 && config.start_row == 0);
  for (uint8_t byte : config.reserved) demand_tile(byte == 0);
  for (int t = 0; t < 16; ++t) {
    demand_tile(config.rows[t] <= kTileRows && config.bytes[t] <= kTileBytes);
    demand_tile((config.rows[t] == 0) == (config.bytes[t] == 0) && (t < 8 || config.rows[t] == 0));
  }
  tile_file = TileFile{config, {}};
}
inline void release_tiles() { tile_file = TileFile{}; }

template <int t> inline void zero_tile() {
  demand_tile(tile_file.config.rows[t] > 0);
  std::memset(tile_file.data[t], 0, sizeof tile_file.data[t]);
}
template <int t> inline void load_tile(const void* p, int64_t stride) {
  zero_tile<t>();
  for (int64_t row = 0; row < tile_file.config.rows[t]; ++row)
    std::memcpy(tile_file.data[t][row], static_cast<const uint8_t*>(p) + row * stride, tile_file.config.bytes[t]);
}
template <int t> inline void store_tile(void* p, int64_t stride) {
  demand_tile(tile_file.config.rows[t] > 0);
  for (int64_t row = 0; row < tile_file.config.rows[t]; ++row)
    std::memcpy(static_cast<uint8_t*>(p) + row * stride, tile_file.data[t][row], tile_file.config.bytes[t]);
}

// The rows, the columns of 4 bytes, and the depth of 4 bytes that a product of three tiles has.
struct TileShape {
  int64_t rows, columns, depth;
};
template <int d, int a, int b> inline TileShape tile_shape() {
  static_assert(d != a && a != b && d != b);
  const TileConfig& c = tile_file.config;
  demand_tile(c.rows[d] > 0 && c.bytes[d] % 4 == 0 && c.bytes[a] % 4 == 0 && c.bytes[b] % 4 == 0);
  demand_tile(c.bytes[d] == c.bytes[b] && c.rows[d] == c.rows[a] && c.bytes[a] / 4 == c.rows[b]);
  return {c.rows[d], c.bytes[d] / 4, c.bytes[a] / 4};
}

template <int d, int a, int b, class A, class B> inline void dot_tile_bytes() {
  const auto [rows, columns, depth] = tile_shape<d, a, b>();
  for (int64_t m = 0; m < rows; ++m) {
    int32_t sums[kTileRows];
    std::memcpy(sums, tile_file.data[d][m], sizeof sums);
    for (int64_t k = 0; k < depth; ++k)
      for (int64_t n = 0; n < columns; ++n)
        for (int j = 0; j < 4; ++j)
          sums[n] += int32_t(A(tile_file.data[a][m][4 * k + j])) * B(tile_file.data[b][k][4 * n + j]);
    std::memcpy(tile_file.data[d][m], sums, sizeof sums);
  }
}
template <int d, int a, int b> inline void dot_unsigned() { dot_tile_bytes<d, a, b, uint8_t, int8_t>(); }
template <int d, int a, int b> inline void dot_signed() { dot_tile_bytes<d, a, b, int8_t, uint8_t>(); }

// Numbers without a leading one count as zero, coming and going.
inline float flushed(float x) { return std::fabs(x) < FLT_MIN ? std::copysign(0.0f, x) : x; }
inline float tile_bf16(const uint8_t* p) {
  uint32_t bits = uint32_t(p[0]) << 16 | uint32_t(p[1]) << 24;
  float x;
  std::memcpy(&x, &bits, 4);
  return flushed(x);
}

// The even and the odd inputs of the tile are summed apart, each by fused multiply-adds; then both are joined and added.
template <int d, int a, int b> inline void dot_bf16() {
  const auto [rows, columns, depth] = tile_shape<d, a, b>();
  for (int64_t m = 0; m < rows; ++m) {
    float sums[kTileRows], parts[kTileRows][2] = {};
    std::memcpy(sums, tile_file.data[d][m], sizeof sums);
    for (int64_t k = 0; k < depth; ++k)
      for (int64_t n = 0; n < columns; ++n)
        for (int j = 0; j < 2; ++j)
          parts[n][j] = flushed(std::fma(tile_bf16(tile_file.data[a][m] + 4 * k + 2 * j),
                                         tile_bf16(tile_file.data[b][k] + 4 * n + 2 * j), parts[n][j]));
    for (int64_t n = 0; n < columns; ++n) sums[n] = flushed(flushed(sums[n]) + flushed(parts[n][0] + parts[n][1]));
    std::memcpy(tile_file.data[d][m], sums, sizeof sums);
  }
}
