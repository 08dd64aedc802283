#include "csrc/cpu/register.h"

#include <string_view>

#include "csrc/checksum.h"

namespace bclip::bindings {

namespace {

// Below this, taking the interpreter's lock again costs more than the checksum.
constexpr size_t kReleaseBytes = 1 << 18;

uint32_t crc32c(const py::bytes& data) {
  const std::string_view view = data;
  if (view.size() < kReleaseBytes) return cpu::crc32c(view);
  const py::gil_scoped_release release;
  return cpu::crc32c(view);
}

}  // namespace

void register_checksum(py::module_& module) {
  module.def("crc32c", &crc32c, py::arg("data"));
}

}  // namespace bclip::bindings
