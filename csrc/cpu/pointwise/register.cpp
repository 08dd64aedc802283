#include "csrc/cpu/register.h"

#include <pybind11/stl.h>

#include "csrc/pointwise.h"

namespace bclip::bindings {

namespace {

cpu::Values make_values(uintptr_t address, bool half) { return {at<void>(address), half}; }

cpu::Dropout make_dropout(uint64_t seed, uint32_t drop_below, float kept) {
  return {seed, drop_below, kept};
}

void add_norm(int64_t rows, int64_t columns, cpu::Values stream, cpu::Values branch,
              cpu::Values weight, cpu::Values bias, cpu::Values total, cpu::Values normed,
              cpu::Values wide, double eps, cpu::Dropout dropout, int threads) {
  const py::gil_scoped_release release;
  cpu::add_norm({rows, columns, stream, branch, weight, bias, total, normed, wide, eps, dropout},
                threads);
}

void add_norm_backward(int64_t rows, int64_t columns, cpu::Values grad, cpu::Values wide_grad,
                       cpu::Values total_grad, cpu::Values total, cpu::Values weight,
                       cpu::Values stream_grad, cpu::Values branch_grad, uintptr_t weight_grad,
                       uintptr_t bias_grad, double eps, cpu::Dropout dropout, int threads) {
  const py::gil_scoped_release release;
  cpu::add_norm_backward({rows, columns, grad, wide_grad, total_grad, total, weight, stream_grad,
                          branch_grad, at<float>(weight_grad), at<float>(bias_grad), eps, dropout},
                         threads);
}

void gelu(cpu::Values x, cpu::Values out, int64_t count, int threads) {
  const py::gil_scoped_release release;
  cpu::gelu(x, out, count, threads);
}

void gelu_backward(cpu::Values grad, cpu::Values x, cpu::Values out, int64_t count, int threads) {
  const py::gil_scoped_release release;
  cpu::gelu_backward(grad, x, out, count, threads);
}

}  // namespace

void register_pointwise(py::module_& module) {
  py::class_<cpu::Values>(module, "Values", py::module_local())
      .def(py::init(&make_values), py::arg("address"), py::arg("half"));
  py::class_<cpu::Dropout>(module, "Dropout", py::module_local())
      .def(py::init(&make_dropout), py::arg("seed"), py::arg("drop_below"), py::arg("kept"));
  module.def("add_norm", &add_norm, py::arg("rows"), py::arg("columns"), py::arg("stream"),
             py::arg("branch"), py::arg("weight"), py::arg("bias"), py::arg("total"),
             py::arg("normed"), py::arg("wide"), py::arg("eps"), py::arg("dropout"),
             py::arg("threads"));
  module.def("add_norm_backward", &add_norm_backward, py::arg("rows"), py::arg("columns"),
             py::arg("grad"), py::arg("wide_grad"), py::arg("total_grad"), py::arg("total"),
             py::arg("weight"), py::arg("stream_grad"), py::arg("branch_grad"),
             py::arg("weight_grad"), py::arg("bias_grad"), py::arg("eps"), py::arg("dropout"),
             py::arg("threads"));
  module.def("gelu", &gelu, py::arg("x"), py::arg("out"), py::arg("count"), py::arg("threads"));
  module.def("gelu_backward", &gelu_backward, py::arg("grad"), py::arg("x"), py::arg("out"),
             py::arg("count"), py::arg("threads"));
}

}  // namespace bclip::bindings
