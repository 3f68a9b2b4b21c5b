// TrimIndex: rows are copied up to their count; the output is no longer than the largest of them.
#include <algorithm>

#include "call.h"

using namespace trtpass;

TRTPASS_KERNEL(trim_index) {
  const std::int32_t *index = call.input("index").ints(), *count = call.input("count").ints();
  const std::int64_t batch = call.size("B"), places = call.size("S");
  std::int64_t longest = 0;
  const auto held = [&](std::int64_t b) { return std::clamp<std::int64_t>(count[b], 0, places); };
  for (std::int64_t b = 0; b < batch; ++b) longest = std::max(longest, held(b));
  std::int32_t* out = call.output("trimmed", {batch, longest}).ints();
  for (std::int64_t b = 0; b < batch; ++b) {
    std::copy_n(index + b * places, held(b), out + b * longest);
    std::fill_n(out + b * longest + held(b), longest - held(b), static_cast<std::int32_t>(places));
  }
}
