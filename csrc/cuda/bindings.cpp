#include <pybind11/pybind11.h>

#include "csrc/cuda/device.h"
#include "csrc/cuda/operators.h"

namespace py = pybind11;

namespace {

py::dict device(int index) {
  const auto found = bclip::cuda::device(index);
  return py::dict(py::arg("name") = found.name, py::arg("capability") = py::make_tuple(found.major, found.minor),
                  py::arg("memory_bytes") = found.memory_bytes, py::arg("block_bytes") = found.block_bytes,
                  py::arg("refusal") = found.refusal);
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
  module.doc() = "CUDA kernels on raw pointers; the wrappers in bclip_fast.ops make every check.";
  module.attr("architectures") = BCLIP_CUDA_ARCHS;
  module.def("device", &device, "As in csrc/cuda/device.h; RuntimeError with the driver's reason where there is none.");
  module.def("count_devices", &bclip::cuda::count_devices);
  bclip::cuda::define_operators(module);
}
