// Sums of rows by segment: tokens are sorted by segment first, so that each output row has one writer, each token is
// read once, and sums run over ascending tokens however many threads there are.
#pragma once

#include "half.h"

namespace trtpass::TRTPASS_ISA {

inline constexpr int kSegments = 8;    // output rows of a unit
inline constexpr int kColumns = 1024;  // most columns of a unit: a row that takes all tokens is still shared out
inline constexpr int kAhead = 2;       // tokens in sorted order between the one that is added and the one asked for

// order[] = tokens whose segment is within [0, segments), by segment, ascending in each; segment s has those from
// end[s - 1] (0 for the first) to end[s].
inline void sort_by_segment(const std::int32_t* segment, std::int64_t tokens, std::int64_t segments, std::int32_t* end,
                            std::int32_t* order) {
  const auto inside = [&](std::int64_t i) { return segment[i] >= 0 && segment[i] < segments; };
  std::memset(end, 0, static_cast<std::size_t>(segments) * 4);
  for (std::int64_t i = 0; i < tokens; ++i)
    if (inside(i)) ++end[segment[i]];
  std::int32_t start = 0;
  for (std::int64_t s = 0; s < segments; ++s) {
    const std::int32_t count = end[s];
    end[s] = start;
    start += count;
  }
  for (std::int64_t i = 0; i < tokens; ++i)
    if (inside(i)) order[end[segment[i]]++] = static_cast<std::int32_t>(i);
}

// sums[0, n) += weight * from[0, n); meanwhile the row `ahead` is fetched into the cache: rows are short and scattered,
// and the processor alone would start over with each of them.
inline void add_row(float* sums, const void* from, const void* ahead, Type type, std::int64_t n, float weight) {
  const auto bytes = static_cast<std::int64_t>(bytes_of(type));
  const auto at = [&](const void* row, std::int64_t i) { return static_cast<const char*>(row) + i * bytes; };
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    __builtin_prefetch(at(ahead, i));
    store(sums + i, load(sums + i) + load_as(at(from, i), type) * weight);
  }
  float last[kLanes];
  read_row(last, at(from, i), type, n - i);
  for (std::int64_t j = 0; i < n; ++i, ++j) sums[i] += last[j] * weight;
}

// The cut of [B, segments, E] into units.
struct Cut {
  std::int64_t segments, width;
  std::int64_t rows, parts, columns;  // blocks of segments, blocks of columns, columns of a block

  Cut(std::int64_t segments, std::int64_t width)
      : segments(segments),
        width(width),
        rows((segments + kSegments - 1) / kSegments),
        parts((width + kColumns - 1) / kColumns),
        columns(parts == 0 ? 0 : ((width + parts - 1) / parts + 15) / 16 * 16) {}
  std::int64_t units(std::int64_t batch) const { return batch * rows * parts; }

  // run(b, segment, first column, columns) for each segment of a unit.
  template <class Run>
  void each(std::int64_t unit, const Run& run) const {
    const std::int64_t b = unit / (rows * parts), top = unit / parts % rows * kSegments, first = unit % parts * columns;
    const std::int64_t count = width - first < columns ? width - first : columns;
    for (std::int64_t s = top; s < top + kSegments && s < segments; ++s) run(b, s, first, count);
  }
};

}  // namespace trtpass::TRTPASS_ISA
