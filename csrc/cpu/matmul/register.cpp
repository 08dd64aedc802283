#include "csrc/cpu/register.h"

#include <pybind11/stl.h>

#include "csrc/matmul.h"

namespace bclip::bindings {

namespace {

void linear(int64_t rows, int64_t columns, int64_t depth, uintptr_t left, bool left_transposed,
            uintptr_t right, bool right_transposed, bool right_in_single, uintptr_t bias,
            uintptr_t result, bool result_in_single, uintptr_t left_sums, uintptr_t workspace,
            int threads) {
  const py::gil_scoped_release release;
  cpu::linear({rows, columns, depth, at<uint16_t>(left), left_transposed, at<void>(right),
               right_transposed, right_in_single, at<float>(bias), at<void>(result),
               result_in_single, at<float>(left_sums), at<uint16_t>(workspace)},
              threads);
}

}  // namespace

void register_matmul(py::module_& module) {
  module.def("linear_workspace", &cpu::linear_workspace, py::arg("columns"), py::arg("depth"));
  module.def("linear", &linear, py::arg("rows"), py::arg("columns"), py::arg("depth"),
             py::arg("left"), py::arg("left_transposed"), py::arg("right"),
             py::arg("right_transposed"), py::arg("right_in_single"), py::arg("bias"),
             py::arg("result"), py::arg("result_in_single"), py::arg("left_sums"),
             py::arg("workspace"), py::arg("threads"));
}

}  // namespace bclip::bindings
