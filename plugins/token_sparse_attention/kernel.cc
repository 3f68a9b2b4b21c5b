// TokenSparseAttention: each set's keys and values are packed through the index, then attended to like any others.
#include "attention.h"

using namespace trtpass;
using namespace trtpass::TRTPASS_ISA;

namespace {

struct Selection {
  const std::int32_t* index;
  std::int64_t count;
};

// The selection of a set, checked: its count within [0, C], its positions ascending within [0, S).
Selection checked(const Tensor& index, const Tensor& count, std::int64_t set, std::int64_t tokens) {
  const std::int64_t capacity = index.dims[2];
  const Selection found{index.ints() + set * capacity, count.ints()[set]};
  if (found.count < 0 || found.count > capacity)
    fail("TokenSparseAttention.count holds %lld; expected 0 to C = %lld", (long long)found.count, (long long)capacity);
  std::int32_t before = -1;
  for (std::int64_t i = 0; i < found.count; ++i) {
    if (found.index[i] <= before || found.index[i] >= tokens)
      fail("TokenSparseAttention.index holds %d after %d; expected ascending positions below S = %lld", found.index[i],
           before, (long long)tokens);
    before = found.index[i];
  }
  return found;
}

}  // namespace

TRTPASS_KERNEL(token_sparse_attention) {
  const Tensor &q = call.input("q"), &k = call.input("k"), &v = call.input("v");
  const Tensor &index = call.input("index"), &count = call.input("count");
  const std::int64_t batch = call.size("B"), heads = call.size("H"), key_heads = call.size("Hkv");
  const std::int64_t tokens = call.size("S"), sets = call.size("N");
  const Widths w(call.size("D"), call.size("Dv"));
  if (key_heads < 1 || heads % key_heads)
    fail("TokenSparseAttention has H = %lld and Hkv = %lld; expected a multiple", (long long)heads, (long long)key_heads);
  if (sets != heads && sets != key_heads)
    fail("TokenSparseAttention.index has N = %lld; expected N = H = %lld or N = Hkv = %lld", (long long)sets,
         (long long)heads, (long long)key_heads);
  const float given = call.number("scale");
  const float scale = (given != 0.0f ? given : 1.0f / __builtin_sqrtf(static_cast<float>(w.depth))) * kLog2e;
  Tensor out = call.output("out", {batch, heads, tokens, w.values});

  auto* chosen = static_cast<Selection*>(call.scratch(static_cast<std::size_t>(batch * sets) * sizeof(Selection)));
  std::int64_t most = 0;
  for (std::int64_t set = 0; set < batch * sets; ++set) {
    chosen[set] = checked(index, count, set, tokens);
    most = chosen[set].count > most ? chosen[set].count : most;
  }
  const std::int64_t panels = (most + kPanel - 1) / kPanel;
  float* keys = call.scratch_floats(batch * sets * w.key_floats(most));
  float* values = call.scratch_floats(batch * sets * w.value_floats(most));
  constexpr int kTogether = 8;  // panels of a unit of packing
  call.parallel(batch * sets * ((panels + kTogether - 1) / kTogether), [&](std::int64_t unit, int) {
    const std::int64_t set = unit % (batch * sets), b = set / sets, g = set % sets * key_heads / sets;
    const Selection s = chosen[set];
    const auto place = [&](std::int64_t i) { return Place{k.row(b, g, s.index[i]), v.row(b, g, s.index[i])}; };
    for (std::int64_t p = unit / (batch * sets) * kTogether, end = p + kTogether; p < end && p * kPanel < s.count; ++p)
      pack_panel(w, q.type, p * kPanel, s.count, place, keys + set * w.key_floats(most),
                 values + set * w.value_floats(most));
  });

  // Head by head, so that its keys and values stay in the caches; of a head the last blocks first: they see most keys, and
  // what is left at the end should be small.
  const std::int64_t blocks = most == 0 ? 1 : (most + kBlock - 1) / kBlock;
  const std::int64_t floats = round_up(Block::floats(w), 16);
  float* memory = call.scratch_floats(floats * call.workers());
  call.parallel(batch * heads * blocks, [&](std::int64_t unit, int worker) {
    const std::int64_t b = unit / blocks / heads, h = unit / blocks % heads, set = b * sets + h * sets / heads;
    const Selection s = chosen[set];
    const std::int64_t mine = s.count == 0 ? 1 : (s.count + kBlock - 1) / kBlock;
    const std::int64_t number = blocks - 1 - unit % blocks;
    if (number >= mine) return;
    const std::int64_t first = number * kBlock, rows = s.count - first < kBlock ? s.count - first : kBlock;
    const Block block(w, memory + worker * floats);
    for (std::int64_t i = 0; i < rows; ++i)
      read_row(block.queries + i * w.depth, q.row(b, h, s.index[first + i]), q.type, w.depth, scale);
    for (std::int64_t i = rows * w.depth; i < round_up(rows, kRows) * w.depth; ++i) block.queries[i] = 0.0f;
    if (rows > 0)
      attend(w, block, rows, first + 1, keys + set * w.key_floats(most), values + set * w.value_floats(most));
    // The rows of this block, and zeros before each of them; the last block also writes the zeros behind.
    std::int64_t next = first == 0 ? 0 : s.index[first - 1] + 1;
    for (std::int64_t i = 0; i < rows; ++i) {
      const std::int64_t at = s.index[first + i];
      for (; next < at; ++next) zero_row(out.row(b, h, next), out.type, w.values);
      write_row(out.row(b, h, next++), out.type, block.rows + i * w.padded, w.values, 1.0f / block.total[i]);
    }
    if (number == mine - 1)
      for (; next < tokens; ++next) zero_row(out.row(b, h, next), out.type, w.values);
  });
}
