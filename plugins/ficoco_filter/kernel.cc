// FicocoFilter: sums of columns on all threads, rows in ascending order; then each window's best token by a hash table.
#include "vec.h"

#include "call.h"

using namespace trtpass;
using namespace trtpass::TRTPASS_ISA;

namespace {

constexpr std::int64_t kColumns = 64;  // of a unit: their sums stay in registers or the first cache

// sums[0, n) = the columns of the rows that are ranked.
void add_rows(float* sums, const float* prob, std::int64_t n, const std::uint8_t* ranked, std::int64_t tokens) {
  float total[kColumns] = {};
  for (std::int64_t j = 0; j < tokens; ++j) {
    if (ranked[j] == 0) continue;
    const float* row = prob + j * tokens;
    std::int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(total + i, load(total + i) + load(row + i));
    for (; i < n; ++i) total[i] += row[i];
  }
  for (std::int64_t i = 0; i < n; ++i) sums[i] = total[i];
}

// An open table from a window's number to its best token.
struct Windows {
  std::int32_t *window, *best;
  std::int64_t mask;  // entries less one

  static std::int64_t entries(std::int64_t tokens) {
    std::int64_t n = 16;
    while (n < 2 * tokens) n *= 2;
    return n;
  }
  // The entry of a window, -1 in `best` where it is new.
  std::int32_t& of(std::int32_t number) const {
    std::int64_t at = static_cast<std::int64_t>((static_cast<std::uint32_t>(number) * 0x9e3779b1u) >> 7) & mask;
    for (; best[at] >= 0 && window[at] != number; at = (at + 1) & mask) {
    }
    window[at] = number;
    return best[at];
  }
};

}  // namespace

TRTPASS_KERNEL(ficoco_filter) {
  const Tensor &prob = call.input("prob"), &cue = call.input("cue");
  const std::int32_t *place = call.input("place").ints(), *guarded = call.input("protected").ints();
  const std::int32_t* lengths = call.input("lengths").ints();
  const std::int64_t batch = call.size("B"), tokens = call.size("S");
  const std::int64_t permille = call.integer("weight_permille"), factor = call.integer("coefficient_permille");
  const std::int64_t width = call.integer("width"), window = call.integer("window");
  if (permille < 0 || permille > 1000 || factor < 1)
    fail("FicocoFilter has weight_permille=%lld, coefficient_permille=%lld; expected 0 to 1000, and 1 or more",
         (long long)permille, (long long)factor);
  constexpr std::int64_t kMost = 0x7fffffff;
  if (width < 0 || window < 1 || width > kMost || window > kMost || width * window > kMost)
    fail("FicocoFilter has width=%lld, window=%lld; expected 0 or more, 1 or more, product < 2^31", (long long)width,
         (long long)window);
  Tensor score = call.output("score", {batch, tokens});

  auto* ranked = static_cast<std::uint8_t*>(call.scratch(static_cast<std::size_t>(batch * tokens)));
  auto* numbers = static_cast<std::int64_t*>(call.scratch(static_cast<std::size_t>(batch) * 8));
  for (std::int64_t b = 0; b < batch; ++b) {
    std::int64_t number = 0;
    for (std::int64_t i = 0; i < tokens; ++i)
      number += ranked[b * tokens + i] = i < lengths[b] && guarded[b * tokens + i] == 0;
    numbers[b] = number;
  }
  const float weight = static_cast<float>(permille) / 1000.0f, coefficient = static_cast<float>(factor) / 1000.0f;
  const std::int64_t blocks = (tokens + kColumns - 1) / kColumns;
  call.parallel(batch * blocks, [&](std::int64_t unit, int) {
    const std::int64_t b = unit / blocks, first = unit % blocks * kColumns;
    const std::int64_t n = tokens - first < kColumns ? tokens - first : kColumns;
    float* to = score.floats() + b * tokens + first;
    const float* own = cue.floats() + b * tokens + first;
    add_rows(to, prob.floats() + b * tokens * tokens + first, n, ranked + b * tokens, tokens);
    const float each = weight / static_cast<float>(numbers[b] > 0 ? numbers[b] : 1);
    for (std::int64_t i = 0; i < n; ++i)
      to[i] = ranked[b * tokens + first + i] ? own[i] * (1.0f - weight) - to[i] * each : __builtin_inff();
  });
  if (width == 0) return;

  const std::int64_t entries = Windows::entries(tokens);
  auto* memory = static_cast<std::int32_t*>(call.scratch(static_cast<std::size_t>(2 * entries * call.workers()) * 4));
  call.parallel(batch, [&](std::int64_t b, int worker) {
    const Windows windows{memory + 2 * worker * entries, memory + (2 * worker + 1) * entries, entries - 1};
    for (std::int64_t i = 0; i < entries; ++i) windows.best[i] = -1;
    float* values = score.floats() + b * tokens;
    for (std::int64_t i = 0; i < tokens; ++i) {
      const std::int64_t at = place[b * tokens + i];
      if (at < 0 || !ranked[b * tokens + i]) continue;
      std::int32_t& best = windows.of(static_cast<std::int32_t>(at / (width * window) * width + at % width / window));
      // The first of equals stays; NaN goes to any number.
      if (best < 0 || values[i] < values[best] || (values[best] != values[best] && values[i] == values[i]))
        best = static_cast<std::int32_t>(i);
    }
    for (std::int64_t i = 0; i < entries; ++i) {
      if (windows.best[i] < 0) continue;
      float& value = values[windows.best[i]];
      value = value < 0.0f ? value * coefficient : value * (1.0f / coefficient);
    }
  });
}
