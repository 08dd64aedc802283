#include <pybind11/pybind11.h>

#include "csrc/cuda/operators.h"
#include "csrc/cuda/emulator/fragments.h"
#include "csrc/cuda/emulator/emulator.h"
#include "csrc/cuda/emulator/faulty_kernel.h"

namespace py = pybind11;
namespace host = bclip::cuda::host;

PYBIND11_MODULE(_cuda_host, module) {
  module.doc() = "The CUDA kernels on the host, for tests (csrc/cuda/device.cuh).";
  bclip::cuda::define_operators(module);
  module.def("device", [](int) {
    return py::dict(py::arg("block_bytes") = host::MOST_SHARED_BYTES, py::arg("refusal") = "");
  });
  module.def("set_seed", &host::set_seed, "Of the order in which threads and blocks run.");
  module.def("place", [](const std::string& fragment, int lane, int i) {
    const auto place = fragment == "a"   ? host::place_in_a(lane, i)
                       : fragment == "b" ? host::place_in_b(lane, i)
                       : fragment == "c" ? host::place_in_c(lane, i)
                                         : host::place_in_matrix(lane, i, fragment == "transposed");
    return py::make_tuple(place.row, place.column);
  });
  module.def("planted", [](int fault, uintptr_t a, uintptr_t b, uintptr_t c) {
    host::planted(static_cast<host::Fault>(fault), reinterpret_cast<const void*>(a), reinterpret_cast<const void*>(b),
                  reinterpret_cast<float*>(c));
  });
}
