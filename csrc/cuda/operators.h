// The operators' entry points, which `_cuda` and the tests' `_cuda_host` have in common.
#pragma once

#include <pybind11/pybind11.h>

namespace bclip::cuda {

void define_operators(pybind11::module_& module);

}  // namespace bclip::cuda
