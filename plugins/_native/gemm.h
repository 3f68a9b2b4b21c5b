// The one product that every kernel is made of: a few rows of A, held as accumulators, times a panel of B.
//
// A panel is kPanel = 2 vectors wide. kRows x 2 accumulators fill the register file but for the two vectors of B and one
// broadcast of A: 24 + 3 of AVX-512's 32, 12 + 3 of AVX2's and SSE's 16. Each step loads 2 vectors and kRows scalars for
// kRows * 2 fused multiply-adds, so the multipliers are the limit and not the loads. docs/native.md has the figures.
#pragma once

#include "vec.h"

namespace trtpass::TRTPASS_ISA {

inline constexpr int kRows = kLanes == 16 ? 12 : 6;
inline constexpr int kPanel = 2 * kLanes;

TRTPASS_INLINE constexpr std::int64_t round_up(std::int64_t n, std::int64_t step) { return (n + step - 1) / step * step; }

// c[M, N * kLanes] = (Add ? c : 0) + a[M, k] b[k, N * kLanes]; each sum runs over k in order, whatever M and N are.
template <int M, int N, bool Add>
TRTPASS_INLINE void tile(const float* a, std::int64_t a_row, const float* b, std::int64_t b_row, std::int64_t k, float* c,
                         std::int64_t c_row) {
  Vec sums[M][N];
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) sums[i][j] = Add ? load(c + i * c_row + j * kLanes) : Vec{};
  for (std::int64_t t = 0; t < k; ++t) {
    Vec right[N];
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) right[j] = load(b + t * b_row + j * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) sums[i][j] += a[i * a_row + t] * right[j];
  }
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) store(c + i * c_row + j * kLanes, sums[i][j]);
}

}  // namespace trtpass::TRTPASS_ISA
