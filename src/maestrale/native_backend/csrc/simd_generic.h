// 16 lanes in plain C++, for processors without a set of their own. Included by kernels_generic.cpp alone.

constexpr bool kUnsignedRows = false;
constexpr Tile kPlainTile = {4, 1};
constexpr Tile kGroupedTile = {2, 1};
constexpr int kStreams = 1;
constexpr int kAcross = 1;  // with more the same speed, but a third longer to compile

struct Floats { float v[16]; };
struct Ints { int32_t v[16]; };
struct Bytes { uint8_t v[64]; };
struct Pairs { uint32_t v[16]; };
using Four = uint32_t;

template <class To, class From> inline To bits(From from) {
  To to;
  static_assert(sizeof to == sizeof from);
  std::memcpy(&to, &from, sizeof to);
  return to;
}
template <class Result, class Function> inline Result lanes(Function function) {
  Result r;
  for (int i = 0; i < 16; ++i) r.v[i] = function(i);
  return r;
}

inline Floats floats(float x) { return lanes<Floats>([=](int) { return x; }); }
inline Floats load(const float* p) { return lanes<Floats>([=](int i) { return p[i]; }); }
inline void store(float* p, Floats a) { std::memcpy(p, a.v, sizeof a.v); }
inline Floats load_first(const float* p, int64_t n) {
  return lanes<Floats>([=](int i) { return i < n ? p[i] : 0.0f; });
}
inline void store_first(float* p, Floats a, int64_t n) { std::memcpy(p, a.v, size_t(n) * 4); }
inline Floats operator+(Floats a, Floats b) { return lanes<Floats>([&](int i) { return a.v[i] + b.v[i]; }); }
inline Floats operator-(Floats a, Floats b) { return lanes<Floats>([&](int i) { return a.v[i] - b.v[i]; }); }
inline Floats operator*(Floats a, Floats b) { return lanes<Floats>([&](int i) { return a.v[i] * b.v[i]; }); }
inline Floats operator/(Floats a, Floats b) { return lanes<Floats>([&](int i) { return a.v[i] / b.v[i]; }); }
inline Floats fma(Floats a, Floats b, Floats c) { return a * b + c; }  // rounded twice: no instruction to count on
inline Floats larger(Floats a, Floats b) {
  return lanes<Floats>([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline Floats smaller(Floats a, Floats b) {
  return lanes<Floats>([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
inline Floats if_less(Floats a, Floats b, Floats yes, Floats no) {
  return lanes<Floats>([&](int i) { return a.v[i] < b.v[i] ? yes.v[i] : no.v[i]; });
}

inline Ints ints(int32_t x) { return lanes<Ints>([=](int) { return x; }); }
inline Ints load(const int32_t* p) { return lanes<Ints>([=](int i) { return p[i]; }); }
inline Ints operator+(Ints a, Ints b) {
  return lanes<Ints>([&](int i) { return int32_t(uint32_t(a.v[i]) + uint32_t(b.v[i])); });
}
inline Ints operator-(Ints a, Ints b) {
  return lanes<Ints>([&](int i) { return int32_t(uint32_t(a.v[i]) - uint32_t(b.v[i])); });
}
inline Ints operator&(Ints a, Ints b) { return lanes<Ints>([&](int i) { return a.v[i] & b.v[i]; }); }
inline Ints larger(Ints a, Ints b) { return lanes<Ints>([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; }); }
template <int N> inline Ints left(Ints a) { return lanes<Ints>([&](int i) { return int32_t(uint32_t(a.v[i]) << N); }); }
template <int N> inline Ints right(Ints a) { return lanes<Ints>([&](int i) { return a.v[i] >> N; }); }
inline Floats to_floats(Ints a) { return lanes<Floats>([&](int i) { return float(a.v[i]); }); }
inline Ints to_ints(Floats a) {  // adding 1.5 * 2^23 leaves the nearest integer in the lowest bits; |a| < 2^22
  return lanes<Ints>([&](int i) { return bits<int32_t>(a.v[i] + 12582912.0f) - 0x4b400000; });
}
inline Floats bits_to_floats(Ints a) { return bits<Floats>(a); }
inline Ints floats_to_bits(Floats a) { return bits<Ints>(a); }
inline void store_bytes(uint8_t* p, Ints a) { for (int i = 0; i < 16; ++i) p[i] = uint8_t(a.v[i]); }
inline void store_words(uint16_t* p, Ints a) { for (int i = 0; i < 16; ++i) p[i] = uint16_t(a.v[i]); }
inline Floats load_bf16(const uint16_t* p) {
  return lanes<Floats>([=](int i) { return bits<float>(uint32_t(p[i]) << 16); });
}
inline float half_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, rest = h & 0x7fff;
  if (rest >= 0x7c00) return bits<float>(sign | 0x7f800000 | (rest & 0x3ff) << 13);    // infinite or not a number
  const float size = rest < 0x400 ? float(rest) * 5.9604644775390625e-8f               // 2^-24: no leading one
                                  : bits<float>((rest << 13) + (112u << 23));
  return bits<float>(bits<uint32_t>(size) | sign);
}
inline Floats load_half(const uint16_t* p) { return lanes<Floats>([=](int i) { return half_to_float(p[i]); }); }

inline Bytes load_bytes(const uint8_t* p) { Bytes b; std::memcpy(b.v, p, 64); return b; }
inline Bytes low_nibbles(Bytes a) { for (auto& byte : a.v) byte &= 15; return a; }
inline Bytes high_nibbles(Bytes a) { for (auto& byte : a.v) byte >>= 4; return a; }
inline Pairs load_pairs(const uint8_t* p) { Pairs w; std::memcpy(w.v, p, 64); return w; }

inline Four spread(const uint8_t* p) { Four four; std::memcpy(&four, p, 4); return four; }
inline Ints dot_bytes(Ints s, Bytes w, Four x) {
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 4; ++j) s.v[i] += int8_t(w.v[4 * i + j]) * int8_t(x >> 8 * j);
  return s;
}
inline Ints dot_nibbles(Ints s, Bytes w, Four x) { return dot_bytes(s, w, x); }
inline Floats dot_pairs(Floats s, Pairs w, Four x) {
  for (int i = 0; i < 16; ++i) s.v[i] += bits<float>(w.v[i] << 16) * bits<float>(x << 16);
  for (int i = 0; i < 16; ++i) s.v[i] += bits<float>(w.v[i] & 0xffff0000) * bits<float>(x & 0xffff0000);
  return s;
}
inline Floats dot_floats(Floats s, Floats w, Four x) { return fma(w, floats(bits<float>(x)), s); }
