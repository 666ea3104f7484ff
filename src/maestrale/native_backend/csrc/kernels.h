// The kernels of one instruction set as a table of functions, and the choice among the tables at run time.
//
// Each set is compiled in a file of its own, kernels_SET.cpp, which names simd_SET.h (what the set's registers can do)
// and includes kernels_set.inl: the .inl files, which say each kernel once in those terms, and the table.
#pragma once

#include <string>
#include <vector>

#include "attention.h"
#include "linear.h"
#include "rounding.h"

namespace maestrale {

// Rows and blocks of 16 outputs whose sums stay in registers together.
struct Tile {
  int rows, blocks;
};

struct Kernels {
  const char* isa;

  // Fills rows t of [first, last) from x[t * stride + i].
  void (*prepare)(const float* x, int64_t stride, int64_t first, int64_t last, const Rows& rows);

  // rows times blocks [first, last) of w.
  void (*linear)(const Weight& w, const Rows& rows, int64_t first, int64_t last, const Output& out);

  // silu(rows times w1) * (rows times w3), the same bits as in three steps; w1 and w3 have one shape and format.
  void (*swiglu)(const Weight& w1, const Weight& w3, const Rows& rows, int64_t first, int64_t last,
                 const Output& out);

  // Limits, for benchmarks: reads memory; multiplies in registers and returns how many operations that were.
  void (*read)(const uint8_t* p, int64_t size);
  double (*multiply)(Format format, int64_t rounds);

  // y = x / sqrt(mean(x²) + eps) * weight, n entries (N3).
  void (*norm)(const float* x, const float* weight, int64_t n, float eps, float* y);

  // y[e] = the product of x and row e of gate [experts][n].
  void (*scores)(const float* gate, int64_t experts, const float* x, int64_t n, float* y);

  // x += the sum over k of weights[k] * rows[k], in the order of k.
  void (*mix)(float* x, const float* const* rows, const float* weights, int64_t count, int64_t n);

  WriteKeys write_keys;
  AttendSpan attend;
  RoundBlock round_block;
};

// The tables that this processor can run, the fastest first; `generic` is the last of those for use.
const std::vector<const Kernels*>& kernels();

// The table of that name; null where the processor (or the build) has none.
const Kernels* find_kernels(const std::string& isa);

}  // namespace maestrale
