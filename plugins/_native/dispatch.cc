// Which instruction set is used: the best that the processor and the operating system support, found at run time.
#include <cstring>

#include "call.h"
#include "dispatch.h"

namespace trtpass {

namespace {

int forced = -1;

bool supported(int isa) {
  const char* name = kIsaNames[isa];
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (std::strcmp(name, "avx512") == 0)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
  if (std::strcmp(name, "avx2") == 0)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#endif
  return std::strcmp(name, "portable") == 0;
}

int best() {
  for (int isa = 0; isa < kIsaCount; ++isa)
    if (supported(isa)) return isa;
  return kIsaCount - 1;
}

}  // namespace

Run chosen(const Entry& entry) {
  static const int found = best();
  return entry.run[forced >= 0 ? forced : found];
}

}  // namespace trtpass

extern "C" {

__attribute__((visibility("default"))) int trtpass_force_isa(const char* name) {
  if (name == nullptr) {
    trtpass::forced = -1;
    return 1;
  }
  for (int isa = 0; isa < trtpass::kIsaCount; ++isa)
    if (std::strcmp(trtpass::kIsaNames[isa], name) == 0 && trtpass::supported(isa)) {
      trtpass::forced = isa;
      return 1;
    }
  return 0;
}

__attribute__((visibility("default"))) const char* trtpass_isa() {
  return trtpass::kIsaNames[trtpass::forced >= 0 ? trtpass::forced : trtpass::best()];
}

__attribute__((visibility("default"))) const char* trtpass_fingerprint() { return TRTPASS_FINGERPRINT; }
}
