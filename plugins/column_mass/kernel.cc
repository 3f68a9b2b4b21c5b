// ColumnMass: softmax statistics and column sums in one pass over the scores of the last W rows, never S x S.
//
// A unit takes kGroup of a head's window rows over all keys. Scores become weights 2^(score - m) a step of kKeys keys at a
// time, m being the largest score of a row in that step only; when all steps are done each row's true maximum and total
// are known, and with them one factor for each row and step that corrects its weights while columns are added up.
#include "attention.h"

using namespace trtpass;
using namespace trtpass::TRTPASS_ISA;

namespace {

constexpr int kGroup = 24;  // rows of a unit; its weights, kGroup x S, stay in the second-level cache up to 8K tokens

// What one worker needs.
struct Work {
  float* queries;  // [kGroup][D], scaled by scale * log2(e)
  float* weights;  // [steps][kGroup][kKeys]
  float* largest;  // [steps][kGroup], then the factors
  float* total;    // [steps][kGroup]

  static std::int64_t floats(std::int64_t depth, std::int64_t steps) {
    return round_up(kGroup * depth, 16) + steps * kGroup * (kKeys + 2);
  }
  Work(std::int64_t depth, std::int64_t steps, float* memory)
      : queries(memory),
        weights(queries + round_up(kGroup * depth, 16)),
        largest(weights + steps * kGroup * kKeys),
        total(largest + steps * kGroup) {}
};

// scores[0, kKeys) to weights 2^(score - m), of which the first `seen` count and the others are 0.
TRTPASS_INLINE void weigh(float* scores, std::int64_t seen, float& maximum, float& total) {
  const std::int64_t end = round_up(seen, kLanes);
  for (std::int64_t j = seen; j < end; ++j) scores[j] = kNothing;
  Vec high = splat(kNothing);
  for (std::int64_t j = 0; j < end; j += kLanes) high = larger(high, load(scores + j));
  maximum = largest(high);
  const Vec base = splat(maximum == kNothing ? 0.0f : maximum);
  Vec added = {};
  for (std::int64_t j = 0; j < end; j += kLanes) {
    const Vec weight = exp2(load(scores + j) - base);
    store(scores + j, weight);
    added += weight;
  }
  total = sum(added);
  for (std::int64_t j = seen; j < kKeys; ++j) scores[j] = 0.0f;
}

// Column sums of `rows` rows, of which row i sees the first visible + i keys: columns[0, end).
void add_up(const Work& work, std::int64_t depth, std::int64_t rows, std::int64_t visible, const float* keys,
            float* columns, std::int64_t end) {
  const std::int64_t all = visible + rows - 1, steps = (all + kKeys - 1) / kKeys;
  for (std::int64_t step = 0; step < steps; ++step) {
    float* scores = work.weights + step * kGroup * kKeys;
    const std::int64_t start = step * kKeys, n = all - start < kKeys ? all - start : kKeys;
    for (std::int64_t first = 0; first < rows; first += kRows) {
      const float* queries = work.queries + first * depth;
      const float* panel = keys + start * depth;
      for (std::int64_t p = 0; p < n; p += kPanel, panel += kPanel * depth)
        tile<kRows, 2, false>(queries, depth, panel, kPanel, depth, scores + first * kKeys + p, kKeys);
    }
    for (std::int64_t i = 0; i < rows; ++i) {
      std::int64_t seen = visible + i - start;
      seen = seen < 0 ? 0 : seen < n ? seen : n;
      weigh(scores + i * kKeys, seen, work.largest[step * kGroup + i], work.total[step * kGroup + i]);
    }
  }
  for (std::int64_t i = 0; i < rows; ++i) {
    float maximum = kNothing, total = 0.0f;
    for (std::int64_t step = 0; step < steps; ++step)
      if (work.largest[step * kGroup + i] > maximum) maximum = work.largest[step * kGroup + i];
    for (std::int64_t step = 0; step < steps; ++step) {
      float& factor = work.largest[step * kGroup + i];
      const float below = factor == kNothing && maximum != kNothing ? kNothing : factor - maximum;
      factor = below == kNothing ? 0.0f : exp2(splat(maximum == kNothing ? 0.0f : below))[0];
      total += work.total[step * kGroup + i] * factor;
    }
    for (std::int64_t step = 0; step < steps; ++step) work.largest[step * kGroup + i] /= total;
  }
  for (std::int64_t step = 0; step < steps && step * kKeys < end; ++step) {
    const float* weights = work.weights + step * kGroup * kKeys;
    const float* factors = work.largest + step * kGroup;
    for (std::int64_t j = 0; j < kKeys; j += 2 * kLanes) {
      Vec low = {}, high = {};
      for (std::int64_t i = 0; i < rows; ++i) {
        low += load(weights + i * kKeys + j) * factors[i];
        high += load(weights + i * kKeys + j + kLanes) * factors[i];
      }
      store(columns + step * kKeys + j, low);
      store(columns + step * kKeys + j + kLanes, high);
    }
  }
  for (std::int64_t j = round_up(all, kKeys); j < end; ++j) columns[j] = 0.0f;
}

// mass[0, tokens): the groups' columns added up, averaged over `pool` neighbours within [0, end), 0 from there on.
void finish(float* mass, std::int64_t tokens, float* columns, std::int64_t groups, std::int64_t stride, std::int64_t end,
            std::int64_t pool) {
  for (std::int64_t g = 1; g < groups; ++g)
    for (std::int64_t j = 0; j < end; ++j) columns[j] += columns[g * stride + j];
  const std::int64_t reach = pool / 2;
  const float share = 1.0f / static_cast<float>(pool);
  for (std::int64_t j = 0; j < end; ++j) mass[j] = columns[j];
  for (std::int64_t d = 1; d <= reach && d < end; ++d) {
    for (std::int64_t j = d; j < end; ++j) mass[j] += columns[j - d];
    for (std::int64_t j = 0; j + d < end; ++j) mass[j] += columns[j + d];
  }
  for (std::int64_t j = 0; j < end; ++j) mass[j] *= share;
  zero_row(mass + end, Type::float32, tokens - end);
}

}  // namespace

TRTPASS_KERNEL(column_mass) {
  const Tensor &q = call.input("q"), &k = call.input("k");
  const std::int32_t* lengths = call.input("lengths").ints();
  const std::int64_t batch = call.size("B"), heads = call.size("H"), key_heads = call.size("Hkv");
  const std::int64_t tokens = call.size("S"), depth = call.size("D");
  const std::int64_t window = call.integer("window"), pool = call.integer("pool");
  const bool prefix = call.integer("prefix") != 0;
  if (key_heads < 1 || heads % key_heads)
    fail("ColumnMass has H = %lld and Hkv = %lld; expected a multiple", (long long)heads, (long long)key_heads);
  if (window < 1) fail("ColumnMass.window is %lld; expected at least 1", (long long)window);
  if (pool < 1 || pool % 2 == 0) fail("ColumnMass.pool is %lld; expected an odd number, at least 1", (long long)pool);
  for (std::int64_t b = 0; b < batch; ++b)
    if (lengths[b] < 0 || lengths[b] > tokens)
      fail("ColumnMass.lengths holds %d; expected 0 to S = %lld", lengths[b], (long long)tokens);
  const float scale = exponent_scale(call.number("scale"), depth);
  Tensor mass = call.output("mass", {batch, heads, tokens});

  const std::int64_t owners = batch * key_heads, panels = (tokens + kPanel - 1) / kPanel;
  const std::int64_t key_floats = panels * kPanel * depth;
  float* keys = call.scratch_floats(owners * key_floats);
  constexpr int kTogether = 8;  // panels of a unit of packing
  call.parallel(owners * ((panels + kTogether - 1) / kTogether), [&](std::int64_t unit, int) {
    const std::int64_t owner = unit % owners, b = owner / key_heads, g = owner % key_heads, length = lengths[b];
    const auto row = [&](std::int64_t i) { return k.row(b, g, i); };
    for (std::int64_t p = unit / owners * kTogether, end = p + kTogether; p < end && p * kPanel < length; ++p)
      pack_keys(depth, k.type, p * kPanel, length, row, keys + owner * key_floats);
  });

  const std::int64_t rows_most = window < tokens ? window : tokens, groups = (rows_most + kGroup - 1) / kGroup;
  const std::int64_t steps = (tokens + kKeys - 1) / kKeys, stride = steps * kKeys;
  const std::int64_t floats = round_up(Work::floats(depth, steps), 16);
  float* memory = call.scratch_floats(floats * call.workers());
  float* columns = call.scratch_floats(batch * heads * groups * stride);
  const auto rows_of = [&](std::int64_t b) { return window < lengths[b] ? window : std::int64_t{lengths[b]}; };
  const auto end_of = [&](std::int64_t b) { return prefix ? lengths[b] - rows_of(b) : std::int64_t{lengths[b]}; };
  call.parallel(batch * heads * groups, [&](std::int64_t unit, int worker) {
    const std::int64_t row = unit / groups, b = row / heads, h = row % heads, first = unit % groups * kGroup;
    const std::int64_t left = rows_of(b) - first, rows = left < kGroup ? left : kGroup;
    if (rows <= 0 || end_of(b) <= 0) return;
    const Work work(depth, steps, memory + worker * floats);
    const std::int64_t position = lengths[b] - rows_of(b) + first;  // of the unit's first row
    for (std::int64_t i = 0; i < rows; ++i)
      read_row(work.queries + i * depth, q.row(b, h, position + i), q.type, depth, scale);
    for (std::int64_t i = rows * depth; i < kGroup * depth; ++i) work.queries[i] = 0.0f;
    add_up(work, depth, rows, position + 1, keys + (b * key_heads + h * key_heads / heads) * key_floats,
           columns + unit * stride, end_of(b));
  });
  call.parallel(batch * heads, [&](std::int64_t row, int) {
    const std::int64_t b = row / heads;
    finish(mass.floats() + row * tokens, tokens, columns + row * groups * stride,
           (rows_of(b) + kGroup - 1) / kGroup, stride, end_of(b), pool);
  });
}
