// What `fail` throws; kernels see only `fail`.
#pragma once

#include <stdexcept>

namespace trtpass {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

}  // namespace trtpass
