// Tile registers: eight of at most 16 rows of 64 bytes, as Intel's AMX has them.
#pragma once

#include <cstdint>

namespace maestrale {

constexpr int64_t kTileRows = 16, kTileBytes = 64;

// What LDTILECFG reads (Intel SDM volume 2, "LDTILECFG"; palette 1).
struct alignas(64) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t bytes[16];  // of a row of each tile
  uint8_t rows[16];
};
static_assert(sizeof(TileConfig) == 64);

// Why `amx` is not among the tables that this processor can run, in a few words; null where it is.
const char* amx_problem();

// The self-test that must succeed first, in a process of its own: whether a product on AMX's tiles has the bits that it
// has in vectors. Null if so; else what went wrong, an end by a signal among it.
const char* amx_self_test();

}  // namespace maestrale
