// What AVX-512 with VNNI and BF16 can do, in 16 lanes. Included by kernels_avx512.cpp alone, inside its namespace.

constexpr bool kUnsignedRows = true;  // the row's bytes are q + 128, because vpdpbusd's first operand has no sign
constexpr int kTileRows = 6;          // rows and blocks of a tile of many rows: 24 registers of sums
constexpr int kTileBlocks = 4;

struct Floats { __m512 v; };
struct Ints { __m512i v; };
struct Bytes { __m512i v; };  // 16 lanes of 4 bytes
struct Pairs { __m512i v; };  // 16 lanes of 2 bf16

inline Floats floats(float x) { return {_mm512_set1_ps(x)}; }
inline Floats load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, Floats a) { _mm512_storeu_ps(p, a.v); }
inline Floats load_first(const float* p, int64_t n) { return {_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p)}; }
inline void store_first(float* p, Floats a, int64_t n) { _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), a.v); }
inline Floats operator+(Floats a, Floats b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Floats operator-(Floats a, Floats b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Floats operator*(Floats a, Floats b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Floats operator/(Floats a, Floats b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Floats fma(Floats a, Floats b, Floats c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Floats larger(Floats a, Floats b) { return {_mm512_max_ps(a.v, b.v)}; }   // b where either is NaN
inline Floats smaller(Floats a, Floats b) { return {_mm512_min_ps(a.v, b.v)}; }  // b where either is NaN
inline Floats if_less(Floats a, Floats b, Floats yes, Floats no) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), no.v, yes.v)};
}

inline Ints ints(int32_t x) { return {_mm512_set1_epi32(x)}; }
inline Ints load(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
inline Ints operator+(Ints a, Ints b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline Ints operator-(Ints a, Ints b) { return {_mm512_sub_epi32(a.v, b.v)}; }
inline Ints operator&(Ints a, Ints b) { return {_mm512_and_si512(a.v, b.v)}; }
inline Ints larger(Ints a, Ints b) { return {_mm512_max_epi32(a.v, b.v)}; }
template <int N> inline Ints left(Ints a) { return {_mm512_slli_epi32(a.v, N)}; }
template <int N> inline Ints right(Ints a) { return {_mm512_srai_epi32(a.v, N)}; }  // keeps the sign
inline Floats to_floats(Ints a) { return {_mm512_cvtepi32_ps(a.v)}; }
inline Ints to_ints(Floats a) { return {_mm512_cvtps_epi32(a.v)}; }  // to nearest, ties to even
inline Floats bits_to_floats(Ints a) { return {_mm512_castsi512_ps(a.v)}; }
inline Ints floats_to_bits(Floats a) { return {_mm512_castps_si512(a.v)}; }
inline void store_bytes(uint8_t* p, Ints a) {  // the lowest byte of each lane
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a.v));
}
inline Floats load_half(const uint16_t* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline Floats load_bf16(const uint16_t* p) {
  return {_mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16))};
}
inline void store_words(uint16_t* p, Ints a) {  // the lower half of each lane
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(a.v));
}

inline Bytes load_bytes(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
inline Bytes low_nibbles(Bytes a) { return {_mm512_and_si512(a.v, _mm512_set1_epi8(15))}; }
inline Bytes high_nibbles(Bytes a) { return {_mm512_and_si512(_mm512_srli_epi16(a.v, 4), _mm512_set1_epi8(15))}; }
inline Pairs load_pairs(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }

// s + the four products of each lane: signed weights with the row's four bytes in the form that `prepare` wrote.
inline Ints dot_bytes(Ints s, Bytes w, uint32_t x) { return {_mm512_dpbusd_epi32(s.v, _mm512_set1_epi32(int(x)), w.v)}; }
// s + the four products of each lane: nibbles (0 to 15) with the row's four signed bytes.
inline Ints dot_nibbles(Ints s, Bytes w, uint32_t x) {
  return {_mm512_dpbusd_epi32(s.v, w.v, _mm512_set1_epi32(int(x)))};
}
// s + the two products of each lane.
inline Floats dot_pairs(Floats s, Pairs w, uint32_t x) {
  return {_mm512_dpbf16_ps(s.v, reinterpret_cast<__m512bh>(w.v), reinterpret_cast<__m512bh>(_mm512_set1_epi32(int(x))))};
}
