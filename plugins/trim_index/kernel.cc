// TrimIndex: rows are copied up to their count; the output is no longer than the largest of them.
#include "call.h"

using namespace trtpass;

TRTPASS_KERNEL(trim_index) {
  const std::int32_t *index = call.input("index").ints(), *count = call.input("count").ints();
  const std::int64_t batch = call.size("B"), places = call.size("S");
  std::int64_t longest = 0;
  for (std::int64_t b = 0; b < batch; ++b) {
    const std::int64_t held = count[b] < places ? count[b] : places;
    longest = held > longest ? held : longest;
  }
  std::int32_t* out = call.output("trimmed", {batch, longest}).ints();
  for (std::int64_t b = 0; b < batch; ++b) {
    for (std::int64_t t = 0; t < longest; ++t) {
      out[b * longest + t] = t < count[b] ? index[b * places + t] : static_cast<std::int32_t>(places);
    }
  }
}
