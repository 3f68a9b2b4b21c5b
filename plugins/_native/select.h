// Where items, taken in ascending order of value, reach a target: one histogram and a bisection instead of a sort.
//
// The histogram leaves the items of one bucket, usually a few in a hundred; the bisection runs over those alone, with
// vector compares. Equal values, however many, cost nothing more: at worst everything is in one bucket, and about 20
// passes over it replace the one over the histogram. Everything is integer arithmetic, so there is no order of adding.
#pragma once

#include "vec.h"

namespace trtpass::TRTPASS_ISA {

inline constexpr int kBuckets = 2048;
inline constexpr int kTables = 4;  // neighbours count in different ones: a hot bucket would wait for its own last store

// What an item adds to the sum that has to reach the target: one, or its own value.
struct One {
  using Sum = std::uint32_t;
  static TRTPASS_INLINE Sum of(std::uint32_t) { return 1; }
};
struct Itself {
  using Sum = std::uint64_t;
  static TRTPASS_INLINE Sum of(std::uint32_t value) { return value; }
};

// The weight of the items of values[0, n) that are <= most.
template <class Weight>
TRTPASS_INLINE std::int64_t weigh(const std::uint32_t* values, std::int64_t n, std::uint32_t most) {
  typename Weight::Sum sum = 0;
  for (std::int64_t i = 0; i < n; ++i) sum += values[i] <= most ? Weight::of(values[i]) : 0;
  return static_cast<std::int64_t>(sum);
}

// to[0, return) = items[i] for the i in [0, n) with first <= marks[i] <= last, in order, at most `room` of them; to[room]
// and what lies behind it stays. `items` null: start + i itself.
TRTPASS_INLINE std::int64_t filter(std::uint32_t* to, std::int64_t room, const std::uint32_t* items,
                                   std::uint32_t start, const std::uint32_t* marks, std::int64_t n, std::uint32_t first,
                                   std::uint32_t last) {
  std::int64_t kept = 0, i = 0;
#if defined(__AVX512F__)
  const __m512i count_up = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i low = _mm512_set1_epi32(static_cast<int>(first));
  const __m512i width = _mm512_set1_epi32(static_cast<int>(last - first));
  for (; i + 16 <= n; i += 16) {
    const __m512i mark = _mm512_loadu_si512(marks + i);
    const __mmask16 mask = _mm512_cmple_epu32_mask(_mm512_sub_epi32(mark, low), width);
    const int found = __builtin_popcount(mask);
    if (found > room - kept) break;
    const __m512i item = items != nullptr
                             ? _mm512_loadu_si512(items + i)
                             : _mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(start + i)), count_up);
    // Compressed in a register, then stored: compressing into memory is microcode on Zen 4.
    _mm512_mask_storeu_epi32(to + kept, static_cast<__mmask16>((1u << found) - 1u),
                             _mm512_maskz_compress_epi32(mask, item));
    kept += found;
  }
#endif
  for (; i < n && kept < room; ++i) {  // no branch on the mark: it would be mispredicted half of the time
    to[kept] = items != nullptr ? items[i] : start + static_cast<std::uint32_t>(i);
    kept += marks[i] - first <= last - first;
  }
  return kept;
}

struct Cut {
  std::uint32_t value;  // the smallest at which all items up to it weigh at least the target
  std::int64_t under;   // the weight of the items below it, less than the target
};

// Scratch of one worker.
struct CutMemory {
  static std::int64_t bytes(std::int64_t items) {
    return kTables * kBuckets * 8 + (items * 4 + 63) / 64 * 64;
  }
  CutMemory(void* memory, std::int64_t worker, std::int64_t items)
      : tables(static_cast<char*>(memory) + worker * bytes(items)),
        candidates(reinterpret_cast<std::uint32_t*>(static_cast<char*>(tables) + kTables * kBuckets * 8)) {}
  void* tables;               // [kTables, kBuckets] of Weight::Sum
  std::uint32_t* candidates;  // [items]
};

// 1 <= target <= the weight of all. `bucket` maps a value to [0, kBuckets) and never falls where the value rises.
template <class Weight, class Bucket>
TRTPASS_INLINE Cut find_cut(const std::uint32_t* values, std::int64_t n, std::int64_t target, const Bucket& bucket,
                            const CutMemory& memory) {
  using Sum = typename Weight::Sum;
  constexpr std::int64_t kChunk = 256;
  std::uint32_t chunk[kChunk];  // buckets of values[at, at + kChunk)
  Sum* const tables = static_cast<Sum*>(memory.tables);
  std::memset(tables, 0, kTables * kBuckets * sizeof(Sum));
  for (std::int64_t at = 0; at < n; at += kChunk) {
    const std::int64_t size = n - at < kChunk ? n - at : kChunk;
    for (std::int64_t i = 0; i < size; ++i) chunk[i] = bucket(values[at + i]);
    std::int64_t i = 0;
    for (; i + kTables <= size; i += kTables)
#pragma GCC unroll 4
      for (int t = 0; t < kTables; ++t) tables[t * kBuckets + chunk[i + t]] += Weight::of(values[at + i + t]);
    for (; i < size; ++i) tables[chunk[i]] += Weight::of(values[at + i]);
  }

  const auto weight_of = [&](std::int64_t first, std::int64_t count) {
    Sum sum = 0;
    for (int t = 0; t < kTables; ++t)
      for (std::int64_t i = 0; i < count; ++i) sum += tables[t * kBuckets + first + i];
    return static_cast<std::int64_t>(sum);
  };
  constexpr std::int64_t kStride = 64;
  std::int64_t found = 0, under = 0;  // the bucket in which the target is reached, and the weight before it
  for (std::int64_t w; under + (w = weight_of(found, kStride)) < target; found += kStride) under += w;
  for (std::int64_t w; under + (w = weight_of(found, 1)) < target; ++found) under += w;

  std::int64_t left = 0;
  for (std::int64_t at = 0; at < n; at += kChunk) {
    const std::int64_t size = n - at < kChunk ? n - at : kChunk;
    for (std::int64_t i = 0; i < size; ++i) chunk[i] = bucket(values[at + i]);
    const std::uint32_t wanted = static_cast<std::uint32_t>(found);
    left += filter(memory.candidates + left, n - left, values + at, 0, chunk, size, wanted, wanted);
  }

  // Invariant: all items below `low` weigh `under`, less than the target; all up to `high` weigh at least the target.
  std::uint32_t low = 0xffffffffu, high = 0;
  for (std::int64_t i = 0; i < left; ++i) {
    low = memory.candidates[i] < low ? memory.candidates[i] : low;
    high = memory.candidates[i] > high ? memory.candidates[i] : high;
  }
  const std::int64_t before = under;
  while (low < high) {
    const std::uint32_t middle = low + (high - low) / 2;
    const std::int64_t reached = before + weigh<Weight>(memory.candidates, left, middle);
    if (reached >= target) {
      high = middle;
    } else {
      low = middle + 1;
      under = reached;
    }
  }
  return {low, under};
}

}  // namespace trtpass::TRTPASS_ISA
