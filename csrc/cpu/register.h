// The Python bindings of the operators. Each operator's register.cpp adds its own to the module.
// The arguments are those of the contracts in csrc/*.h, with addresses for pointers.
#pragma once

#include <cstdint>

#include <pybind11/pybind11.h>

namespace bclip::bindings {

namespace py = pybind11;

// The pointer for an address from Python, where 0 stands for null.
template <typename T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void register_attention(py::module_& module);
void register_contrastive(py::module_& module);
void register_image(py::module_& module);
void register_matmul(py::module_& module);
void register_pointwise(py::module_& module);
void register_ranking(py::module_& module);

}  // namespace bclip::bindings
