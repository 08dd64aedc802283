#include <cstdint>
#include <string_view>
#include <utility>

#include <pybind11/pybind11.h>

#include "../image.h"

namespace py = pybind11;

namespace {

#ifdef BCLIP_JPEG
const uint8_t* bytes_of(std::string_view data) { return reinterpret_cast<const uint8_t*>(data.data()); }

std::pair<int, int> jpeg_size(const py::bytes& data) {
  const std::string_view view = data;
  py::gil_scoped_release release;
  const auto size = bclip::cpu::jpeg_size(bytes_of(view), view.size());
  return {size.height, size.width};
}

void decode_jpeg(const py::bytes& data, uintptr_t pixels, int height, int width) {
  const std::string_view view = data;
  py::gil_scoped_release release;
  bclip::cpu::decode_jpeg(bytes_of(view), view.size(), reinterpret_cast<uint8_t*>(pixels), height, width);
}
#endif

}  // namespace

PYBIND11_MODULE(_cpu, module) {
  module.doc() = "CPU kernels on raw pointers; the wrappers in bclip_fast.ops make every check.";
#ifdef BCLIP_JPEG
  module.def("jpeg_size", &jpeg_size, py::arg("data"));
  module.def("decode_jpeg", &decode_jpeg, py::arg("data"), py::arg("pixels"), py::arg("height"), py::arg("width"));
#endif
}
