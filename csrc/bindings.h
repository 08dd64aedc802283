// The part that the Python bindings of both modules share.
#pragma once

#include <cstdint>

#include <pybind11/pybind11.h>

namespace bclip {

namespace py = pybind11;

// The pointer for an address from Python, where 0 stands for null.
template <typename T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace bclip
