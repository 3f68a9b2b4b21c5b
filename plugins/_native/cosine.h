// Products of unit vectors: rows of A against a strip of columns of B, whose vectors are packed into panels.
//
// A vector has a direction where its float32 sum of squares is a finite normal number; others become zeros, and the
// caller masks what they would match. A strip is as many vectors as stay in the second-level cache while all rows go
// past it, and the depth is cut so that the rows of a tile stay in the first. Each product is one sum over the depth in
// ascending order, wherever its row and its column lie: equal vectors have equal products, bit for bit, and so have a
// pair and its mirror image.
#pragma once

#include "gemm.h"
#include "half.h"

namespace trtpass::TRTPASS_ISA {

inline constexpr int kWord = 32;            // columns of a word of bits; a multiple of kPanel
inline constexpr int kStrip = 128;          // most columns of a strip
inline constexpr int kDepth = 448;          // most of the depth at a time: 12 rows of it are 21 KiB
inline constexpr int kAheadBytes = 8192;    // rows lie one behind the other: what is asked for while one is read
inline constexpr int kCached = 128 * 1024;  // floats of a strip: 512 KiB, half of a second-level cache

// Columns of a strip of vectors this deep: 32, 64 or 128.
TRTPASS_INLINE int strip_of(std::int64_t depth) {
  int columns = kStrip;
  while (columns > kWord && columns * depth > kCached) columns /= 2;
  return columns;
}

// Floats from one row to the next: an odd number of cache lines, so that the rows of a tile never share one cache set.
TRTPASS_INLINE std::int64_t pitch_of(std::int64_t depth) { return (round_up(depth, 16) / 16 | 1) * 16; }

// to[pitch] = the vector divided by its norm, zeros behind it; false, and zeros, where it has no direction.
inline bool unit_row(float* to, const void* from, Type type, std::int64_t depth, std::int64_t pitch) {
  const char* source = static_cast<const char*>(from);
  const auto bytes = static_cast<std::int64_t>(bytes_of(type));
  Vec squares[4] = {};
  std::int64_t d = 0;
  for (; d + 4 * kLanes <= depth; d += 4 * kLanes)
    for (int i = 0; i < 4; ++i) {
      const char* at = source + (d + i * kLanes) * bytes;
      __builtin_prefetch(at + kAheadBytes);
      const Vec x = load_as(at, type);
      store(to + d + i * kLanes, x);
      squares[i] += x * x;
    }
  read_row(to + d, source + d * bytes, type, depth - d);
  for (std::int64_t e = depth; e < pitch; ++e) to[e] = 0.0f;
  for (; d < pitch; d += kLanes) squares[0] += load(to + d) * load(to + d);
  const float square = sum((squares[0] + squares[1]) + (squares[2] + squares[3]));
  if (!(square >= __FLT_MIN__ && square <= __FLT_MAX__)) {  // NaN too
    zero_row(to, Type::float32, pitch);
    return false;
  }
  const Vec factor = splat(1.0f / __builtin_sqrtf(square));
  for (d = 0; d < pitch; d += kLanes) store(to + d, load(to + d) * factor);
  return true;
}

// Packs unit vectors [0, columns) into panels [ceil(columns / kPanel)][depth][kPanel], zeros behind them, and says by
// one bit each which have a direction. row(i) is the place of the i-th; memory: kLanes * pitch floats.
template <class Row>
inline void pack_units(Type type, std::int64_t depth, int columns, const Row& row, float* memory, float* panels,
                       std::uint32_t* directed) {
  const std::int64_t pitch = pitch_of(depth);
  for (int word = 0; word * kWord < columns; ++word) directed[word] = 0;
  for (int first = 0; first < round_up(columns, kPanel); first += kLanes) {
    for (int i = 0; i < kLanes; ++i) {
      const int column = first + i;
      if (column >= columns)
        zero_row(memory + i * pitch, Type::float32, pitch);
      else if (unit_row(memory + i * pitch, row(column), type, depth, pitch))
        directed[column / kWord] |= 1u << column % kWord;
    }
    float* panel = panels + first / kPanel * kPanel * depth + first % kPanel;
    for (std::int64_t d = 0; d < depth; d += kLanes) {
      Vec square[kLanes];
      for (int i = 0; i < kLanes; ++i) square[i] = load(memory + i * pitch + d);
      transpose(square);
      const std::int64_t part = depth - d < kLanes ? depth - d : kLanes;
      for (int i = 0; i < part; ++i) store(panel + (d + i) * kPanel, square[i]);
    }
  }
}

template <int M>
inline void multiply_rows(const float* rows, std::int64_t pitch, const float* panels, std::int64_t depth, int columns,
                          float* c) {
  const std::int64_t parts = (depth + kDepth - 1) / kDepth, most = parts == 0 ? 0 : (depth + parts - 1) / parts;
  for (std::int64_t d = 0; d < depth; d += most) {
    const std::int64_t part = depth - d < most ? depth - d : most;
    for (int p = 0; p < columns; p += kPanel) {
      const float* panel = panels + p * depth + d * kPanel;
      if (columns - p > kLanes && d == 0)
        tile<M, 2, false>(rows + d, pitch, panel, kPanel, part, c + p, kStrip);
      else if (columns - p > kLanes)
        tile<M, 2, true>(rows + d, pitch, panel, kPanel, part, c + p, kStrip);
      else if (d == 0)
        tile<M, 1, false>(rows + d, pitch, panel, kPanel, part, c + p, kStrip);
      else
        tile<M, 1, true>(rows + d, pitch, panel, kPanel, part, c + p, kStrip);
    }
  }
}

// c[kRows][kStrip], its first `count` rows and `columns` columns: products of rows[kRows][pitch] with a packed strip.
inline void multiply(int count, const float* rows, std::int64_t pitch, const float* panels, std::int64_t depth,
                     int columns, float* c) {
  if (count > kRows * 2 / 3)
    multiply_rows<kRows>(rows, pitch, panels, depth, columns, c);
  else if (count > kRows / 3)
    multiply_rows<kRows * 2 / 3>(rows, pitch, panels, depth, columns, c);
  else
    multiply_rows<kRows / 3>(rows, pitch, panels, depth, columns, c);
}

}  // namespace trtpass::TRTPASS_ISA
