// From values to int8 or int4: what checkpoint/rounding.py does by rounding to nearest, written into packed blocks.
#pragma once

#include <cstdint>

#include "linear.h"

namespace maestrale {

enum class Stored { f32, bf16, f16 };  // how values lie in a file

// A weight [n, k] as it is stored, row after row.
struct StoredRows {
  int64_t n, k;
  Stored dtype;
  const void* data;
};

// Where codes and scales go: the parts of a `Weight` of that format.
struct Rounded {
  Format format;        // int8 or int4, symmetric
  int64_t group;        // int4
  uint8_t* data;
  float* row_scales;    // int8
  int32_t* sums;        // int8
  uint16_t* scales;     // int4
};

// Rounds the 16 rows of a block; false where one holds NaN or Inf, or needs a scale beyond float16.
using RoundBlock = bool (*)(const StoredRows& rows, int64_t block, const Rounded& to);

}  // namespace maestrale
