// MergeTokens: each row is summed by one thread, from its base over the tokens that join it in ascending order.
#include "segments.h"

using namespace trtpass;
using namespace trtpass::TRTPASS_ISA;

TRTPASS_KERNEL(merge_tokens) {
  const Tensor &base = call.input("base"), &base_size = call.input("base_size"), &x = call.input("x");
  const float* size = call.input("size").floats();
  const std::int32_t* target = call.input("target").ints();
  const std::int64_t batch = call.size("B"), rows = call.size("R"), tokens = call.size("S"), width = call.size("E");
  Tensor merged = call.output("merged", {batch, rows, width}), merged_size = call.output("merged_size", {batch, rows});

  auto* ends = static_cast<std::int32_t*>(call.scratch(static_cast<std::size_t>(batch * rows) * 4));
  auto* orders = static_cast<std::int32_t*>(call.scratch(static_cast<std::size_t>(batch * tokens) * 4));
  call.parallel(batch, [&](std::int64_t b, int) {
    sort_by_segment(target + b * tokens, tokens, rows, ends + b * rows, orders + b * tokens);
    std::int32_t i = 0;
    for (std::int64_t r = 0; r < rows; ++r) {
      float total = base_size.floats()[b * rows + r];
      for (; i < ends[b * rows + r]; ++i) total += size[b * tokens + orders[b * tokens + i]];
      merged_size.floats()[b * rows + r] = total;
    }
  });

  const Cut cut(rows, width);
  const std::int64_t bytes = static_cast<std::int64_t>(bytes_of(x.type));
  call.parallel(cut.units(batch), [&](std::int64_t unit, int) {
    cut.each(unit, [&](std::int64_t b, std::int64_t r, std::int64_t first, std::int64_t columns) {
      const auto part = [&](const Tensor& t, std::int64_t row) {
        return static_cast<char*>(t.row(b, row)) + first * bytes;
      };
      const float weight = merged_size.floats()[b * rows + r];
      if (weight == 0.0f) return zero_row(part(merged, r), merged.type, columns);
      float sums[kColumns];
      read_row(sums, part(base, r), base.type, columns, base_size.floats()[b * rows + r]);
      for (std::int32_t i = r > 0 ? ends[b * rows + r - 1] : 0; i < ends[b * rows + r]; ++i) {
        const std::int32_t* order = orders + b * tokens;
        const std::int32_t last = ends[(b + 1) * rows - 1] - 1, next = i + kAhead < last ? i + kAhead : last;
        add_row(sums, part(x, order[i]), part(x, order[next]), x.type, columns, size[b * tokens + order[i]]);
      }
      for (std::int64_t i = 0; i < columns; ++i) sums[i] /= weight;
      write_row(part(merged, r), merged.type, sums, columns);
    });
  });
}
