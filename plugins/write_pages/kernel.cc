// WritePages: rows go to their places, from all threads. Where the pool is its own output, nothing else is touched.
#include <cstring>

#include "call.h"

namespace {

constexpr std::int64_t kTokens = 64;        // of a unit
constexpr std::int64_t kCopied = 1 << 20;  // bytes of a unit, where the pool is copied

}  // namespace

using namespace trtpass;

TRTPASS_KERNEL(write_pages) {
  const Tensor &pages = call.input("pages"), &fresh = call.input("new");  // [P, Z, D], [B, Hkv, S, D]
  const std::int32_t *slot = call.input("slot").ints(), *table = call.input("page_table").ints();
  const std::int64_t pool = call.size("P"), page_size = call.size("Z"), width = call.size("D"), batch = call.size("B");
  const std::int64_t heads = call.size("Hkv"), tokens = call.size("S"), entries = call.size("M");
  const Tensor written = call.output("written", {pool, page_size, width});
  const std::int64_t bytes = width * static_cast<std::int64_t>(bytes_of(pages.type));  // of a row

  if (written.data != pages.data) {
    const std::int64_t all = pool * page_size * bytes;
    call.parallel((all + kCopied - 1) / kCopied, [&](std::int64_t unit, int) {
      const std::int64_t at = unit * kCopied, count = all - at < kCopied ? all - at : kCopied;
      std::memcpy(static_cast<char*>(written.data) + at, static_cast<const char*>(pages.data) + at,
                  static_cast<std::size_t>(count));
    });
  }

  const std::int64_t blocks = (tokens + kTokens - 1) / kTokens;  // of an owner
  call.parallel(batch * heads * blocks, [&](std::int64_t unit, int) {
    const std::int64_t owner = unit / blocks, first = unit % blocks * kTokens;
    const std::int64_t end = tokens - first < kTokens ? tokens : first + kTokens;
    for (std::int64_t t = first; t < end; ++t) {
      const std::int64_t at = slot[owner * tokens + t];
      if (at < 0 || at >= entries * page_size) continue;
      const std::int64_t page = table[owner * entries + at / page_size];
      if (page < 0 || page >= pool) continue;
      std::memcpy(written.row(page, at % page_size), fresh.row(owner / heads, owner % heads, t),
                  static_cast<std::size_t>(bytes));
    }
  });
}
