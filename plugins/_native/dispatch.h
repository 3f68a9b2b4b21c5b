// The instruction sets that the library was compiled for, best first (registry.cc, generated).
#pragma once

namespace trtpass {

extern const char* const kIsaNames[];
extern const int kIsaCount;

}  // namespace trtpass
