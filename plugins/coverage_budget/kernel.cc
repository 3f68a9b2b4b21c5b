// CoverageBudget: columns' shares of the mass as integers, on all threads; then each row's cut, by a histogram of them.
#include "call.h"
#include "select.h"

using namespace trtpass;
using namespace trtpass::TRTPASS_ISA;

namespace {

constexpr std::int64_t kMillion = 1000000;

// share[i] += round_half_even(clip(mass[i], 0, limit) * unit). There is no sum of floats that could be contracted with
// the product, and the rounded product is below 2^31.
void add_shares(std::uint32_t* share, const float* mass, std::int64_t n, float limit, float unit) {
  for (std::int64_t i = 0; i < n; ++i) {
    float x = mass[i] > 0.0f ? mass[i] : 0.0f;  // NaN too
    x = x < limit ? x : limit;
    share[i] += static_cast<std::uint32_t>(static_cast<std::int32_t>(__builtin_rintf(x * unit)));
  }
}

// The smallest number of columns whose lowest hold at least coverage_ppm millionths of the total.
std::int64_t pruned_columns(const std::uint32_t* share, std::int64_t n, std::int64_t coverage_ppm,
                            const CutMemory& memory) {
  const std::int64_t total = weigh<Itself>(share, n, 0xffffffffu);
  // ceil(total * ppm / 10^6), in two parts so that no product passes 2^63.
  const std::int64_t target =
      total / kMillion * coverage_ppm + (total % kMillion * coverage_ppm + kMillion - 1) / kMillion;
  if (target == 0) return 0;
  // Shares lie closer together the smaller they are: the exponent and six bits of the fraction of the share as a float,
  // from 0.5, which stands for zero, to below 2^31.
  const auto bucket = [](std::uint32_t value) {
    const float x = static_cast<float>(static_cast<std::int32_t>(value));
    std::int32_t bits;
    std::memcpy(&bits, &x, 4);
    const std::int32_t step = (bits >> 17) - (126 << 6);
    return static_cast<std::uint32_t>(step > 0 ? step : 0);
  };
  const Cut cut = find_cut<Itself>(share, n, target, bucket, memory);
  // Zeros weigh nothing, so the value at the cut is at least 1.
  return weigh<One>(share, n, cut.value - 1) + (target - cut.under + cut.value - 1) / cut.value;
}

}  // namespace

TRTPASS_KERNEL(coverage_budget) {
  const Tensor& mass = call.input("mass");  // [B, H, S]
  const std::int32_t* lengths = call.input("lengths").ints();
  const std::int64_t batch = call.size("B"), heads = call.size("H"), tokens = call.size("S");
  const std::int64_t coverage_ppm = call.integer("coverage_ppm"), window = call.integer("window");
  const std::int64_t min_tokens = call.integer("min_tokens");
  const bool prefix = call.integer("prefix") != 0;
  if (coverage_ppm < 0 || coverage_ppm >= kMillion)
    fail("CoverageBudget.coverage_ppm is %lld; expected 0 to 999999", (long long)coverage_ppm);
  if (window < 1 || min_tokens < 0)
    fail("CoverageBudget has window=%lld, min_tokens=%lld; expected window >= 1, min_tokens >= 0", (long long)window,
         (long long)min_tokens);
  std::int64_t votes;
  if (__builtin_mul_overflow(heads, window, &votes))
    fail("CoverageBudget has H = %lld, window=%lld; expected a product below 2^63", (long long)heads,
         (long long)window);
  for (std::int64_t b = 0; b < batch; ++b)
    if (lengths[b] < 0 || lengths[b] > tokens)
      fail("CoverageBudget.lengths holds %d; expected 0 to S = %lld", lengths[b], (long long)tokens);
  Tensor keep = call.output("keep", {batch});

  const auto dense = [&](std::int64_t b) { return lengths[b] - window <= min_tokens; };
  const auto domain = [&](std::int64_t b) { return lengths[b] - (prefix ? window : 0); };  // at least 1 unless dense
  auto* shares = static_cast<std::uint32_t*>(call.scratch(static_cast<std::size_t>(batch * tokens) * 4));  // [B, S]
  constexpr std::int64_t kColumns = 1024;  // of a unit: their shares stay in the first cache from head to head
  const std::int64_t blocks = (tokens + kColumns - 1) / kColumns;
  const float limit = static_cast<float>(window), unit = 1073741824.0f / static_cast<float>(votes);
  call.parallel(batch * blocks, [&](std::int64_t number, int) {
    const std::int64_t b = number / blocks, first = number % blocks * kColumns;
    if (dense(b) || first >= domain(b)) return;
    const std::int64_t columns = domain(b) - first < kColumns ? domain(b) - first : kColumns;
    std::uint32_t* share = shares + b * tokens + first;
    std::memset(share, 0, static_cast<std::size_t>(columns) * 4);
    for (std::int64_t h = 0; h < heads; ++h)
      add_shares(share, mass.floats() + (b * heads + h) * tokens + first, columns, limit, unit);
  });

  void* memory = call.scratch(static_cast<std::size_t>(CutMemory::bytes(tokens) * call.workers()));
  call.parallel(batch, [&](std::int64_t b, int worker) {
    std::int64_t kept = lengths[b];
    if (!dense(b)) {
      const CutMemory mine(memory, worker, tokens);
      const std::int64_t pruned = pruned_columns(shares + b * tokens, domain(b), coverage_ppm, mine);
      const std::int64_t inside = domain(b) - pruned;
      if (!prefix)
        kept = inside > 1 ? inside : 1;
      else if (pruned > 1)
        kept = (inside > min_tokens ? inside : min_tokens) + window;  // at most L, as the row is not dense
    }
    keep.ints()[b] = static_cast<std::int32_t>(kept);
  });
}
