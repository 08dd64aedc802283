#include <pybind11/pybind11.h>

#include "csrc/cuda/register.h"
#include "csrc/cuda/emulator/fragments.h"
#include "csrc/cuda/emulator/emulator.h"
#include "csrc/cuda/emulator/faulty_kernel.h"

namespace py = pybind11;
namespace emulator = bclip::cuda::emulator;

PYBIND11_MODULE(_cuda_emulator, module) {
  module.doc() = "The CUDA kernels on the emulator, for tests (csrc/cuda/emulator/emulator.h).";
  bclip::cuda::register_operators(module);
  module.def("device", [](int) {
    return py::dict(py::arg("block_bytes") = emulator::kMostSharedBytes, py::arg("refusal") = "");
  });
  module.def("set_seed", &emulator::set_seed, "Seeds the order of threads and blocks.");
  module.def("place", [](const std::string& fragment, int lane, int i) {
    const auto place = fragment == "a"   ? emulator::place_in_a(lane, i)
                       : fragment == "b" ? emulator::place_in_b(lane, i)
                       : fragment == "c"
                           ? emulator::place_in_c(lane, i)
                           : emulator::place_in_matrix(lane, i, fragment == "transposed");
    return py::make_tuple(place.row, place.column);
  });
  module.def("run_faulty_kernel", [](int fault, uintptr_t a, uintptr_t b, uintptr_t c) {
    emulator::run_faulty_kernel(static_cast<emulator::Fault>(fault),
                                reinterpret_cast<const void*>(a), reinterpret_cast<const void*>(b),
                                reinterpret_cast<float*>(c));
  });
}
