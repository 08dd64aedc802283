// The Python bindings of the operators. Each operator's register.cpp adds its own to a module: to
// `_cuda`, and to the module of the emulator.
#pragma once

#include "csrc/bindings.h"

namespace bclip::cuda {

void register_attention(py::module_& module);
void register_contrastive(py::module_& module);
void register_image(py::module_& module);

inline void register_operators(py::module_& module) {
  register_attention(module);
  register_contrastive(module);
  register_image(module);
}

}  // namespace bclip::cuda
