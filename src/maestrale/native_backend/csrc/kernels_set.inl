// The table of one instruction set. kernels_SET.cpp says what differs and includes this once:
//   SET     the namespace, and the table's name but where NAME gives it
//   SIMD    the file that says what the set's registers can do
//   TARGET  what the compiler may use; without it, what every processor of this kind has
//   TILES   the file that says what the set's tile registers can do, if it has any; the rest is then AVX-512's
// Standard headers come before the target: an inline function of theirs, compiled for a set, could be the copy that the
// linker keeps for everyone.
#include <cfloat>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define QUOTED(...) #__VA_ARGS__
#define TEXT(...) QUOTED(__VA_ARGS__)
#ifndef NAME
#define NAME TEXT(SET)
#endif

#ifdef TARGET
#if defined(__clang__)
_Pragma(TEXT(clang attribute push(__attribute__((target(TARGET))), apply_to = function)))
#else
_Pragma("GCC push_options")
_Pragma(TEXT(GCC target(TARGET)))
#endif
#endif

#ifdef TILES
#include "tiles.h"

namespace maestrale::avx512 {
extern const Kernels table;
}
#endif

namespace maestrale::SET {
#include SIMD
#include "math.inl"
#include "linear.inl"

extern const Kernels table;
#ifdef TILES
#include TILES
#include "tiled.inl"
const Kernels table = tiled_table(NAME);
#else
#include "limits.inl"
#include "prepare.inl"
#include "rows.inl"
#include "attention.inl"
#include "rounding.inl"
const Kernels table = {NAME, prepare, linear, swiglu, read_all, multiply_all,
                       norm, scores, mix, write_keys, attend, round_block};
#endif
}  // namespace maestrale::SET

#ifdef TARGET
#if defined(__clang__)
_Pragma("clang attribute pop")
#else
_Pragma("GCC pop_options")
#endif
#endif
