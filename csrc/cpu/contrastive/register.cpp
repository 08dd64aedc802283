#include "csrc/cpu/register.h"

#include <tuple>
#include <utility>

#include <pybind11/stl.h>

#include "csrc/contrastive.h"

namespace bclip::bindings {

namespace {

// Addresses of ids and shares, 0 for null.
using GroupAddresses = std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t>;

cpu::Groups groups_at(const GroupAddresses& groups) {
  const auto [rows, columns, row_shares, column_shares] = groups;
  return {at<int32_t>(rows), at<int32_t>(columns), at<float>(row_shares), at<float>(column_shares)};
}

void exponential_sums(uintptr_t dots, int64_t num_rows, int64_t num_columns, int64_t first,
                      double factor, float offset, uintptr_t rows, uintptr_t columns, int threads) {
  const py::gil_scoped_release release;
  cpu::exponential_sums({at<float>(dots), num_columns, num_rows, num_columns, first}, factor,
                        offset, {at<float>(rows), at<double>(columns)}, threads);
}

void softmax_gradient(uintptr_t dots, int64_t num_rows, int64_t num_columns, int64_t first,
                      double scale, double weight, uintptr_t rows_lse, uintptr_t columns_lse,
                      uintptr_t positive_grad, const GroupAddresses& groups, int threads) {
  const py::gil_scoped_release release;
  cpu::softmax_gradient({at<float>(dots), num_columns, num_rows, num_columns, first},
                        {scale, weight, at<double>(rows_lse), at<double>(columns_lse),
                         at<float>(positive_grad), groups_at(groups)},
                        threads);
}

std::pair<double, double> sigmoid_gradient(uintptr_t dots, int64_t num_rows, int64_t num_columns,
                                           int64_t first, double scale, double bias, double weight,
                                           bool with_gradients, const GroupAddresses& groups,
                                           int threads) {
  const py::gil_scoped_release release;
  const auto sums =
      cpu::sigmoid_gradient({at<float>(dots), num_columns, num_rows, num_columns, first},
                            {scale, bias, weight, with_gradients, groups_at(groups)}, threads);
  return {sums.loss, sums.gradient};
}

cpu::AmxProblem amx_problem(uintptr_t image, uintptr_t text, int64_t num_rows, int64_t num_columns,
                            int64_t width, int64_t first) {
  return {at<uint16_t>(image), at<uint16_t>(text), num_rows, num_columns, width, first};
}

void amx_exponential_sums(const cpu::AmxProblem& problem, double factor, float offset,
                          uintptr_t rows, uintptr_t columns, int threads) {
  const py::gil_scoped_release release;
  cpu::amx_exponential_sums(problem, factor, offset, {at<float>(rows), at<double>(columns)},
                            threads);
}

cpu::AmxGradients amx_gradients(uintptr_t image, uintptr_t text, bool in_single, double scale) {
  return {at<void>(image), at<void>(text), in_single, scale};
}

double amx_softmax_gradient(const cpu::AmxProblem& problem, double scale, double weight,
                            uintptr_t rows_lse, uintptr_t columns_lse, uintptr_t positive_grad,
                            const GroupAddresses& groups, const cpu::AmxGradients& gradients,
                            int threads) {
  const py::gil_scoped_release release;
  return cpu::amx_softmax_gradient(problem,
                                   {scale, weight, at<double>(rows_lse), at<double>(columns_lse),
                                    at<float>(positive_grad), groups_at(groups)},
                                   gradients, threads);
}

std::tuple<double, double, double> amx_sigmoid_gradient(const cpu::AmxProblem& problem,
                                                        double scale, double bias, double weight,
                                                        const GroupAddresses& groups,
                                                        const cpu::AmxGradients* gradients,
                                                        int threads) {
  const py::gil_scoped_release release;
  const bool with_gradients = gradients != nullptr;
  const auto sums =
      cpu::amx_sigmoid_gradient(problem, {scale, bias, weight, with_gradients, groups_at(groups)},
                                with_gradients ? *gradients : cpu::AmxGradients{}, threads);
  return {sums.loss, sums.gradient, sums.product};
}

}  // namespace

void register_contrastive(py::module_& module) {
  module.def("exponential_sums", &exponential_sums, py::arg("dots"), py::arg("num_rows"),
             py::arg("num_columns"), py::arg("first"), py::arg("factor"), py::arg("offset"),
             py::arg("rows"), py::arg("columns"), py::arg("threads"));
  module.def("softmax_gradient", &softmax_gradient, py::arg("dots"), py::arg("num_rows"),
             py::arg("num_columns"), py::arg("first"), py::arg("scale"), py::arg("weight"),
             py::arg("rows_lse"), py::arg("columns_lse"), py::arg("positive_grad"),
             py::arg("groups"), py::arg("threads"));
  module.def("sigmoid_gradient", &sigmoid_gradient, py::arg("dots"), py::arg("num_rows"),
             py::arg("num_columns"), py::arg("first"), py::arg("scale"), py::arg("bias"),
             py::arg("weight"), py::arg("with_gradients"), py::arg("groups"), py::arg("threads"));
  py::class_<cpu::AmxProblem>(module, "AmxProblem", py::module_local())
      .def(py::init(&amx_problem), py::arg("image"), py::arg("text"), py::arg("num_rows"),
           py::arg("num_columns"), py::arg("width"), py::arg("first"));
  py::class_<cpu::AmxGradients>(module, "AmxGradients", py::module_local())
      .def(py::init(&amx_gradients), py::arg("image"), py::arg("text"), py::arg("in_single"),
           py::arg("scale"));
  module.def("amx_exponential_sums", &amx_exponential_sums, py::arg("problem"), py::arg("factor"),
             py::arg("offset"), py::arg("rows"), py::arg("columns"), py::arg("threads"));
  module.def("amx_softmax_gradient", &amx_softmax_gradient, py::arg("problem"), py::arg("scale"),
             py::arg("weight"), py::arg("rows_lse"), py::arg("columns_lse"),
             py::arg("positive_grad"), py::arg("groups"), py::arg("gradients"), py::arg("threads"));
  module.def("amx_sigmoid_gradient", &amx_sigmoid_gradient, py::arg("problem"), py::arg("scale"),
             py::arg("bias"), py::arg("weight"), py::arg("groups"), py::arg("gradients").none(true),
             py::arg("threads"));
}

}  // namespace bclip::bindings
