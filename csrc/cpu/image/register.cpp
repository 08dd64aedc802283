#include "csrc/cpu/register.h"

#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <pybind11/stl.h>

#include "csrc/image.h"

namespace bclip::bindings {

namespace {

std::pair<int, int> jpeg_size(const py::bytes& data) {
  const std::string_view view = data;
  const py::gil_scoped_release release;
  const auto size = cpu::jpeg_size(view);
  return {size.height, size.width};
}

void decode_jpeg(const py::bytes& data, uintptr_t pixels, int height, int width, int reduced,
                 bool needs_end) {
  const std::string_view view = data;
  const py::gil_scoped_release release;
  cpu::decode_jpeg(view, reinterpret_cast<uint8_t*>(pixels), height, width, reduced, needs_end);
}

std::vector<std::pair<int64_t, std::string>> decode_resize(const std::vector<py::bytes>& files,
                                                           int size, cpu::Crop crop,
                                                           uintptr_t boxes, bool bicubic,
                                                           bool exact, int64_t max_pixels,
                                                           uintptr_t pixels, int threads) {
  const std::vector<std::string_view> views(files.begin(), files.end());
  const py::gil_scoped_release release;
  return cpu::decode_resize(
      views, {size, crop, reinterpret_cast<const int64_t*>(boxes), bicubic, exact, max_pixels},
      reinterpret_cast<uint8_t*>(pixels), threads);
}

}  // namespace

void register_image(py::module_& module) {
  module.def("jpeg_size", &jpeg_size, py::arg("data"));
  module.def("decode_jpeg", &decode_jpeg, py::arg("data"), py::arg("pixels"), py::arg("height"),
             py::arg("width"), py::arg("reduced") = 1, py::arg("needs_end") = true);
  py::enum_<cpu::Crop>(module, "Crop", py::module_local())
      .value("center", cpu::Crop::kCenter)
      .value("squash", cpu::Crop::kSquash)
      .value("boxes", cpu::Crop::kBoxes);
  module.def("decode_resize", &decode_resize, py::arg("files"), py::arg("size"), py::arg("crop"),
             py::arg("boxes"), py::arg("bicubic"), py::arg("exact"), py::arg("max_pixels"),
             py::arg("pixels"), py::arg("threads"));
}

}  // namespace bclip::bindings
