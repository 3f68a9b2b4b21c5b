// SegmentMean: each mean is summed by one thread, over the tokens of its segment in ascending order.
#include "segments.h"

using namespace trtpass;
using namespace trtpass::TRTPASS_ISA;

TRTPASS_KERNEL(segment_mean) {
  const Tensor &x = call.input("x"), &label = call.input("label");
  const std::int64_t batch = call.size("B"), tokens = call.size("S"), width = call.size("E");
  const std::int64_t permille = call.integer("max_segments_permille");
  if (permille < 1 || permille > 1000)
    fail("SegmentMean.max_segments_permille is %lld; expected 1 to 1000", (long long)permille);
  const std::int64_t capacity = (tokens * permille + 999) / 1000;
  Tensor mean = call.output("mean", {batch, capacity, width}), size = call.output("size", {batch, capacity});

  auto* ends = static_cast<std::int32_t*>(call.scratch(static_cast<std::size_t>(batch * capacity) * 4));
  auto* orders = static_cast<std::int32_t*>(call.scratch(static_cast<std::size_t>(batch * tokens) * 4));
  call.parallel(batch, [&](std::int64_t b, int) {
    std::int32_t* end = ends + b * capacity;
    sort_by_segment(label.ints() + b * tokens, tokens, capacity, end, orders + b * tokens);
    for (std::int64_t s = 0; s < capacity; ++s) size.ints()[b * capacity + s] = end[s] - (s > 0 ? end[s - 1] : 0);
  });

  const Cut cut(capacity, width);
  const std::int64_t bytes = static_cast<std::int64_t>(bytes_of(x.type));
  call.parallel(cut.units(batch), [&](std::int64_t unit, int) {
    cut.each(unit, [&](std::int64_t b, std::int64_t s, std::int64_t first, std::int64_t columns) {
      char* to = static_cast<char*>(mean.row(b, s)) + first * bytes;
      const std::int32_t end = ends[b * capacity + s], start = s > 0 ? ends[b * capacity + s - 1] : 0;
      if (start == end) return zero_row(to, mean.type, columns);
      float sums[kColumns] = {};
      const std::int32_t* order = orders + b * tokens;
      const std::int32_t last = ends[(b + 1) * capacity - 1] - 1;
      const auto token = [&](std::int32_t i) {
        return static_cast<const char*>(x.row(b, order[i < last ? i : last])) + first * bytes;
      };
      for (std::int32_t i = start; i < end; ++i) add_row(sums, token(i), token(i + kAhead), x.type, columns, 1.0f);
      const float count = static_cast<float>(end - start);
      for (std::int64_t i = 0; i < columns; ++i) sums[i] /= count;
      write_row(to, mean.type, sums, columns);
    });
  });
}
