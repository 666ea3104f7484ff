// x86-64 with AVX-512, VNNI and BF16 (Cooper Lake, Sapphire Rapids, Zen 4 and later).
#if defined(__x86_64__)
#define SET avx512
#define SIMD "simd_avx512.h"
#define TARGET "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16"
#include "kernels_set.inl"
#endif
