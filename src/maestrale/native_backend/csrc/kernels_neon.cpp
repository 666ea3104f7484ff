// arm64 with dot products (Armv8.2 and later, Apple silicon).
#if defined(__aarch64__)
#define SET neon
#define SIMD "simd_neon.h"
#if defined(__clang__)
#define TARGET "dotprod"
#else
#define TARGET "arch=armv8.2-a+dotprod"
#endif
#include "kernels_set.inl"
#endif
