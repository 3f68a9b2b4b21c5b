// GatherTokens: rows are copied, each by its index.
#include "half.h"

using namespace trtpass;
using namespace trtpass::TRTPASS_ISA;

TRTPASS_KERNEL(gather_tokens) {
  const Tensor &x = call.input("x"), &index = call.input("index");
  const std::int64_t batch = call.size("B"), tokens = call.size("S"), taken = call.size("C"), width = call.size("E");
  Tensor rows = call.output("rows", {batch, taken, width});

  constexpr std::int64_t kBytes = 64 * 1024;  // of a unit: fewer are copied sooner than another thread is there
  const std::int64_t row_bytes = width * static_cast<std::int64_t>(bytes_of(x.type)), all = batch * taken;
  const std::int64_t together = row_bytes < kBytes && row_bytes > 0 ? kBytes / row_bytes : 1;
  call.parallel((all + together - 1) / together, [&](std::int64_t unit, int) {
    const std::int64_t last = (unit + 1) * together < all ? (unit + 1) * together : all;
    for (std::int64_t at = unit * together; at < last; ++at) {
      const std::int64_t b = at / taken, i = index.ints()[at];
      void* to = rows.row(b, at % taken);
      if (i < 0 || i >= tokens)
        std::memset(to, 0, static_cast<std::size_t>(row_bytes));
      else
        std::memcpy(to, x.row(b, i), static_cast<std::size_t>(row_bytes));
    }
  });
}
