// The operator families of the `boosterbit` library. Each has a folder, and hands what it registers to register.cpp.
#pragma once

#include <torch/library.h>

namespace boosterbit {

// Adds a family's schemas, or its kernels for one dispatch key, to the library.
using Registration = void (*)(torch::Library&);

struct Family {
  Registration schemas;
  Registration cpu;
  Registration cuda;  // null in a build without CUDA, and where a family has no kernel for it
  Registration meta;
};

extern const Family agc_sgd_family;
extern const Family agc_adamw_family;
extern const Family group_norm_family;

}  // namespace boosterbit
