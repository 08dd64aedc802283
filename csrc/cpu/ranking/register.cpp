#include "csrc/cpu/register.h"

#include <vector>

#include <pybind11/stl.h>

#include "csrc/ranking.h"

namespace bclip::bindings {

namespace {

// Returns bytes, because making a list of millions of Python integers would take longer than the
// search.
py::bytes amx_screen(uintptr_t left, uintptr_t right, int64_t num_rows, int64_t num_columns,
                     int64_t width, uintptr_t row_low, uintptr_t row_high, uintptr_t column_low,
                     uintptr_t column_high, uintptr_t row_counts, uintptr_t column_counts,
                     int64_t most, int threads) {
  std::vector<int64_t> pairs;
  {
    const py::gil_scoped_release release;
    pairs = cpu::amx_screen(
        {at<uint16_t>(left), at<uint16_t>(right), num_rows, num_columns, width, at<float>(row_low),
         at<float>(row_high), at<float>(column_low), at<float>(column_high),
         at<int64_t>(row_counts), at<int64_t>(column_counts)},
        most, threads);
  }
  return {reinterpret_cast<const char*>(pairs.data()), pairs.size() * sizeof(int64_t)};
}

void dot_products(uintptr_t left, uintptr_t right, int64_t num_columns, int64_t width,
                  uintptr_t pairs, int64_t count, uintptr_t out, int threads) {
  const py::gil_scoped_release release;
  cpu::dot_products(at<float>(left), at<float>(right), num_columns, width, at<int64_t>(pairs),
                    count, at<double>(out), threads);
}

}  // namespace

void register_ranking(py::module_& module) {
  module.def("amx_screen", &amx_screen, py::arg("left"), py::arg("right"), py::arg("num_rows"),
             py::arg("num_columns"), py::arg("width"), py::arg("row_low"), py::arg("row_high"),
             py::arg("column_low"), py::arg("column_high"), py::arg("row_counts"),
             py::arg("column_counts"), py::arg("most"), py::arg("threads"));
  module.def("dot_products", &dot_products, py::arg("left"), py::arg("right"),
             py::arg("num_columns"), py::arg("width"), py::arg("pairs"), py::arg("count"),
             py::arg("out"), py::arg("threads"));
}

}  // namespace bclip::bindings
