// x86-64 with AVX-512, VNNI and BF16 (Cooper Lake, Sapphire Rapids, Zen 4 and later).
#include <cfloat>
#include <cmath>
#include <cstring>
#include <utility>

#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")
#endif

namespace maestrale::avx512 {
#include "simd_avx512.h"
#include "math.inl"
#include "prepare.inl"
#include "linear.inl"
#include "limits.inl"
#include "rows.inl"
#include "attention.inl"
#include "rounding.inl"

extern const Kernels table;
const Kernels table = {"avx512", prepare, linear, swiglu, read_all, multiply_all,
                       norm, scores, mix, write_keys, attend, round_block};
}  // namespace maestrale::avx512

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
