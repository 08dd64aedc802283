#include "csrc/cuda/register.h"

#include <pybind11/stl.h>

#include "csrc/cuda/contrastive/hopper.h"

namespace bclip::cuda {

namespace {

Features features(uintptr_t image, uintptr_t text, bool bfloat16, int rows, int columns, int width,
                  int64_t first, uintptr_t scale, uintptr_t stream) {
  return {at<void>(image), at<void>(text),   bfloat16,        rows, columns, width,
          first,           at<float>(scale), at<void>(stream)};
}

Groups groups(uintptr_t rows, uintptr_t columns, uintptr_t row_shares, uintptr_t column_shares) {
  return {at<int32_t>(rows), at<int32_t>(columns), at<float>(row_shares), at<float>(column_shares)};
}

GradientTile tile(uintptr_t grad, int64_t stride, float scale, uintptr_t partials) {
  return {at<void>(grad), stride, scale, 1 / scale, at<float>(partials)};
}

Normalizers normalizers(uintptr_t rows_near, uintptr_t rows_rest, uintptr_t columns_near,
                        uintptr_t columns_rest, uintptr_t positive_grad) {
  return {at<float>(rows_near), at<float>(rows_rest), at<float>(columns_near),
          at<float>(columns_rest), at<float>(positive_grad)};
}

}  // namespace

void register_contrastive(py::module_& module) {
  module.attr("CONTRASTIVE_SHARED_BYTES") = kContrastiveSharedBytes;
  module.attr("CONTRASTIVE_TILE") = kContrastiveTile;
  module.def("contrastive_tile", [](int block, int row_tiles, int column_tiles, int width) {
    const TileIndex tile = contrastive_tile(block, row_tiles, column_tiles, width);
    return std::pair(tile.row, tile.column);
  });
  py::class_<Features>(module, "Features", py::module_local(),
                       "As in csrc/cuda/contrastive/contrastive.h, like the following.")
      .def(py::init(&features));
  py::class_<Groups>(module, "Groups", py::module_local()).def(py::init(&groups));
  py::class_<GradientTile>(module, "GradientTile", py::module_local()).def(py::init(&tile));
  py::class_<Normalizers>(module, "Normalizers", py::module_local()).def(py::init(&normalizers));
  module.def("contrastive_forward", [](const Features& call, uintptr_t rows, uintptr_t columns) {
    contrastive_forward(call, {at<float>(rows), at<float>(columns)});
  });
  module.def("contrastive_softmax", &contrastive_softmax);
  module.def("contrastive_sigmoid",
             [](const Features& call, uintptr_t bias, const Groups& ids, const GradientTile& to) {
               contrastive_sigmoid(call, at<float>(bias), ids, to);
             });
  // The rows and columns of a tile of the kernels for sm_90a, or None if they weren't built.
  module.attr("CONTRASTIVE_HOPPER") =
      kHasHopper ? py::object(py::make_tuple(kHopperRows, kHopperColumns)) : py::none();
  module.attr("HOPPER_THREADS") = kHopperThreads;
  module.attr("HOPPER_FORWARD_BYTES") = hopper_forward_bytes();
  module.attr("HOPPER_GRADIENT_BYTES") = hopper_gradient_bytes();
  module.def("hopper_forward", [](const Features& call, uintptr_t rows, uintptr_t columns) {
    hopper_forward(call, {at<float>(rows), at<float>(columns)});
  });
  module.def("hopper_softmax", &hopper_softmax);
  module.def("hopper_sigmoid", [](const Features& call, uintptr_t bias, const GradientTile& to) {
    hopper_sigmoid(call, at<float>(bias), to);
  });
}

}  // namespace bclip::cuda
