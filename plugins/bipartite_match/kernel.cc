// BipartiteMatch: products of a block of rows with one strip of columns after the other; only the best so far is kept.
#include "cosine.h"

using namespace trtpass;
using namespace trtpass::TRTPASS_ISA;

namespace {

constexpr int kBlock = 96;  // rows of a unit; a multiple of kRows
constexpr float kNever = -__builtin_inff();

// The best product of a row so far and its column, lane by lane: lane l has seen columns l, l + kLanes, ...
struct Best {
  Vec value;
  IntVec column;
};

TRTPASS_INLINE void keep_best(Best& best, const float* products, const float* penalty, std::int32_t first,
                              int columns) {
  IntVec column;
  for (int i = 0; i < kLanes; ++i) column[i] = first + i;
  for (int j = 0; j < columns; j += kLanes, column += kLanes) {
    const Vec value = load(products + j) + load(penalty + j);
    const IntVec better = value > best.value;  // not where equal: the first of equals stays
    best.value = better ? value : best.value;
    best.column = better ? column : best.column;
  }
}

}  // namespace

TRTPASS_KERNEL(bipartite_match) {
  const Tensor &a = call.input("a"), &b = call.input("b"), &lengths = call.input("lengths");
  const std::int64_t batch = call.size("B"), tokens = call.size("S"), depth = call.size("E"), rows = call.size("R");
  Tensor match = call.output("match", {batch, tokens}), similarity = call.output("similarity", {batch, tokens});

  const auto length_of = [&](std::int64_t n) -> std::int64_t {
    const std::int64_t given = lengths.ints()[n];
    return given < 0 ? 0 : given > rows ? rows : given;
  };
  std::int64_t longest = 0;
  for (std::int64_t n = 0; n < batch; ++n) longest = length_of(n) > longest ? length_of(n) : longest;
  const std::int64_t padded = round_up(longest, kWord), pitch = pitch_of(depth), workers = call.workers();
  float* panels = call.scratch_floats(batch * padded * depth);
  float* penalties = call.scratch_floats(batch * padded);  // 0, or -infinity where a column is never chosen
  const std::int64_t floats = round_up(kBlock * pitch + kRows * kStrip, 16);  // rows, products
  float* memory = call.scratch_floats(workers * floats);
  static_assert(kBlock >= kLanes, "packing uses the memory of the rows");
  call.parallel(batch * (padded / kWord), [&](std::int64_t unit, int worker) {
    const std::int64_t n = unit % batch, first = unit / batch * kWord, left = length_of(n) - first;
    if (left <= 0) return;
    const int columns = static_cast<int>(left < kWord ? left : kWord);
    std::uint32_t directed = 0;
    pack_units(a.type, depth, columns, [&](int i) { return b.row(n, first + i); }, memory + worker * floats,
               panels + (n * padded + first) * depth, &directed);
    for (int i = 0; i < kWord; ++i) penalties[n * padded + first + i] = directed >> i & 1 ? 0.0f : kNever;
  });

  const int strip = strip_of(depth);
  const std::int64_t blocks = (tokens + kBlock - 1) / kBlock;
  call.parallel(batch * blocks, [&](std::int64_t unit, int worker) {
    const std::int64_t n = unit / blocks, top = unit % blocks * kBlock, length = length_of(n);
    const int count = static_cast<int>(tokens - top < kBlock ? tokens - top : kBlock);
    float* units = memory + worker * floats;
    float* products = units + kBlock * pitch;
    bool has[kBlock];
    Best best[kBlock];
    for (int i = 0; i < count; ++i) {
      has[i] = unit_row(units + i * pitch, a.row(n, top + i), a.type, depth, pitch);
      best[i] = {splat(kNever), IntVec{} + static_cast<std::int32_t>(rows)};
    }
    for (std::int64_t first = 0; first < length; first += strip) {
      const int columns = static_cast<int>(length - first < strip ? length - first : strip);
      for (int i = 0; i < count; i += kRows) {
        const int here = count - i < kRows ? count - i : kRows;
        multiply(here, units + i * pitch, pitch, panels + (n * padded + first) * depth, depth, columns, products);
        for (int j = 0; j < here; ++j)
          keep_best(best[i + j], products + j * kStrip, penalties + n * padded + first,
                    static_cast<std::int32_t>(first), columns);
      }
    }
    for (int i = 0; i < count; ++i) {
      const float value = has[i] ? largest(best[i].value) : kNever;
      std::int32_t column = static_cast<std::int32_t>(rows);
      for (int lane = 0; lane < kLanes && value > kNever; ++lane)
        if (best[i].value[lane] == value && best[i].column[lane] < column) column = best[i].column[lane];
      match.ints()[n * tokens + top + i] = column;
      similarity.floats()[n * tokens + top + i] = value;
    }
  });
}
