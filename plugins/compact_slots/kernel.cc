// CompactSlots: one pass over the tokens of each owner, with a running count.
#include "call.h"

using namespace trtpass;

TRTPASS_KERNEL(compact_slots) {
  const std::int32_t *keep = call.input("keep").ints(), *held = call.input("held").ints();
  const std::int32_t* lengths = call.input("lengths").ints();
  const std::int64_t batch = call.size("B"), heads = call.size("Hkv"), tokens = call.size("S");
  Tensor slot = call.output("slot", {batch, heads, tokens}), kept = call.output("kept", {batch, heads});

  call.parallel(batch * heads, [&](std::int64_t owner, int) {
    const std::int64_t asked = lengths[owner / heads], length = asked < tokens ? asked : tokens;
    const std::int32_t* from = keep + owner * tokens;
    std::int32_t* to = slot.ints() + owner * tokens;
    std::uint32_t next = static_cast<std::uint32_t>(held[owner]);  // unsigned: it may wrap
    std::int64_t t = 0;
    for (; t < length; ++t) {
      const bool stays = from[t] != 0;
      to[t] = stays ? static_cast<std::int32_t>(next) : -1;
      next += stays;
    }
    for (; t < tokens; ++t) to[t] = -1;
    kept.ints()[owner] = static_cast<std::int32_t>(next);
  });
}
