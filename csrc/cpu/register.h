// The Python bindings of the operators. Each operator's register.cpp adds its own to the module.
// The arguments are those of the contracts in csrc/*.h, with addresses for pointers.
#pragma once

#include "csrc/bindings.h"

namespace bclip::bindings {

void register_attention(py::module_& module);
void register_checksum(py::module_& module);
void register_contrastive(py::module_& module);
void register_image(py::module_& module);
void register_matmul(py::module_& module);
void register_pointwise(py::module_& module);
void register_ranking(py::module_& module);

}  // namespace bclip::bindings
