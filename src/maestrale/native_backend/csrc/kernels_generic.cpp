// Any processor: plain C++ that the compiler may vectorize for its baseline.
#define SET generic
#define SIMD "simd_generic.h"
#include "kernels_set.inl"
