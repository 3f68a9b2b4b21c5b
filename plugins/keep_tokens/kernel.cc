// KeepTokens: a histogram of each row's scores gives the value at the cut; the mask is written in one pass over it.
#include "budget.h"
#include "select.h"

using namespace trtpass;
using namespace trtpass::TRTPASS_ISA;

namespace {

// Ranks that rise where the score falls, in 1 .. 2^32 - 2. Equal scores, -0 and 0 among them, have equal ranks; NaN
// ranks as -infinity. By the bits alone: a subnormal counts also where the processor is told to flush them to zero.
void rank_scores(std::uint32_t* ranks, const float* scores, std::int64_t n) {
  constexpr std::int32_t kInfinity = 0x7f800000;
  for (std::int64_t i = 0; i < n; ++i) {
    std::int32_t bits;
    std::memcpy(&bits, scores + i, 4);
    std::int32_t magnitude = bits & 0x7fffffff;
    const std::int32_t sign = magnitude > kInfinity ? -1 : bits >> 31;
    magnitude = magnitude < kInfinity ? magnitude : kInfinity;
    ranks[i] = 0x80000000u - static_cast<std::uint32_t>((magnitude ^ sign) - sign);
  }
}

// keep[0, n) = 1 for the `wanted` highest of scores[0, n), else 0; 0 <= wanted <= n.
void keep_highest(std::int32_t* keep, std::int64_t wanted, const float* scores, std::int64_t n, std::uint32_t* ranks,
                  const CutMemory& memory) {
  if (wanted == 0 || wanted == n) {
    for (std::int64_t i = 0; i < n; ++i) keep[i] = wanted != 0;
    return;
  }
  rank_scores(ranks, scores, n);
  // The sign, the exponent and two bits of the fraction.
  const Cut cut = find_cut<One>(ranks, n, wanted, [](std::uint32_t rank) { return rank >> 21; }, memory);
  std::int64_t surplus = -wanted;  // ties that are too many: the last ones
  for (std::int64_t i = 0; i < n; ++i) {
    keep[i] = ranks[i] <= cut.value;
    surplus += keep[i];
  }
  for (std::int64_t i = n - 1; surplus > 0; --i)
    if (ranks[i] == cut.value) {
      keep[i] = 0;
      --surplus;
    }
}

}  // namespace

TRTPASS_KERNEL(keep_tokens) {
  const float* score = call.input("score").floats();
  const std::int32_t* lengths = call.input("lengths").ints();
  const std::int64_t batch = call.size("B"), tokens = call.size("S");
  const Budget budget(call, "KeepTokens");
  Tensor keep = call.output("keep", {batch, tokens});

  const std::int64_t floats = (tokens + 15) / 16 * 16;
  auto* ranks = reinterpret_cast<std::uint32_t*>(call.scratch_floats(floats * call.workers()));
  void* memory = call.scratch(static_cast<std::size_t>(CutMemory::bytes(tokens) * call.workers()));
  call.parallel(batch, [&](std::int64_t b, int worker) {
    const std::int64_t given = lengths[b], length = given < 0 ? 0 : given < tokens ? given : tokens;
    std::int32_t* to = keep.ints() + b * tokens;
    keep_highest(to, budget.kept(length), score + b * tokens, length, ranks + worker * floats,
                 CutMemory(memory, worker, tokens));
    for (std::int64_t i = length; i < tokens; ++i) to[i] = 0;
  });
}
