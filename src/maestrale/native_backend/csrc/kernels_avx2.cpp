// x86-64 from 2013 on.
#include <cfloat>
#include <cmath>
#include <cstring>
#include <utility>

#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

namespace maestrale::avx2 {
#include "simd_avx2.h"
#include "math.inl"
#include "prepare.inl"
#include "linear.inl"
#include "limits.inl"
#include "rows.inl"
#include "attention.inl"
#include "rounding.inl"

extern const Kernels table;
const Kernels table = {"avx2", prepare, linear, swiglu, read_all, multiply_all,
                       norm, scores, mix, write_keys, attend, round_block};
}  // namespace maestrale::avx2

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
