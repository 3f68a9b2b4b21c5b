// SelectTokens: a histogram of each row's scores gives the value at the cut; the index is written in one pass over it.
#include "call.h"
#include "select.h"

using namespace trtpass;
using namespace trtpass::TRTPASS_ISA;

namespace {

// Ranks that rise where the score falls, in 1 .. 2^32 - 2. Equal scores, -0 and 0 among them, have equal ranks; NaN
// ranks with the lowest. By the bits alone: a subnormal counts also where the processor is told to flush them to zero.
void rank_scores(std::uint32_t* ranks, const float* scores, std::int64_t n) {
  constexpr std::int32_t kInfinity = 0x7f800000, kLargest = 0x7effffff;  // half of the largest float
  for (std::int64_t i = 0; i < n; ++i) {
    std::int32_t bits;
    std::memcpy(&bits, scores + i, 4);
    std::int32_t magnitude = bits & 0x7fffffff;
    const std::int32_t sign = magnitude > kInfinity ? -1 : bits >> 31;
    magnitude = magnitude < kLargest ? magnitude : kLargest;
    ranks[i] = 0x80000000u - static_cast<std::uint32_t>((magnitude ^ sign) - sign);
  }
}

// The end of the shortest prefix of ranks[0, n) that holds `wanted` of them equal to `rank`.
std::int64_t end_of_ties(const std::uint32_t* ranks, std::int64_t n, std::uint32_t rank, std::int64_t wanted) {
  constexpr std::int64_t kStride = 256;
  std::int64_t at = 0;
  for (; at + kStride <= n; at += kStride) {
    std::uint32_t found = 0;
    for (std::int64_t i = 0; i < kStride; ++i) found += ranks[at + i] == rank;
    if (found >= wanted) break;
    wanted -= found;
  }
  for (; at < n && wanted > 0; ++at) wanted -= ranks[at] == rank;
  return at;
}

// to[0, wanted) = the positions start + i of the highest of scores[0, n), ascending; 0 <= wanted <= n.
void select_highest(std::int32_t* to, std::int64_t wanted, const float* scores, std::int64_t n, std::int64_t start,
                    std::uint32_t* ranks, const CutMemory& memory) {
  if (wanted == 0 || wanted == n) {
    for (std::int64_t i = 0; i < wanted; ++i) to[i] = static_cast<std::int32_t>(start + i);
    return;
  }
  rank_scores(ranks, scores, n);
  // The sign, the exponent and two bits of the fraction.
  const Cut cut = find_cut<One>(ranks, n, wanted, [](std::uint32_t rank) { return rank >> 21; }, memory);
  const std::int64_t ties = end_of_ties(ranks, n, cut.value, wanted - cut.under);
  const std::uint32_t first = static_cast<std::uint32_t>(start);
  auto* positions = reinterpret_cast<std::uint32_t*>(to);
  const std::int64_t done = filter(positions, wanted, nullptr, first, ranks, ties, 0, cut.value);
  filter(positions + done, wanted - done, nullptr, first + static_cast<std::uint32_t>(ties), ranks + ties, n - ties, 0,
         cut.value - 1);
}

}  // namespace

TRTPASS_KERNEL(select_tokens) {
  const Tensor& score = call.input("score");  // [B, N, S]
  const std::int32_t *keep = call.input("keep").ints(), *lengths = call.input("lengths").ints();
  const std::int64_t batch = call.size("B"), sets = call.size("N"), tokens = call.size("S");
  const std::int64_t window = call.integer("window"), permille = call.integer("max_keep_permille");
  if (permille < 1 || permille > 1000)
    fail("SelectTokens.max_keep_permille is %lld; expected 1 to 1000", (long long)permille);
  if (window < 0) fail("SelectTokens.window is %lld; expected 0 or more", (long long)window);
  for (std::int64_t b = 0; b < batch; ++b)
    if (lengths[b] < 0 || lengths[b] > tokens)
      fail("SelectTokens.lengths holds %d; expected 0 to S = %lld", lengths[b], (long long)tokens);
  const std::int64_t capacity = (tokens * permille + 999) / 1000;
  Tensor index = call.output("index", {batch, sets, capacity}), count = call.output("count", {batch, sets});

  const std::int64_t floats = (tokens + 15) / 16 * 16;
  auto* ranks = reinterpret_cast<std::uint32_t*>(call.scratch_floats(floats * call.workers()));
  void* memory = call.scratch(static_cast<std::size_t>(CutMemory::bytes(tokens) * call.workers()));
  call.parallel(batch * sets, [&](std::int64_t row, int worker) {
    const std::int64_t b = row / sets, length = lengths[b], room = capacity < length ? capacity : length;
    const std::int64_t number = keep[b] < 0 ? 0 : keep[b] < room ? keep[b] : room;
    const std::int64_t recent = window < length ? window : length, old = length - recent;
    const float* from = score.floats() + row * tokens;
    std::int32_t* to = index.ints() + row * capacity;
    const CutMemory mine(memory, worker, tokens);
    if (number < recent) {  // not even the protected fit: they compete
      select_highest(to, number, from + old, recent, old, ranks + worker * floats, mine);
    } else {
      select_highest(to, number - recent, from, old, 0, ranks + worker * floats, mine);
      for (std::int64_t i = 0; i < recent; ++i) to[number - recent + i] = static_cast<std::int32_t>(old + i);
    }
    for (std::int64_t i = number; i < capacity; ++i) to[i] = static_cast<std::int32_t>(tokens);
    count.ints()[row] = static_cast<std::int32_t>(number);
  });
}
