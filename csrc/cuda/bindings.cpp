#include <pybind11/pybind11.h>

#include "csrc/cuda/device.h"
#include "csrc/cuda/register.h"

namespace py = pybind11;

namespace {

py::dict device(int index) {
  const auto properties = bclip::cuda::device(index);
  return py::dict(py::arg("name") = properties.name,
                  py::arg("capability") = py::make_tuple(properties.major, properties.minor),
                  py::arg("memory_bytes") = properties.memory_bytes,
                  py::arg("block_bytes") = properties.block_bytes,
                  py::arg("refusal") = properties.refusal);
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
  module.doc() = "CUDA kernels on raw pointers; the wrappers in bclip_fast.ops make every check.";
  module.attr("architectures") = BCLIP_CUDA_ARCHS;
#ifdef BCLIP_CUTLASS
  module.attr("CUTLASS") = BCLIP_CUTLASS;
#else
  module.attr("CUTLASS") = "";
#endif
  module.def("device", &device,
             "As in csrc/cuda/device.h; Raises RuntimeError with the driver's reason.");
  module.def("count_devices", &bclip::cuda::count_devices);
  bclip::cuda::register_operators(module);
}
