// How many tokens of a row stay (plugins/_budget.py), from the attributes of an operator.
#pragma once

#include "call.h"

namespace trtpass::TRTPASS_ISA {

struct Budget {
  std::int64_t fixed, permille, rounding, drop;

  Budget(const Call& call, const char* name)
      : fixed(inside(call, name, "fixed", 1 << 20)),
        permille(inside(call, name, "permille", 1000)),
        rounding(inside(call, name, "rounding", 999)),
        drop(inside(call, name, "drop", 1 << 20)) {}

  std::int64_t kept(std::int64_t length) const {
    const std::int64_t first = length < fixed ? length : fixed;
    const std::int64_t number = first + ((length - first) * permille + rounding) / 1000 - drop;
    return number < 0 ? 0 : number < length ? number : length;
  }

 private:
  static std::int64_t inside(const Call& call, const char* name, const char* attribute, std::int64_t most) {
    const std::int64_t value = call.integer(attribute);
    if (value < 0 || value > most)
      fail("%s.%s is %lld; expected 0 to %lld", name, attribute, (long long)value, (long long)most);
    return value;
  }
};

}  // namespace trtpass::TRTPASS_ISA
