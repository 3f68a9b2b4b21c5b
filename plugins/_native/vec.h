// Vectors of floats, as wide as the instruction set that this file is compiled for.
//
// Every kernel is compiled once for each instruction set, with TRTPASS_ISA naming a namespace of its own, so that the
// linker never merges a function compiled for AVX-512 with one that must run without. Nothing here or in a kernel may
// use a template of the standard library that is not inlined for sure: it would be such a shared function.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define TRTPASS_INLINE inline __attribute__((always_inline))

namespace trtpass::TRTPASS_ISA {

#if defined(__AVX512F__)
inline constexpr int kLanes = 16;
#elif defined(__AVX2__)
inline constexpr int kLanes = 8;
#else
inline constexpr int kLanes = 4;  // SSE2, NEON
#endif

typedef float Vec __attribute__((vector_size(kLanes * sizeof(float))));
typedef std::int32_t IntVec __attribute__((vector_size(kLanes * sizeof(std::int32_t))));
typedef std::uint32_t WordVec __attribute__((vector_size(kLanes * sizeof(std::uint32_t))));

TRTPASS_INLINE Vec load(const float* from) {
  Vec v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

TRTPASS_INLINE void store(float* to, Vec v) { std::memcpy(to, &v, sizeof v); }

TRTPASS_INLINE Vec splat(float x) { return Vec{} + x; }

// The larger of each pair; b where one of them is NaN.
TRTPASS_INLINE Vec larger(Vec a, Vec b) {
#if defined(__AVX512F__)
  return (Vec)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Vec)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
  return (Vec)_mm_max_ps((__m128)a, (__m128)b);
#else
  return a > b ? a : b;
#endif
}

TRTPASS_INLINE Vec round_even(Vec x) {  // |x| < 2^22
  const Vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it leaves no fraction bits
  return (x + magic) - magic;
}

#if defined(__SSE2__)
TRTPASS_INLINE __m128 upper(__m128 x) { return _mm_movehl_ps(x, x); }
TRTPASS_INLINE __m128 second(__m128 x) { return _mm_shuffle_ps(x, x, 1); }
#endif

// All lanes added up, pairwise, in a fixed order.
TRTPASS_INLINE float sum(Vec v) {
#if defined(__SSE2__)
#if defined(__AVX512F__)
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256((__m512)v), _mm512_extractf32x8_ps((__m512)v, 1));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
#elif defined(__AVX2__)
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
#else
  const __m128 four = (__m128)v;
#endif
  const __m128 two = _mm_add_ps(four, upper(four));
  return _mm_cvtss_f32(_mm_add_ss(two, second(two)));
#else
  return (v[0] + v[2]) + (v[1] + v[3]);
#endif
}

// The largest lane; anything where one is NaN.
TRTPASS_INLINE float largest(Vec v) {
#if defined(__SSE2__)
#if defined(__AVX512F__)
  const __m256 eight = _mm256_max_ps(_mm512_castps512_ps256((__m512)v), _mm512_extractf32x8_ps((__m512)v, 1));
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
#elif defined(__AVX2__)
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
#else
  const __m128 four = (__m128)v;
#endif
  const __m128 two = _mm_max_ps(four, upper(four));
  return _mm_cvtss_f32(_mm_max_ss(two, second(two)));
#else
  float x = v[0];
  for (int i = 1; i < kLanes; ++i) x = v[i] > x ? v[i] : x;
  return x;
#endif
}

// 2^x to 2e-7 of itself for x <= 127; at least 2^-126, never 0; NaN stays NaN.
TRTPASS_INLINE Vec exp2(Vec x) {
  x = larger(splat(-126.0f), x);
  const Vec magic = splat(12582912.0f);
  const Vec shifted = x + magic;  // its low bits hold round(x)
  const Vec f = x - (shifted - magic);  // -0.5 .. 0.5
  // Minimax over +-0.5 with p(0) = 1: relative error 6e-8 before rounding; Taylor would need one degree more.
  Vec p = splat(1.322539989e-3f);
  p = p * f + splat(9.675668553e-3f);
  p = p * f + splat(5.550863966e-2f);
  p = p * f + splat(2.402213067e-1f);
  p = p * f + splat(6.931469440e-1f);
  p = p * f + splat(1.0f);
  WordVec scale, bits;  // a sum that overflows, of x beyond 127 beside a NaN, is defined for words
  std::memcpy(&scale, &shifted, sizeof scale);
  std::memcpy(&bits, &p, sizeof bits);
  bits += scale << 23;
  std::memcpy(&p, &bits, sizeof p);
  return p;
}

// Exchanges the off-diagonal blocks of size S within each 2S x 2S block of lanes and rows.
template <int S>
TRTPASS_INLINE void exchange(Vec (&rows)[kLanes]) {
  IntVec low, high;  // lane l of the two: from the first row 0 .. kLanes - 1, from the second kLanes ..
  for (int l = 0; l < kLanes; ++l) {
    low[l] = l & S ? kLanes + l - S : l;
    high[l] = l & S ? kLanes + l : l + S;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i & S) continue;
    const Vec a = rows[i], b = rows[i + S];
    rows[i] = __builtin_shuffle(a, b, low);
    rows[i + S] = __builtin_shuffle(a, b, high);
  }
}

// rows[i][j] to rows[j][i], in registers.
TRTPASS_INLINE void transpose(Vec (&rows)[kLanes]) {
  exchange<1>(rows);
  exchange<2>(rows);
  if constexpr (kLanes > 4) exchange<4>(rows);
  if constexpr (kLanes > 8) exchange<8>(rows);
}

}  // namespace trtpass::TRTPASS_ISA
