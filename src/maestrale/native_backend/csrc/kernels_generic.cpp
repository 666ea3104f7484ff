// Any processor: plain C++ that the compiler may vectorize for its baseline.
#include <cfloat>
#include <cmath>
#include <cstring>
#include <utility>

#include "kernels.h"

namespace maestrale::generic {
#include "simd_generic.h"
#include "math.inl"
#include "prepare.inl"
#include "linear.inl"
#include "limits.inl"
#include "rows.inl"
#include "attention.inl"
#include "rounding.inl"

extern const Kernels table;
const Kernels table = {"generic", prepare, linear, swiglu, read_all, multiply_all,
                       norm, scores, mix, write_keys, attend, round_block};
}  // namespace maestrale::generic
