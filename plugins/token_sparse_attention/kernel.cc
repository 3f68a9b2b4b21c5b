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
  const float scale = exponent_scale(call.number("scale"), w.depth);
  Tensor out = call.output("out", {batch, heads, tokens, w.values});

  auto* chosen = static_cast<Selection*>(call.scratch(static_cast<std::size_t>(batch * sets) * sizeof(Selection)));
  std::int64_t most = 0;
  for (std::int64_t set = 0; set < batch * sets; ++set) {
    chosen[set] = checked(index, count, set, tokens);
    most = chosen[set].count > most ? chosen[set].count : most;
  }
  const Packed packed = pack_all(
      call, w, q.type, batch * sets, most, [&](std::int64_t set) { return chosen[set].count; },
      [&](std::int64_t set, std::int64_t i) {
        const std::int64_t b = set / sets, g = set % sets * key_heads / sets, at = chosen[set].index[i];
        return Place{k.row(b, g, at), v.row(b, g, at)};
      });
  const auto set_of = [&](std::int64_t head) { return head * sets / heads; };  // of all batch rows
  attend_all(
      call, packed, q.type, scale, batch * heads, most,
      [&](std::int64_t head) { return Queries{set_of(head), chosen[set_of(head)].count, 1}; },
      [&](std::int64_t head, std::int64_t i) {
        return q.row(head / heads, head % heads, chosen[set_of(head)].index[i]);
      },
      // The rows of a block, and zeros before each of them; the last block also writes the zeros behind.
      [&](std::int64_t head, std::int64_t first, std::int64_t rows, const Block& block) {
        const Selection s = chosen[set_of(head)];
        const auto row = [&](std::int64_t at) { return out.row(head / heads, head % heads, at); };
        std::int64_t next = first == 0 ? 0 : s.index[first - 1] + 1;
        for (std::int64_t i = 0; i < rows; ++i) {
          const std::int64_t at = s.index[first + i];
          for (; next < at; ++next) zero_row(row(next), out.type, w.values);
          write_row(row(next++), out.type, block.rows + i * w.padded, w.values, 1.0f / block.total[i]);
        }
        if (first + rows == s.count)
          for (; next < tokens; ++next) zero_row(row(next), out.type, w.values);
      });
}
