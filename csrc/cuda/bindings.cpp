#include <pybind11/pybind11.h>

#include "device.h"
#include "operators.h"

namespace py = pybind11;

namespace {

py::list devices() {
  py::list result;
  for (const auto& device : bclip::cuda::devices()) {
    result.append(py::dict(py::arg("name") = device.name,
                           py::arg("capability") = py::make_tuple(device.major, device.minor),
                           py::arg("memory_bytes") = device.memory_bytes, py::arg("refusal") = device.refusal));
  }
  return result;
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
  module.doc() = "CUDA kernels on raw pointers; the wrappers in bclip_fast.ops make every check.";
  module.attr("architectures") = BCLIP_CUDA_ARCHS;
  module.def("devices", &devices, "A dict per CUDA device; RuntimeError with the driver's reason where there is none.");
  bclip::cuda::define_operators(module);
}
