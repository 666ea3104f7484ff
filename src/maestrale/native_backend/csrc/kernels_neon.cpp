// arm64 with dot products (Armv8.2 and later, Apple silicon).
#include <cfloat>
#include <cmath>
#include <cstring>
#include <utility>

#include "kernels.h"

#if defined(__aarch64__)
#include <arm_neon.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("dotprod"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("arch=armv8.2-a+dotprod")
#endif

namespace maestrale::neon {
#include "simd_neon.h"
#include "math.inl"
#include "prepare.inl"
#include "linear.inl"
#include "limits.inl"
#include "rows.inl"
#include "attention.inl"
#include "rounding.inl"

extern const Kernels table;
const Kernels table = {"neon", prepare, linear, swiglu, read_all, multiply_all,
                       norm, scores, mix, write_keys, attend, round_block};
}  // namespace maestrale::neon

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
