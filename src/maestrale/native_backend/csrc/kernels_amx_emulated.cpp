// The same kernels on tiles in plain C++, for tests on processors without AMX.
#if defined(__x86_64__)
#pragma GCC optimize("O1")  // it need not be fast, and -O3 takes 14 s longer to compile it
#define SET amx_emulated
#define NAME "amx-emulated"
#define SIMD "simd_avx512.h"
#define TARGET "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16"
#define TILES "tiles_emulated.h"
#include "kernels_set.inl"
#endif
