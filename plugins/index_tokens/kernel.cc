// IndexTokens: one pass over the tokens of each row, with a running count of those that stay and of those that go.
#include "budget.h"

using namespace trtpass;
using namespace trtpass::TRTPASS_ISA;

TRTPASS_KERNEL(index_tokens) {
  const std::int32_t *keep = call.input("keep").ints(), *lengths = call.input("lengths").ints();
  const std::int64_t batch = call.size("B"), tokens = call.size("S");
  const std::int64_t capacity = Budget(call, "IndexTokens").kept(tokens), others = tokens - capacity;
  Tensor index = call.output("index", {batch, capacity}), count = call.output("count", {batch});
  Tensor rest = call.output("rest", {batch, others}), slot = call.output("slot", {batch, tokens});

  call.parallel(batch, [&](std::int64_t b, int) {
    const std::int64_t given = lengths[b], length = given < tokens ? given : tokens;
    std::int32_t *stays = index.ints() + b * capacity, *goes = rest.ints() + b * others;
    std::int32_t* place = slot.ints() + b * tokens;
    std::int64_t kept = 0, dropped = 0, t = 0;
    for (; t < length; ++t) {
      if (keep[b * tokens + t] != 0 && kept < capacity) {
        place[t] = static_cast<std::int32_t>(kept);
        stays[kept++] = static_cast<std::int32_t>(t);
      } else {
        place[t] = -1;
        if (dropped < others) goes[dropped++] = static_cast<std::int32_t>(t);
      }
    }
    count.ints()[b] = static_cast<std::int32_t>(kept);
    for (; t < tokens; ++t) place[t] = -1;
    for (; kept < capacity; ++kept) stays[kept] = static_cast<std::int32_t>(tokens);
    for (; dropped < others; ++dropped) goes[dropped] = static_cast<std::int32_t>(tokens);
  });
}
