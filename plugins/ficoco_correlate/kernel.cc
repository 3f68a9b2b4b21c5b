// FicocoCorrelate: of each dropped token the best columns so far lie in a heap, the worst of them on top.
#include "vec.h"

#include "call.h"

using namespace trtpass;
using namespace trtpass::TRTPASS_ISA;

namespace {

constexpr float kMost = 1e30f;  // of an affinity, so that no sum overflows

// k values and their slots, in the outputs themselves.
struct Heap {
  float* value;
  std::int32_t* slot;

  bool worse(std::int64_t i, std::int64_t j) const {
    return value[i] < value[j] || (value[i] == value[j] && slot[i] > slot[j]);
  }
  void swap(std::int64_t i, std::int64_t j) const {
    const float v = value[i];
    const std::int32_t s = slot[i];
    value[i] = value[j], slot[i] = slot[j];
    value[j] = v, slot[j] = s;
  }
  // Entry i of n goes down until no entry below it is worse.
  void sink(std::int64_t i, std::int64_t n) const {
    for (;;) {
      std::int64_t worst = i;
      for (std::int64_t below = 2 * i + 1; below <= 2 * i + 2 && below < n; ++below)
        if (worse(below, worst)) worst = below;
      if (worst == i) return;
      swap(i, worst);
      i = worst;
    }
  }
};

float clipped(float x) {  // NaN is the lowest
  return x > -kMost ? x < kMost ? x : kMost : -kMost;
}

// The k highest of the columns [0, t), highest first, the lowest slot of equals; 0 < k <= t.
void select(const Heap& heap, std::int64_t k, const float* affinity, const std::int32_t* token, const std::int32_t* slot,
            std::int64_t t) {
  for (std::int64_t i = 0; i < k; ++i) {
    heap.value[i] = clipped(affinity[token[i]]);
    heap.slot[i] = slot[i];
  }
  for (std::int64_t i = k / 2; i-- > 0;) heap.sink(i, k);
  for (std::int64_t i = k; i < t; ++i) {
    const float x = clipped(affinity[token[i]]);
    if (x <= heap.value[0]) continue;  // of equals the lower slot is there already
    heap.value[0] = x;
    heap.slot[0] = slot[i];
    heap.sink(0, k);
  }
  for (std::int64_t n = k - 1; n > 0; --n) {
    heap.swap(0, n);
    heap.sink(0, n);
  }
}

}  // namespace

TRTPASS_KERNEL(ficoco_correlate) {
  const float* affinity = call.input("affinity").floats();  // [B, M, S]
  const std::int32_t *index = call.input("index").ints(), *candidate = call.input("candidate").ints();
  const std::int32_t* count = call.input("count").ints();
  const std::int64_t batch = call.size("B"), dropped = call.size("M"), tokens = call.size("S"), slots = call.size("C");
  const std::int64_t eps = call.integer("eps_permille");
  if (eps < 0 || eps > 999) fail("FicocoCorrelate.eps_permille is %lld; expected 0 to 999", (long long)eps);
  const auto number_of = [&](std::int64_t columns) {  // k
    return columns == 0 ? 0 : columns - ((columns - 1) * eps + 999) / 1000;
  };
  const std::int64_t each = number_of(slots);
  Tensor target = call.output("target", {batch, dropped * each}), weight = call.output("weight", {batch, dropped * each});

  auto* token = static_cast<std::int32_t*>(call.scratch(static_cast<std::size_t>(batch * slots) * 4));
  auto* slot = static_cast<std::int32_t*>(call.scratch(static_cast<std::size_t>(batch * slots) * 4));
  auto* columns = static_cast<std::int64_t*>(call.scratch(static_cast<std::size_t>(batch) * 8));
  for (std::int64_t b = 0; b < batch; ++b) {
    std::int64_t t = 0;
    for (std::int64_t c = 0; c < slots && c < count[b]; ++c) {
      const std::int64_t kept = index[b * slots + c];
      if (kept < 0 || kept >= tokens || candidate[b * tokens + kept] == 0) continue;
      token[b * slots + t] = static_cast<std::int32_t>(kept);
      slot[b * slots + t++] = static_cast<std::int32_t>(c);
    }
    columns[b] = t;
  }

  constexpr std::int64_t kTogether = 8;  // dropped tokens of a unit
  const std::int64_t blocks = (dropped + kTogether - 1) / kTogether;
  call.parallel(batch * blocks, [&](std::int64_t unit, int) {
    const std::int64_t b = unit / blocks, first = unit % blocks * kTogether, k = number_of(columns[b]);
    for (std::int64_t m = first; m < first + kTogether && m < dropped; ++m) {
      const std::int64_t row = b * dropped + m;
      const Heap heap{weight.floats() + row * each, target.ints() + row * each};
      if (k > 0)
        select(heap, k, affinity + row * tokens, token + b * slots, slot + b * slots, columns[b]);
      float total = 0.0f;
      for (std::int64_t i = 0; i < k; ++i) total += heap.value[i];
      const bool proper = total > 0.0f;
      for (std::int64_t i = 0; i < k; ++i)
        heap.value[i] = proper ? heap.value[i] / total : 1.0f / static_cast<float>(k);
      for (std::int64_t i = k; i < each; ++i) {
        heap.value[i] = 0.0f;
        heap.slot[i] = static_cast<std::int32_t>(slots);
      }
    }
  });
}
