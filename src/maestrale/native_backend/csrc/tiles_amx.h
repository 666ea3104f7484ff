// AMX's own instructions. Included by kernels_amx.cpp alone, inside its namespace.
//
// Assembly, because GCC 12's intrinsics do not say that they read memory: the stores that fill a configuration were left
// out before `_tile_loadconfig`, and the processor faults.

inline void set_tiles(const TileConfig& config) { asm volatile("ldtilecfg %0" : : "m"(config) : "memory"); }
inline void release_tiles() { asm volatile("tilerelease" : : : "memory"); }

template <int t> inline void zero_tile() { asm volatile("tilezero %%tmm%c0" : : "i"(t)); }
template <int t> inline void load_tile(const void* p, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(stride), "i"(t) : "memory");
}
template <int t> inline void store_tile(void* p, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(stride), "i"(t) : "memory");
}

// Tile d += tile a (rows of activations) times tile b (weights). Bytes: unsigned by signed, then signed by unsigned.
template <int d, int a, int b> inline void dot_unsigned() {
  asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(d), "i"(a), "i"(b));
}
template <int d, int a, int b> inline void dot_signed() {
  asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(d), "i"(a), "i"(b));
}
template <int d, int a, int b> inline void dot_bf16() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(d), "i"(a), "i"(b));
}
