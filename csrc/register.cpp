// The one place that registers: `import engine._C` loads the library, torch.ops.boosterbit has the operators.
#include <Python.h>

#include "families.h"

namespace boosterbit {
namespace {

const Family* const families[] = {&agc_sgd_family, &agc_adamw_family, &group_norm_family};

}  // namespace

TORCH_LIBRARY(boosterbit, m) {
  for (const Family* family : families) family->schemas(m);
}

TORCH_LIBRARY_IMPL(boosterbit, CPU, m) {
  for (const Family* family : families) family->cpu(m);
}

#ifdef BOOSTERBIT_CUDA
TORCH_LIBRARY_IMPL(boosterbit, CUDA, m) {
  for (const Family* family : families) {
    if (family->cuda) family->cuda(m);
  }
}
#endif

TORCH_LIBRARY_IMPL(boosterbit, Meta, m) {
  for (const Family* family : families) family->meta(m);
}

}  // namespace boosterbit

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT,
                               "_C",
                               "The compiled operators of BoosterBiT.",
                               -1,
                               nullptr,
                               nullptr,
                               nullptr,
                               nullptr,
                               nullptr};
  return PyModule_Create(&module);
}
