// CausalAttention: the dense form of the same kernel that attends among selected tokens.
#include "attention.h"

using namespace trtpass;
using namespace trtpass::TRTPASS_ISA;

TRTPASS_KERNEL(causal_attention) {
  const Tensor &q = call.input("q"), &k = call.input("k"), &v = call.input("v");
  const std::int64_t batch = call.size("B"), heads = call.size("H"), key_heads = call.size("Hkv");
  const std::int64_t tokens = call.size("S");
  const Widths w(call.size("D"), call.size("Dv"));
  if (key_heads < 1 || heads % key_heads)
    fail("CausalAttention has H = %lld and Hkv = %lld; expected a multiple", (long long)heads, (long long)key_heads);
  const float scale = exponent_scale(call.number("scale"), w.depth);
  Tensor out = call.output("out", {batch, heads, tokens, w.values});

  const Packed packed = pack_all(
      call, w, q.type, batch * key_heads, tokens, [&](std::int64_t) { return tokens; },
      [&](std::int64_t owner, std::int64_t i) {
        const std::int64_t b = owner / key_heads, g = owner % key_heads;
        return Place{k.row(b, g, i), v.row(b, g, i)};
      });
  attend_all(
      call, packed, q.type, scale, batch * heads, tokens,
      [&](std::int64_t head) { return Queries{head * key_heads / heads, tokens, 1}; },
      [&](std::int64_t head, std::int64_t i) { return q.row(head / heads, head % heads, i); },
      [&](std::int64_t head, std::int64_t first, std::int64_t rows, const Block& block) {
        for (std::int64_t i = 0; i < rows; ++i)
          write_row(out.row(head / heads, head % heads, first + i), out.type, block.rows + i * w.padded, w.values,
                    1.0f / block.total[i]);
      });
}
