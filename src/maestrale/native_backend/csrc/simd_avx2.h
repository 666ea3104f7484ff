// What AVX2 with FMA and F16C can do, in 16 lanes of two registers. Included by kernels_avx2.cpp alone.

constexpr bool kUnsignedRows = false;
constexpr Tile kPlainTile = {4, 1};
constexpr Tile kGroupedTile = {2, 1};
constexpr int kStreams = 2;
constexpr int kAcross = 4;

struct Floats { __m256 a, b; };
struct Ints { __m256i a, b; };
struct Bytes { __m256i a, b; };
struct Pairs { __m256i a, b; };
using Four = __m256i;

inline __m256i words(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline __m256i first_lanes(int64_t n, int lane) {  // all ones in the lanes below n, counted from `lane`
  const __m256i here = _mm256_add_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(lane));
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(int(n)), here);
}

inline Floats floats(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Floats load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, Floats x) { _mm256_storeu_ps(p, x.a); _mm256_storeu_ps(p + 8, x.b); }
inline Floats load_first(const float* p, int64_t n) {
  return {_mm256_maskload_ps(p, first_lanes(n, 0)), _mm256_maskload_ps(p + 8, first_lanes(n, 8))};
}
inline void store_first(float* p, Floats x, int64_t n) {
  _mm256_maskstore_ps(p, first_lanes(n, 0), x.a);
  _mm256_maskstore_ps(p + 8, first_lanes(n, 8), x.b);
}
inline Floats operator+(Floats x, Floats y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline Floats operator-(Floats x, Floats y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline Floats operator*(Floats x, Floats y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline Floats operator/(Floats x, Floats y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline Floats fma(Floats x, Floats y, Floats z) {
  return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
inline Floats larger(Floats x, Floats y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline Floats smaller(Floats x, Floats y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
inline Floats if_less(Floats x, Floats y, Floats yes, Floats no) {
  return {_mm256_blendv_ps(no.a, yes.a, _mm256_cmp_ps(x.a, y.a, _CMP_LT_OQ)),
          _mm256_blendv_ps(no.b, yes.b, _mm256_cmp_ps(x.b, y.b, _CMP_LT_OQ))};
}

inline Ints ints(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline Ints load(const int32_t* p) { return {words(p), words(p + 8)}; }
inline Ints operator+(Ints x, Ints y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
inline Ints operator-(Ints x, Ints y) { return {_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)}; }
inline Ints operator&(Ints x, Ints y) { return {_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)}; }
inline Ints larger(Ints x, Ints y) { return {_mm256_max_epi32(x.a, y.a), _mm256_max_epi32(x.b, y.b)}; }
template <int N> inline Ints left(Ints x) { return {_mm256_slli_epi32(x.a, N), _mm256_slli_epi32(x.b, N)}; }
template <int N> inline Ints right(Ints x) { return {_mm256_srai_epi32(x.a, N), _mm256_srai_epi32(x.b, N)}; }
inline Floats to_floats(Ints x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
inline Ints to_ints(Floats x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
inline Floats bits_to_floats(Ints x) { return {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)}; }
inline Ints floats_to_bits(Floats x) { return {_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)}; }
inline __m256i low_words(Ints x) {  // 16 words of 16 bits: the lower half of each lane
  const Ints low = x & ints(0xffff);
  return _mm256_permute4x64_epi64(_mm256_packus_epi32(low.a, low.b), 0xd8);
}
inline void store_words(uint16_t* p, Ints x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), low_words(x)); }
inline void store_bytes(uint8_t* p, Ints x) {
  const __m256i low = low_words(x & ints(0xff));
  const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
}
inline __m128i half_words(const uint16_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
inline Floats load_half(const uint16_t* p) {
  return {_mm256_cvtph_ps(half_words(p)), _mm256_cvtph_ps(half_words(p + 8))};
}
inline Floats load_bf16(const uint16_t* p) {
  return bits_to_floats(left<16>({_mm256_cvtepu16_epi32(half_words(p)), _mm256_cvtepu16_epi32(half_words(p + 8))}));
}

inline Bytes load_bytes(const uint8_t* p) { return {words(p), words(p + 32)}; }
inline Bytes low_nibbles(Bytes x) {
  const __m256i mask = _mm256_set1_epi8(15);
  return {_mm256_and_si256(x.a, mask), _mm256_and_si256(x.b, mask)};
}
inline Bytes high_nibbles(Bytes x) { return low_nibbles({_mm256_srli_epi16(x.a, 4), _mm256_srli_epi16(x.b, 4)}); }
inline Pairs load_pairs(const uint8_t* p) { return {words(p), words(p + 32)}; }

// vpmaddubsw adds two products with saturation. Rows hold -127 to 127, so 2 * 128 * 127 = 32512 fits in its 16 bits;
// the weight's sign goes over to the row.
inline __m256i dot_four(__m256i s, __m256i positive, __m256i signed_) {
  return _mm256_add_epi32(s, _mm256_madd_epi16(_mm256_maddubs_epi16(positive, signed_), _mm256_set1_epi16(1)));
}
inline Four spread(const uint8_t* p) { return _mm256_set1_epi32(*reinterpret_cast<const int*>(p)); }
inline Ints dot_bytes(Ints s, Bytes w, Four row) {
  return {dot_four(s.a, _mm256_abs_epi8(w.a), _mm256_sign_epi8(row, w.a)),
          dot_four(s.b, _mm256_abs_epi8(w.b), _mm256_sign_epi8(row, w.b))};
}
inline Ints dot_nibbles(Ints s, Bytes w, Four row) {
  return {dot_four(s.a, w.a, row), dot_four(s.b, w.b, row)};
}
inline Floats dot_pairs(Floats s, Pairs w, Four x) {
  const Ints both{w.a, w.b}, even = left<16>(both), odd = both & ints(int32_t(0xffff0000));
  const Ints row{x, x};
  s = fma(bits_to_floats(even), bits_to_floats(left<16>(row)), s);
  return fma(bits_to_floats(odd), bits_to_floats(row & ints(int32_t(0xffff0000))), s);
}
inline Floats dot_floats(Floats s, Floats w, Four x) { return fma(w, bits_to_floats({x, x}), s); }
