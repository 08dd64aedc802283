#include <pybind11/pybind11.h>

#include "../operators.h"
#include "fragments.h"
#include "machine.h"
#include "planted.h"

namespace py = pybind11;
namespace host = bclip::cuda::host;

PYBIND11_MODULE(_cuda_host, module) {
  module.doc() = "The CUDA kernels on the host, for tests (csrc/cuda/device.cuh).";
  bclip::cuda::define_operators(module);
  module.def("set_seed", &host::set_seed, "Of the order in which threads and blocks run.");
  module.def("place", [](const std::string& fragment, int lane, int i) {
    const auto place = fragment == "a"   ? host::place_in_a(lane, i)
                       : fragment == "b" ? host::place_in_b(lane, i)
                       : fragment == "c" ? host::place_in_c(lane, i)
                                         : host::place_in_matrix(lane, i, fragment == "transposed");
    return py::make_tuple(place.row, place.column);
  });
  py::enum_<host::Fault>(module, "Fault")
      .value("NONE", host::Fault::NONE)
      .value("NO_BARRIER", host::Fault::NO_BARRIER)
      .value("NO_WAIT", host::Fault::NO_WAIT)
      .value("NO_WARP_BARRIER", host::Fault::NO_WARP_BARRIER)
      .value("OVERWRITE", host::Fault::OVERWRITE)
      .value("UNWRITTEN", host::Fault::UNWRITTEN)
      .value("SHARED_BOUNDS", host::Fault::SHARED_BOUNDS)
      .value("GLOBAL_BOUNDS", host::Fault::GLOBAL_BOUNDS)
      .value("LAYOUT", host::Fault::LAYOUT)
      .value("DIVERGENCE", host::Fault::DIVERGENCE)
      .value("MISSING_THREADS", host::Fault::MISSING_THREADS);
  module.def("planted", [](host::Fault fault, uintptr_t a, uintptr_t b, uintptr_t c) {
    host::planted(fault, reinterpret_cast<const void*>(a), reinterpret_cast<const void*>(b),
                  reinterpret_cast<float*>(c));
  });
}
