// What NEON with dot products can do, in 16 lanes of four registers. Included by kernels_neon.cpp alone.

constexpr bool kUnsignedRows = false;
constexpr Tile kPlainTile = {4, 1};
constexpr Tile kGroupedTile = {2, 1};
constexpr int kStreams = 2;
constexpr int kAcross = 4;

struct Floats { float32x4_t v[4]; };
struct Ints { int32x4_t v[4]; };
struct Bytes { int8x16_t v[4]; };
struct Pairs { uint32x4_t v[4]; };
using Four = uint32x4_t;

template <class Result, class Function> inline Result quarters(Function function) {
  return {{function(0), function(1), function(2), function(3)}};
}

inline Floats floats(float x) { return quarters<Floats>([=](int) { return vdupq_n_f32(x); }); }
inline Floats load(const float* p) { return quarters<Floats>([=](int i) { return vld1q_f32(p + 4 * i); }); }
inline void store(float* p, Floats a) { for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, a.v[i]); }
inline Floats load_first(const float* p, int64_t n) {
  float all[16] = {};
  std::memcpy(all, p, size_t(n) * 4);
  return load(all);
}
inline void store_first(float* p, Floats a, int64_t n) {
  float all[16];
  store(all, a);
  std::memcpy(p, all, size_t(n) * 4);
}
inline Floats operator+(Floats a, Floats b) {
  return quarters<Floats>([&](int i) { return vaddq_f32(a.v[i], b.v[i]); });
}
inline Floats operator-(Floats a, Floats b) {
  return quarters<Floats>([&](int i) { return vsubq_f32(a.v[i], b.v[i]); });
}
inline Floats operator*(Floats a, Floats b) {
  return quarters<Floats>([&](int i) { return vmulq_f32(a.v[i], b.v[i]); });
}
inline Floats operator/(Floats a, Floats b) {
  return quarters<Floats>([&](int i) { return vdivq_f32(a.v[i], b.v[i]); });
}
inline Floats fma(Floats a, Floats b, Floats c) {
  return quarters<Floats>([&](int i) { return vfmaq_f32(c.v[i], a.v[i], b.v[i]); });
}
inline Floats if_less(Floats a, Floats b, Floats yes, Floats no) {
  return quarters<Floats>([&](int i) { return vbslq_f32(vcltq_f32(a.v[i], b.v[i]), yes.v[i], no.v[i]); });
}
inline Floats larger(Floats a, Floats b) { return if_less(b, a, a, b); }   // b where either is NaN
inline Floats smaller(Floats a, Floats b) { return if_less(a, b, a, b); }  // b where either is NaN

inline Ints ints(int32_t x) { return quarters<Ints>([=](int) { return vdupq_n_s32(x); }); }
inline Ints load(const int32_t* p) { return quarters<Ints>([=](int i) { return vld1q_s32(p + 4 * i); }); }
inline Ints operator+(Ints a, Ints b) { return quarters<Ints>([&](int i) { return vaddq_s32(a.v[i], b.v[i]); }); }
inline Ints operator-(Ints a, Ints b) { return quarters<Ints>([&](int i) { return vsubq_s32(a.v[i], b.v[i]); }); }
inline Ints operator&(Ints a, Ints b) { return quarters<Ints>([&](int i) { return vandq_s32(a.v[i], b.v[i]); }); }
inline Ints larger(Ints a, Ints b) { return quarters<Ints>([&](int i) { return vmaxq_s32(a.v[i], b.v[i]); }); }
template <int N> inline Ints left(Ints a) { return quarters<Ints>([&](int i) { return vshlq_n_s32(a.v[i], N); }); }
template <int N> inline Ints right(Ints a) { return quarters<Ints>([&](int i) { return vshrq_n_s32(a.v[i], N); }); }
inline Floats to_floats(Ints a) { return quarters<Floats>([&](int i) { return vcvtq_f32_s32(a.v[i]); }); }
inline Ints to_ints(Floats a) { return quarters<Ints>([&](int i) { return vcvtnq_s32_f32(a.v[i]); }); }
inline Floats bits_to_floats(Ints a) { return quarters<Floats>([&](int i) { return vreinterpretq_f32_s32(a.v[i]); }); }
inline Ints floats_to_bits(Floats a) { return quarters<Ints>([&](int i) { return vreinterpretq_s32_f32(a.v[i]); }); }
inline void store_words(uint16_t* p, Ints a) {
  for (int i = 0; i < 4; ++i) vst1_u16(p + 4 * i, vmovn_u32(vreinterpretq_u32_s32(a.v[i])));
}
inline void store_bytes(uint8_t* p, Ints a) {
  uint16_t low[16];
  store_words(low, a);
  vst1_u8(p, vmovn_u16(vld1q_u16(low)));
  vst1_u8(p + 8, vmovn_u16(vld1q_u16(low + 8)));
}
inline Floats load_half(const uint16_t* p) {
  return quarters<Floats>([=](int i) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * i))); });
}
inline Floats load_bf16(const uint16_t* p) {
  return quarters<Floats>(
      [=](int i) { return vreinterpretq_f32_u32(vshlq_n_u32(vmovl_u16(vld1_u16(p + 4 * i)), 16)); });
}

inline Bytes load_bytes(const uint8_t* p) {
  return quarters<Bytes>([=](int i) { return vreinterpretq_s8_u8(vld1q_u8(p + 16 * i)); });
}
inline Bytes low_nibbles(Bytes a) {
  return quarters<Bytes>([&](int i) { return vandq_s8(a.v[i], vdupq_n_s8(15)); });
}
inline Bytes high_nibbles(Bytes a) {
  return quarters<Bytes>([&](int i) { return vreinterpretq_s8_u8(vshrq_n_u8(vreinterpretq_u8_s8(a.v[i]), 4)); });
}
inline Pairs load_pairs(const uint8_t* p) {
  return quarters<Pairs>([=](int i) { return vreinterpretq_u32_u8(vld1q_u8(p + 16 * i)); });
}

inline Four spread(const uint8_t* p) { return vld1q_dup_u32(reinterpret_cast<const uint32_t*>(p)); }
inline Ints dot_bytes(Ints s, Bytes w, Four x) {
  const int8x16_t row = vreinterpretq_s8_u32(x);
  return quarters<Ints>([&](int i) { return vdotq_s32(s.v[i], w.v[i], row); });
}
inline Ints dot_nibbles(Ints s, Bytes w, Four x) { return dot_bytes(s, w, x); }
inline Floats dot_pairs(Floats s, Pairs w, Four x) {
  const auto high = vdupq_n_u32(0xffff0000);
  const float32x4_t even = vreinterpretq_f32_u32(vshlq_n_u32(x, 16));
  const float32x4_t odd = vreinterpretq_f32_u32(vandq_u32(x, high));
  s = quarters<Floats>([&](int i) { return vfmaq_f32(s.v[i], vreinterpretq_f32_u32(vshlq_n_u32(w.v[i], 16)), even); });
  return quarters<Floats>(
      [&](int i) { return vfmaq_f32(s.v[i], vreinterpretq_f32_u32(vandq_u32(w.v[i], high)), odd); });
}
inline Floats dot_floats(Floats s, Floats w, Four x) {
  return quarters<Floats>([&](int i) { return vfmaq_f32(s.v[i], w.v[i], vreinterpretq_f32_u32(x)); });
}
