// What AVX-512 with VNNI and BF16 can do, in 16 lanes. Included by kernels_avx512.cpp alone, inside its namespace.
// The types are the compiler's own vectors, with its operators: GCC keeps structs around them in memory.

constexpr bool kUnsignedRows = true;  // the row's bytes are q + 128, because vpdpbusd's first operand has no sign
constexpr Tile kPlainTile = {9, 3};     // 27 registers of sums, 3 of weights, one of a row
constexpr Tile kGroupedTile = {4, 3};   // 12 of integer sums, 12 of totals, and 6 others
constexpr int kStreams = 4;
constexpr int kAcross = 4;  // times 16 lanes of attention's sums, for each of up to kRowsAtOnce rows

using Floats = __m512;
typedef int32_t Ints __attribute__((vector_size(64)));
using Bytes = __m512i;  // 16 lanes of 4 bytes
using Pairs = __m512i;  // 16 lanes of 2 bf16
using Four = __m512i;   // four bytes of a row in every lane

inline Floats floats(float x) { return _mm512_set1_ps(x); }
inline Floats load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Floats a) { _mm512_storeu_ps(p, a); }
inline Floats load_first(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p); }
inline void store_first(float* p, Floats a, int64_t n) { _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), a); }
inline Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats larger(Floats a, Floats b) { return _mm512_max_ps(a, b); }   // b where either is NaN
inline Floats smaller(Floats a, Floats b) { return _mm512_min_ps(a, b); }  // b where either is NaN
inline Floats if_less(Floats a, Floats b, Floats yes, Floats no) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes);
}

inline Ints ints(int32_t x) { return Ints(_mm512_set1_epi32(x)); }
inline Ints load(const int32_t* p) { return Ints(_mm512_loadu_si512(p)); }
inline Ints larger(Ints a, Ints b) { return Ints(_mm512_max_epi32(__m512i(a), __m512i(b))); }
template <int N> inline Ints left(Ints a) { return Ints(_mm512_slli_epi32(__m512i(a), N)); }
template <int N> inline Ints right(Ints a) { return Ints(_mm512_srai_epi32(__m512i(a), N)); }  // keeps the sign
inline Floats to_floats(Ints a) { return _mm512_cvtepi32_ps(__m512i(a)); }
inline Ints to_ints(Floats a) { return Ints(_mm512_cvtps_epi32(a)); }  // to nearest, ties to even
inline Floats bits_to_floats(Ints a) { return _mm512_castsi512_ps(__m512i(a)); }
inline Ints floats_to_bits(Floats a) { return Ints(_mm512_castps_si512(a)); }
inline void store_bytes(uint8_t* p, Ints a) {  // the lowest byte of each lane
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(__m512i(a)));
}
inline void store_words(uint16_t* p, Ints a) {  // the lower half of each lane
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(__m512i(a)));
}
inline __m256i words(const uint16_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline Floats load_half(const uint16_t* p) { return _mm512_cvtph_ps(words(p)); }
inline Floats load_bf16(const uint16_t* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words(p)), 16));
}

inline Bytes load_bytes(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline Bytes low_nibbles(Bytes a) { return _mm512_and_si512(a, _mm512_set1_epi8(15)); }
inline Bytes high_nibbles(Bytes a) { return _mm512_and_si512(_mm512_srli_epi16(a, 4), _mm512_set1_epi8(15)); }
inline Pairs load_pairs(const uint8_t* p) { return _mm512_loadu_si512(p); }

// In a register for all blocks of a tile: left to itself the compiler loads it again for each.
inline Four spread(const uint8_t* p) {
  Four four = _mm512_set1_epi32(*reinterpret_cast<const int*>(p));
  asm("" : "+v"(four));
  return four;
}
// s + the four products of each lane: signed weights with the row's four bytes in the form that `prepare` wrote.
inline Ints dot_bytes(Ints s, Bytes w, Four x) { return Ints(_mm512_dpbusd_epi32(__m512i(s), x, w)); }
// s + the four products of each lane: nibbles (0 to 15) with the row's four signed bytes.
inline Ints dot_nibbles(Ints s, Bytes w, Four x) { return Ints(_mm512_dpbusd_epi32(__m512i(s), w, x)); }
// s + the two products of each lane.
inline Floats dot_pairs(Floats s, Pairs w, Four x) { return _mm512_dpbf16_ps(s, __m512bh(w), __m512bh(x)); }
inline Floats dot_floats(Floats s, Floats w, Four x) { return fma(w, _mm512_castsi512_ps(x), s); }
