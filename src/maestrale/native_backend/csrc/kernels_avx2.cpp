// x86-64 from 2013 on.
#if defined(__x86_64__)
#define SET avx2
#define SIMD "simd_avx2.h"
#define TARGET "avx2,fma,f16c"
#include "kernels_set.inl"
#endif
