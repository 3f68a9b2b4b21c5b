// RestoreTokens: rows are copied; a token without an owner looks for the nearest source around it, row by row of the grid.
#include "half.h"

using namespace trtpass;
using namespace trtpass::TRTPASS_ISA;

namespace {

// The sources [0, n), ascending tokens, of a grid that starts at token `fixed`.
struct Sources {
  const std::int32_t* token;
  std::int64_t n, fixed, width;

  // The source with the smallest squared distance from a token, the lowest of equals; n > 0.
  std::int32_t nearest(std::int64_t from) const {
    const std::int64_t place = from - fixed, row = place / width, column = place % width;
    std::int64_t first = 0;  // sources before the token
    for (std::int64_t high = n; first < high;) {
      const std::int64_t middle = first + (high - first) / 2;
      if (token[middle] < from)
        first = middle + 1;
      else
        high = middle;
    }
    std::int64_t best = -1, found = -1;
    const auto closer = [&](std::int64_t i, bool or_equal) {  // false where no further source can be nearer
      const std::int64_t other = token[i] - fixed, down = row - other / width, along = column - other % width;
      if (best >= 0 && (or_equal ? down * down > best : down * down >= best)) return false;
      const std::int64_t distance = down * down + along * along;
      if (best < 0 || (or_equal ? distance <= best : distance < best)) {
        best = distance;
        found = i;
      }
      return true;
    };
    for (std::int64_t i = first - 1; i >= 0 && closer(i, true);) --i;
    for (std::int64_t i = first; i < n && closer(i, false);) ++i;
    return token[found];
  }
};

}  // namespace

TRTPASS_KERNEL(restore_tokens) {
  const Tensor& x = call.input("x");                       // [B, C, E]
  const std::int32_t* owners = call.input("owner").ints();  // [B, S]
  const std::int64_t batch = call.size("B"), places = call.size("C"), tokens = call.size("S"), wide = call.size("E");
  const std::int64_t fixed = call.integer("fixed"), width = call.integer("width");
  if (fixed < 0 || width < 0)
    fail("RestoreTokens has fixed=%lld, width=%lld; expected 0 or more", (long long)fixed, (long long)width);
  Tensor rows = call.output("rows", {batch, tokens, wide});

  const auto owned = [&](std::int64_t b, std::int64_t n) {
    const std::int64_t owner = owners[b * tokens + n];
    return owner >= 0 && owner < places;
  };
  auto* sources = static_cast<std::int32_t*>(call.scratch(static_cast<std::size_t>(batch * tokens) * 4));
  auto* numbers = static_cast<std::int64_t*>(call.scratch(static_cast<std::size_t>(batch) * 8));
  for (std::int64_t b = 0; b < batch; ++b) {
    std::int64_t number = 0;
    for (std::int64_t n = fixed; n < tokens; ++n)
      if (owned(b, n)) sources[b * tokens + number++] = static_cast<std::int32_t>(n);
    numbers[b] = number;
  }

  constexpr std::int64_t kTokens = 16;  // of a unit
  const std::int64_t blocks = (tokens + kTokens - 1) / kTokens;
  const std::size_t bytes = static_cast<std::size_t>(wide) * bytes_of(x.type);
  call.parallel(batch * blocks, [&](std::int64_t unit, int) {
    const std::int64_t b = unit / blocks, first = unit % blocks * kTokens;
    const Sources near{sources + b * tokens, numbers[b], fixed, width == 0 ? 1 : width};  // a line is one column
    for (std::int64_t n = first; n < first + kTokens && n < tokens; ++n) {
      const bool filled = !owned(b, n) && n >= fixed && near.n > 0;
      const std::int64_t from = filled ? near.nearest(n) : n;
      if (filled || owned(b, n))
        std::memcpy(rows.row(b, n), x.row(b, owners[b * tokens + from]), bytes);
      else
        zero_row(rows.row(b, n), rows.type, wide);
    }
  });
}
