// One register of numbers, `Vector<C>` for C = float or double, for the instruction set this file is compiled for, and the conversions
// between storage types and C. Included once per instruction set, inside that set's namespace (STEER_NAMESPACE).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace steer::cpu::STEER_NAMESPACE {

struct Half {
  std::uint16_t bits;
};
struct BFloat16 {
  std::uint16_t bits;
};

// --- one number ----------------------------------------------------------------------------------------------------------------------

inline float bits_to_float(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline std::uint32_t float_to_bits(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float widen(float value) { return value; }
inline double widen(double value) { return value; }
inline float widen(BFloat16 value) { return bits_to_float(static_cast<std::uint32_t>(value.bits) << 16); }
inline float widen(Half value) {
#if defined(__F16C__)
  return _cvtsh_ss(value.bits);
#else
  const std::uint32_t sign = static_cast<std::uint32_t>(value.bits & 0x8000u) << 16;
  const std::uint32_t magnitude = static_cast<std::uint32_t>(value.bits & 0x7fffu) << 13;
  if (magnitude >= 0x0f800000u) return bits_to_float(sign | (magnitude + 0x70000000u));  // infinity, NaN
  // 2^112 moves the exponent from half's bias to float's, and makes subnormal halves normal.
  return bits_to_float(sign | float_to_bits(bits_to_float(magnitude) * 0x1p112f));
#endif
}

inline void narrow(float value, float& out) { out = value; }
inline void narrow(double value, double& out) { out = value; }
inline void narrow(float value, BFloat16& out) {
  const std::uint32_t bits = float_to_bits(value);
  if (std::isnan(value)) {
    out.bits = static_cast<std::uint16_t>((bits >> 16) | 0x40u);  // stays a NaN, quietly
    return;
  }
  out.bits = static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);  // to nearest, ties to even
}
inline void narrow(float value, Half& out) {
#if defined(__F16C__)
  out.bits = static_cast<std::uint16_t>(_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT));
#else
  const std::uint32_t bits = float_to_bits(value);
  const std::uint16_t sign = static_cast<std::uint16_t>((bits >> 16) & 0x8000u);
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) {
    out.bits = sign | 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // rounds past the largest half
    out.bits = sign | 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // subnormal: 0.5 has the ulp that a half's last bit needs, so the addition rounds
    out.bits = sign | static_cast<std::uint16_t>(float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u);
  } else {
    out.bits = sign | static_cast<std::uint16_t>((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13);
  }
#endif
}

// --- one register --------------------------------------------------------------------------------------------------------------------

template <typename C>
struct Vector;

#if defined(__AVX2__)
// Compilers fold a load into every FMA that uses it, loading it again each time. This makes it stay: one load, many uses.
template <typename T>
inline T in_register(T value) {
  asm("" : "+v"(value.v));
  return value;
}
#endif

#if defined(__AVX512F__)

template <>
struct Vector<float> {
  static constexpr int kLanes = 16;
  static constexpr int kRows = 6;  // rows and experts of a register tile: 24 accumulators of 32 registers
  static constexpr int kExperts = 4;
  static constexpr int kOuter = 8;  // experts and registers of a tile of outer products
  static constexpr int kOuterRegisters = 2;
  __m512 v;

  static Vector zero() { return {_mm512_setzero_ps()}; }
  static Vector set(float value) { return {_mm512_set1_ps(value)}; }
  static Vector load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static Vector load(const BFloat16* p) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
  }
  static Vector load(const Half* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}; }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store(BFloat16* p) const {
#if defined(__AVX512BF16__)
    const __m256bh rounded = _mm512_cvtneps_pbh(v);
    std::memcpy(p, &rounded, 32);
#else
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    rounded = _mm512_mask_or_epi32(rounded, nan, _mm512_srli_epi32(bits, 16), _mm512_set1_epi32(0x40));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(rounded));
#endif
  }
  void store(Half* p) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  friend Vector operator+(Vector a, Vector b) { return {_mm512_add_ps(a.v, b.v)}; }
  friend Vector operator-(Vector a, Vector b) { return {_mm512_sub_ps(a.v, b.v)}; }
  friend Vector operator*(Vector a, Vector b) { return {_mm512_mul_ps(a.v, b.v)}; }
  friend Vector fma(Vector a, Vector b, Vector c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
  float sum() const { return _mm512_reduce_add_ps(v); }
  friend void sum_four(const Vector* x, float* sums) {
    const auto pairs = [](__m512 a, __m512 b) { return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)); };
    const __m512d ab = _mm512_castps_pd(pairs(x[0].v, x[1].v)), cd = _mm512_castps_pd(pairs(x[2].v, x[3].v));
    const __m512 abcd = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)), _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
    _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
  }
  Vector kept() const { return in_register(*this); }
};

template <>
struct Vector<double> {
  static constexpr int kLanes = 8;
  static constexpr int kRows = 6;
  static constexpr int kExperts = 4;
  static constexpr int kOuter = 8;
  static constexpr int kOuterRegisters = 2;
  __m512d v;

  static Vector zero() { return {_mm512_setzero_pd()}; }
  static Vector set(double value) { return {_mm512_set1_pd(value)}; }
  static Vector load(const double* p) { return {_mm512_loadu_pd(p)}; }
  void store(double* p) const { _mm512_storeu_pd(p, v); }
  friend Vector operator+(Vector a, Vector b) { return {_mm512_add_pd(a.v, b.v)}; }
  friend Vector operator-(Vector a, Vector b) { return {_mm512_sub_pd(a.v, b.v)}; }
  friend Vector operator*(Vector a, Vector b) { return {_mm512_mul_pd(a.v, b.v)}; }
  friend Vector fma(Vector a, Vector b, Vector c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }
  double sum() const { return _mm512_reduce_add_pd(v); }
  Vector kept() const { return in_register(*this); }
};

#elif defined(__AVX2__)

template <>
struct Vector<float> {
  static constexpr int kLanes = 8;
  static constexpr int kRows = 2;  // 8 accumulators of 16 registers
  static constexpr int kExperts = 4;
  static constexpr int kOuter = 2;
  static constexpr int kOuterRegisters = 4;
  __m256 v;

  static Vector zero() { return {_mm256_setzero_ps()}; }
  static Vector set(float value) { return {_mm256_set1_ps(value)}; }
  static Vector load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static Vector load(const BFloat16* p) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))};
  }
  static Vector load(const Half* p) { return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  void store(BFloat16* p) const {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    const __m256i quiet = _mm256_or_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(0x40));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i words = _mm256_blendv_epi8(rounded, quiet, nan);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(words, words), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
  }
  void store(Half* p) const { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT)); }
  friend Vector operator+(Vector a, Vector b) { return {_mm256_add_ps(a.v, b.v)}; }
  friend Vector operator-(Vector a, Vector b) { return {_mm256_sub_ps(a.v, b.v)}; }
  friend Vector operator*(Vector a, Vector b) { return {_mm256_mul_ps(a.v, b.v)}; }
  friend Vector fma(Vector a, Vector b, Vector c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
  float sum() const {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
  }
  friend void sum_four(const Vector* x, float* sums) {
    const __m256 abcd = _mm256_hadd_ps(_mm256_hadd_ps(x[0].v, x[1].v), _mm256_hadd_ps(x[2].v, x[3].v));
    _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1)));
  }
  Vector kept() const { return in_register(*this); }
};

template <>
struct Vector<double> {
  static constexpr int kLanes = 4;
  static constexpr int kRows = 2;
  static constexpr int kExperts = 4;
  static constexpr int kOuter = 2;
  static constexpr int kOuterRegisters = 4;
  __m256d v;

  static Vector zero() { return {_mm256_setzero_pd()}; }
  static Vector set(double value) { return {_mm256_set1_pd(value)}; }
  static Vector load(const double* p) { return {_mm256_loadu_pd(p)}; }
  void store(double* p) const { _mm256_storeu_pd(p, v); }
  friend Vector operator+(Vector a, Vector b) { return {_mm256_add_pd(a.v, b.v)}; }
  friend Vector operator-(Vector a, Vector b) { return {_mm256_sub_pd(a.v, b.v)}; }
  friend Vector operator*(Vector a, Vector b) { return {_mm256_mul_pd(a.v, b.v)}; }
  friend Vector fma(Vector a, Vector b, Vector c) { return {_mm256_fmadd_pd(a.v, b.v, c.v)}; }
  double sum() const {
    const __m128d half = _mm_add_pd(_mm256_castpd256_pd128(v), _mm256_extractf128_pd(v, 1));
    return _mm_cvtsd_f64(_mm_add_sd(half, _mm_unpackhi_pd(half, half)));
  }
  Vector kept() const { return in_register(*this); }
};

#else

// 16-byte registers through the compiler's vector extension: SSE2, NEON, or whatever the target has.
template <typename C>
struct Vector {
  static constexpr int kLanes = 16 / sizeof(C);
  static constexpr int kRows = 2;
  static constexpr int kExperts = 4;
  static constexpr int kOuter = 2;
  static constexpr int kOuterRegisters = 4;
  typedef C Register __attribute__((vector_size(16)));
  Register v;

  static Vector zero() { return {Register{}}; }
  static Vector set(C value) { return {Register{} + value}; }
  template <typename S>
  static Vector load(const S* p) {
    Vector out;
    for (int i = 0; i < kLanes; ++i) out.v[i] = widen(p[i]);
    return out;
  }
  static Vector load(const C* p) {
    Vector out;
    std::memcpy(&out.v, p, sizeof(Register));
    return out;
  }
  template <typename S>
  void store(S* p) const {
    for (int i = 0; i < kLanes; ++i) narrow(v[i], p[i]);
  }
  void store(C* p) const { std::memcpy(p, &v, sizeof(Register)); }
  friend Vector operator+(Vector a, Vector b) { return {a.v + b.v}; }
  friend Vector operator-(Vector a, Vector b) { return {a.v - b.v}; }
  friend Vector operator*(Vector a, Vector b) { return {a.v * b.v}; }
  friend Vector fma(Vector a, Vector b, Vector c) { return {a.v * b.v + c.v}; }
  C sum() const {
    C total = 0;
    for (int i = 0; i < kLanes; ++i) total += v[i];
    return total;
  }
  Vector kept() const { return *this; }
};

#endif

// Whether loops may as well read numbers of half precision as they lie and widen them each time: an instruction or two, where a widened
// copy has to be written and does not stay in L1.
#if defined(__AVX2__)
constexpr bool kWidensInLoops = true;
#else
constexpr bool kWidensInLoops = false;
#endif

// The sums of four registers, each over its lanes.
template <typename C>
inline void sum_four(const Vector<C>* x, C* sums) {
  for (int i = 0; i < 4; ++i) sums[i] = x[i].sum();
}

// Prefetches the cache line at `p`, which may lie past the end of an array, into L2. (GCC drops calls of a function that does nothing
// else, unless it has been inlined by then.)
[[gnu::always_inline]] inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

// --- the last, short register of a row -----------------------------------------------------------------------------------------------

// Reads `count` < kLanes numbers, zeros after them; none for a count below one.
template <typename C, typename S>
[[gnu::noinline]] Vector<C> load_tail(const S* p, int count) {
  alignas(64) C lanes[Vector<C>::kLanes] = {};
  for (int i = 0; i < count; ++i) lanes[i] = widen(p[i]);
  return Vector<C>::load(lanes);
}

template <typename C, typename S>
[[gnu::noinline]] void store_tail(Vector<C> value, S* p, int count) {
  alignas(64) C lanes[Vector<C>::kLanes];
  value.store(lanes);
  for (int i = 0; i < count; ++i) narrow(lanes[i], p[i]);
}

// The same for any register of a row, of which `left` numbers are still within it; `whole` is a constant, true where all are.
template <typename C, bool whole = false, typename S>
inline Vector<C> load_up_to(const S* p, std::int64_t left, std::bool_constant<whole> = {}) {
  if (whole || left >= Vector<C>::kLanes) return Vector<C>::load(p);
  return load_tail<C>(p, static_cast<int>(left));
}

template <typename C, bool whole = false, typename S>
inline void store_up_to(Vector<C> value, S* p, std::int64_t left, std::bool_constant<whole> = {}) {
  if (whole || left >= Vector<C>::kLanes)
    value.store(p);
  else if (left > 0)
    store_tail<C>(value, p, static_cast<int>(left));
}

}  // namespace steer::cpu::STEER_NAMESPACE
