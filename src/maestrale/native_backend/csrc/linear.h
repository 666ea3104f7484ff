// Linear layers on packed weights: y[t, o] = sum over i of x[t, i] * w[o, i].
//
// The bits of y[t, o] depend on row t of x and row o of w alone: not on how many rows come together, nor on which
// blocks a thread is given. Every path of one instruction set (few rows, many rows) adds in the same order.
//
// A step prepares its rows once (`Kernels::prepare`), then every thread calls `Kernels::linear` for its own range of
// blocks; both are pure functions of one thread.
#pragma once

#include <cstdint>

namespace maestrale {

enum class Format : int { f32 = 0, bf16 = 1, int8 = 2, int4 = 3 };

constexpr int64_t kBlock = 16;  // outputs that lie together; a weight's rows are padded with zeros to a multiple

// A weight [n, k] packed in blocks of 16 outputs; the layout is defined, in numpy, by checkpoint/packed.py:
//   f32   float    [n/16][k][16]
//   bf16  uint16   [n/16][k/2][16][2]            k padded to a multiple of 2 with zeros
//   int8  int8     [n/16][k/4][16][4]            k padded to a multiple of 4; w = q * scales[o]; sums[o] = sum of q
//   int4  uint8    [n/16][k/8][16][4]            low nibbles k..k+3, high nibbles k+4..k+7; k a multiple of group
//         scales   float16 [n/16][k/group][16];  w = (q - 8) * scale, or with offsets float [same], q * scale + offset
struct Weight {
  Format format;
  int64_t n, k;
  int64_t group;           // int4: inputs that share a scale (a multiple of 8)
  const void* data;
  const float* row_scales;   // int8, [n padded]
  const int32_t* sums;       // int8, [n padded]
  const uint16_t* scales;    // int4, float16 bits
  const float* offsets;      // int4, affine only; else null
};

// Whether both take rows of one form.
inline bool alike(const Weight& a, const Weight& b) { return a.format == b.format && a.group == b.group; }

// Rows of activations in the form that a weight's format multiplies with: `prepare` makes them from fp32.
//   f32: x as it is. bf16: rounded to nearest even. int8, int4: q = round(x * 127 / max|x|) for each row, with the
//   scale max|x| / 127; for int4 also -8 times the sum of q over each `group` inputs.
struct Rows {
  Format format;
  int64_t count, k;
  int64_t group;           // int4
  int64_t stride;          // bytes from one row of `data` to the next: row_bytes(format, k)
  void* data;              // [count][stride], begins at a multiple of 64
  float* scales;           // [count], int8 and int4
  int32_t* sums;           // [count][k/group], int4: what a code's middle, 8, brings in too much
};

// The bytes that a row of k activations takes: a multiple of 64, zeros behind the last.
inline int64_t row_bytes(Format format, int64_t k) {
  const int64_t bytes = format == Format::f32 ? 4 * k : format == Format::bf16 ? 2 * k : k;
  return (bytes + 63) / 64 * 64;
}

// The bytes of a block's `data`.
inline int64_t block_bytes(const Weight& w) {
  const int64_t inputs = w.format == Format::f32 ? 1 : w.format == Format::bf16 ? 2 : w.format == Format::int8 ? 4 : 8;
  return (w.k + inputs - 1) / inputs * 64;
}

inline int64_t blocks_of(const Weight& w) { return (w.n + kBlock - 1) / kBlock; }

// Where a product goes: y[t * stride + o] = or, of a linear layer, += the sum, for the outputs o < n of the blocks asked
// for.
struct Output {
  float* y;
  int64_t stride;
  bool add = false;
};

}  // namespace maestrale
