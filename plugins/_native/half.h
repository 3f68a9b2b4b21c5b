// Rows of float32 or float16 in, float32 inside, float32 or float16 out: kernels compute in float32 whatever is stored.
#pragma once

#include "call.h"
#include "vec.h"

namespace trtpass::TRTPASS_ISA {

// Exact; every half is a float.
TRTPASS_INLINE float from_half(std::uint16_t h) {
  std::uint32_t sign = static_cast<std::uint32_t>(h & 0x8000u) << 16;
  std::uint32_t magnitude = static_cast<std::uint32_t>(h & 0x7fffu) << 13;
  std::uint32_t exponent = magnitude & 0x0f800000u;
  float x;
  if (exponent == 0x0f800000u) {  // infinity, NaN
    magnitude += 0x70000000u;
  } else if (exponent == 0) {  // zero, subnormal: the fraction as a multiple of 2^-24
    x = static_cast<float>(h & 0x3ffu) * 5.9604644775390625e-8f;
    std::memcpy(&magnitude, &x, 4);
  } else {
    magnitude += 0x38000000u;
  }
  magnitude |= sign;
  std::memcpy(&x, &magnitude, 4);
  return x;
}

// To the nearest half, ties to even; above 65504 infinity; NaN stays NaN.
TRTPASS_INLINE std::uint16_t to_half(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const std::uint16_t sign = static_cast<std::uint16_t>((bits >> 16) & 0x8000u);
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return sign | 0x7e00u;   // NaN
  if (bits >= 0x477ff000u) return sign | 0x7c00u;  // 65520 and more
  if (bits < 0x38800000u) {                        // below 2^-14: adding 0.5 leaves a multiple of 2^-24 in the low bits
    float shifted;
    std::memcpy(&shifted, &bits, 4);
    shifted += 0.5f;
    std::memcpy(&bits, &shifted, 4);
    return static_cast<std::uint16_t>(sign | (bits - 0x3f000000u));
  }
  bits += 0xfffu + ((bits >> 13) & 1u);  // round to even at bit 13
  return static_cast<std::uint16_t>(sign | ((bits - 0x38000000u) >> 13));
}

// The next kLanes values, as floats.
TRTPASS_INLINE Vec load_as(const void* from, Type type) {
  if (type == Type::float32) return load(static_cast<const float*>(from));
#if defined(__AVX512F__)
  return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(from)));
#elif defined(__F16C__)
  return (Vec)_mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(from)));
#else
  Vec v;
  for (int i = 0; i < kLanes; ++i) v[i] = from_half(static_cast<const std::uint16_t*>(from)[i]);
  return v;
#endif
}

// to[0, n) = from[0, n) * factor.
TRTPASS_INLINE void read_row(float* to, const void* from, Type type, std::int64_t n, float factor = 1.0f) {
  if (type == Type::float32) {
    const float* source = static_cast<const float*>(from);
    for (std::int64_t i = 0; i < n; ++i) to[i] = source[i] * factor;
    return;
  }
  const std::uint16_t* source = static_cast<const std::uint16_t*>(from);
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(to + i, load_as(source + i, type) * factor);
  for (; i < n; ++i) to[i] = from_half(source[i]) * factor;
}

// to[0, n) = from[0, n) * factor, rounded to the type of `to`.
TRTPASS_INLINE void write_row(void* to, Type type, const float* from, std::int64_t n, float factor = 1.0f) {
  if (type == Type::float32) {
    float* target = static_cast<float*>(to);
    for (std::int64_t i = 0; i < n; ++i) target[i] = from[i] * factor;
    return;
  }
  std::uint16_t* target = static_cast<std::uint16_t*>(to);
  std::int64_t i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= n; i += 16)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(target + i),
                        _mm512_cvtps_ph((__m512)(load(from + i) * factor), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(target + i),
                     _mm256_cvtps_ph((__m256)(load(from + i) * factor), _MM_FROUND_TO_NEAREST_INT));
#endif
  for (; i < n; ++i) target[i] = to_half(from[i] * factor);
}

TRTPASS_INLINE void zero_row(void* to, Type type, std::int64_t n) {
  std::memset(to, 0, static_cast<std::size_t>(n) * bytes_of(type));
}

}  // namespace trtpass::TRTPASS_ISA
