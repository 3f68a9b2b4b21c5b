// BipartiteFilter: products of a block of even tokens with one strip of odd ones after the other; the best is kept.
#include "cosine.h"

using namespace trtpass;
using namespace trtpass::TRTPASS_ISA;

namespace {

constexpr int kBlock = 48;  // even tokens of a unit; a multiple of kRows
constexpr float kNever = -__builtin_inff();

}  // namespace

TRTPASS_KERNEL(bipartite_filter) {
  const Tensor& metric = call.input("metric");
  const std::int32_t *guarded = call.input("protected").ints(), *lengths = call.input("lengths").ints();
  const std::int64_t batch = call.size("B"), tokens = call.size("S"), depth = call.size("E");
  Tensor score = call.output("score", {batch, tokens}), candidate = call.output("candidate", {batch, tokens});

  const auto length_of = [&](std::int64_t b) -> std::int64_t {
    const std::int64_t given = lengths[b];
    return given < 0 ? 0 : given < tokens ? given : tokens;
  };
  std::int64_t longest = 0;
  for (std::int64_t b = 0; b < batch; ++b) longest = length_of(b) > longest ? length_of(b) : longest;
  const std::int64_t padded = round_up(longest / 2, kWord), pitch = pitch_of(depth);
  float* panels = call.scratch_floats(batch * padded * depth);
  float* penalties = call.scratch_floats(batch * padded);  // 0, or -infinity for an odd token that is no candidate
  const std::int64_t floats = round_up(kBlock * pitch + kRows * kStrip, 16);  // rows, products
  float* memory = call.scratch_floats(floats * call.workers());
  static_assert(kBlock >= kLanes, "packing uses the memory of the rows");
  call.parallel(batch * (padded / kWord), [&](std::int64_t unit, int worker) {
    const std::int64_t b = unit % batch, first = unit / batch * kWord, left = length_of(b) / 2 - first;
    if (left <= 0) return;
    std::uint32_t directed = 0;
    pack_units(metric.type, depth, static_cast<int>(left < kWord ? left : kWord),
               [&](int i) { return metric.row(b, 2 * (first + i) + 1); }, memory + worker * floats,
               panels + (b * padded + first) * depth, &directed);
    for (int i = 0; i < kWord; ++i) {
      const bool chosen = i < left && (directed >> i & 1) != 0 && guarded[b * tokens + 2 * (first + i) + 1] == 0;
      penalties[b * padded + first + i] = chosen ? 0.0f : kNever;
    }
  });

  const int strip = strip_of(depth);
  const std::int64_t evens = (tokens + 1) / 2, blocks = (evens + kBlock - 1) / kBlock;
  call.parallel(batch * blocks, [&](std::int64_t unit, int worker) {
    const std::int64_t b = unit / blocks, top = unit % blocks * kBlock, length = length_of(b), odds = length / 2;
    const int count = static_cast<int>(evens - top < kBlock ? evens - top : kBlock);
    float* units = memory + worker * floats;
    float* products = units + kBlock * pitch;
    bool chooses[kBlock];
    Vec best[kBlock];
    for (int i = 0; i < count; ++i) {
      const std::int64_t t = 2 * (top + i);
      chooses[i] = t < length && guarded[b * tokens + t] == 0 &&
                   unit_row(units + i * pitch, metric.row(b, t), metric.type, depth, pitch);
      if (!chooses[i]) zero_row(units + i * pitch, Type::float32, pitch);
      best[i] = splat(kNever);
    }
    for (std::int64_t first = 0; first < odds; first += strip) {
      const int columns = static_cast<int>(odds - first < strip ? odds - first : strip);
      for (int i = 0; i < count; i += kRows) {
        const int here = count - i < kRows ? count - i : kRows;
        multiply(here, units + i * pitch, pitch, panels + (b * padded + first) * depth, depth, columns, products);
        for (int j = 0; j < here; ++j)
          for (int c = 0; c < columns; c += kLanes)
            best[i + j] = larger(best[i + j], load(products + j * kStrip + c) + load(penalties + b * padded + first + c));
      }
    }
    for (int i = 0; i < count; ++i) {
      const std::int64_t t = 2 * (top + i);
      score.floats()[b * tokens + t] = chooses[i] ? -largest(best[i]) : -kNever;
      candidate.ints()[b * tokens + t] = 0;
      if (t + 1 >= tokens) continue;
      score.floats()[b * tokens + t + 1] = -kNever;
      candidate.ints()[b * tokens + t + 1] = t + 1 < length && guarded[b * tokens + t + 1] == 0;
    }
  });
}
