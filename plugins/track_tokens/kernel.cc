// TrackTokens: the place after of each token of the stream, then one look for each original token.
#include "call.h"

using namespace trtpass;

TRTPASS_KERNEL(track_tokens) {
  const std::int32_t *owner = call.input("owner").ints(), *slot = call.input("slot").ints();
  const std::int32_t *rest = call.input("rest").ints(), *target = call.input("target").ints();
  const std::int32_t* count = call.input("count").ints();
  const std::int64_t batch = call.size("B"), original = call.size("N"), tokens = call.size("S");
  const std::int64_t dropped = call.size("M"), targets = call.size("T");
  if ((targets == 0) != (dropped == 0) || (dropped != 0 && targets % dropped != 0))
    fail("TrackTokens has T = %lld for M = %lld; expected T = M, or a multiple of it", (long long)targets,
         (long long)dropped);
  const std::int64_t each = dropped == 0 ? 0 : targets / dropped;
  Tensor moved = call.output("moved", {batch, original});

  auto* places = static_cast<std::int32_t*>(call.scratch(static_cast<std::size_t>(batch * tokens) * 4));
  call.parallel(batch, [&](std::int64_t b, int) {
    std::int32_t* place = places + b * tokens;
    const std::int32_t* kept = slot + b * tokens;
    for (std::int64_t s = 0; s < tokens; ++s) place[s] = kept[s];
    for (std::int64_t m = 0; m < dropped; ++m) {
      const std::int64_t token = rest[b * dropped + m];
      if (token >= 0 && token < tokens && kept[token] < 0) place[token] = target[b * targets + m * each];
    }
    for (std::int64_t n = 0; n < original; ++n) {
      const std::int64_t from = owner[b * original + n];
      const std::int32_t to = from >= 0 && from < tokens ? place[from] : -1;
      moved.ints()[b * original + n] = to >= 0 && to < count[b] ? to : -1;
    }
  });
}
