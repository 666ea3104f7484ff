// x86-64 with AMX's tiles for bytes and bf16 beside AVX-512 (Sapphire Rapids and later), where the system lends them.
#if defined(__x86_64__) && defined(__linux__)
#define SET amx
#define SIMD "simd_avx512.h"
#define TARGET "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16"
#define TILES "tiles_amx.h"
#include "kernels_set.inl"
#endif
