#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "csrc/cuda/register.h"
#include "csrc/cuda/emulator/counters.h"
#include "csrc/cuda/emulator/counting_kernel.h"
#include "csrc/cuda/emulator/fragments.h"
#include "csrc/cuda/emulator/emulator.h"
#include "csrc/cuda/emulator/faulty_kernel.h"

namespace py = pybind11;
namespace emulator = bclip::cuda::emulator;

namespace {

py::dict operation_of(const emulator::Operation& operation, const emulator::Counts& counts) {
  const auto& [file, line, kind, lane_bytes] = operation;
  return py::dict(py::arg("file") = file, py::arg("line") = line,
                  py::arg("kind") = emulator::name_of(kind), py::arg("lane_bytes") = lane_bytes,
                  py::arg("instructions") = counts.instructions, py::arg("lanes") = counts.lanes,
                  py::arg("wavefronts") = counts.wavefronts,
                  py::arg("least_wavefronts") = counts.least_wavefronts,
                  py::arg("sectors") = counts.sectors,
                  py::arg("least_sectors") = counts.least_sectors,
                  py::arg("bytes") = counts.bytes);
}

py::list counted_launches() {
  py::list launches;
  for (const emulator::CountedLaunch& launch : emulator::counted_launches()) {
    py::list tiles;
    for (const emulator::CountedTile& tile : launch.tiles) {
      py::list operations;
      for (const auto& [operation, counts] : tile.counts) {
        operations.append(operation_of(operation, counts));
      }
      tiles.append(py::dict(py::arg("blocks") = tile.blocks, py::arg("operations") = operations));
    }
    launches.append(py::dict(py::arg("kernel") = launch.kernel, py::arg("blocks") = launch.blocks,
                             py::arg("threads") = launch.threads,
                             py::arg("shared_bytes") = launch.shared_bytes,
                             py::arg("tiles") = tiles));
  }
  return launches;
}

}  // namespace

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
  auto counters = module.def_submodule("counters", "As in csrc/cuda/emulator/counters.h.");
  counters.def("start", &emulator::start_counting);
  counters.def("stop", &emulator::stop_counting);
  counters.def("read", &counted_launches, "Returns and forgets the launches since start().");
  module.def("run_counting_kernel", [](int pattern, int size, uintptr_t places, uintptr_t memory,
                                       int blocks) {
    emulator::run_counting_kernel(static_cast<emulator::Pattern>(pattern), size,
                                  reinterpret_cast<const int32_t*>(places),
                                  reinterpret_cast<unsigned char*>(memory), blocks);
  });
}
