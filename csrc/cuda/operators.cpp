#include "csrc/cuda/operators.h"

#include <pybind11/stl.h>

#include "csrc/cuda/attention/attention.h"
#include "csrc/cuda/contrastive/contrastive.h"
#include "csrc/cuda/image/image.h"
#include "csrc/cuda/image/nvjpeg.h"

namespace py = pybind11;

namespace bclip::cuda {
namespace {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

Attention attention(uintptr_t qkv, bool bfloat16, int64_t token_stride, int64_t part_stride, int64_t head_stride,
                    int64_t rows, int64_t sequences, int heads, int dim, uintptr_t bounds, int max_length,
                    uintptr_t key_mask, bool causal, float scale, uintptr_t seed, uint32_t threshold, float keep_scale,
                    int block_bytes, uintptr_t stream) {
  return {at<void>(qkv),   bfloat16,  token_stride, part_stride,        head_stride, rows,
          sequences,       heads,     dim,          at<int32_t>(bounds), max_length,  at<uint8_t>(key_mask),
          causal,          scale,     at<int64_t>(seed), threshold,     keep_scale,  block_bytes,
          at<void>(stream)};
}

Features features(uintptr_t image, uintptr_t text, bool bfloat16, int rows, int columns, int width, int64_t first,
                  uintptr_t scale, uintptr_t stream) {
  return {at<void>(image), at<void>(text), bfloat16, rows, columns, width, first, at<float>(scale), at<void>(stream)};
}

Groups groups(uintptr_t rows, uintptr_t columns, uintptr_t row_shares, uintptr_t column_shares) {
  return {at<int32_t>(rows), at<int32_t>(columns), at<float>(row_shares), at<float>(column_shares)};
}

GradientTile tile(uintptr_t grad, int64_t stride, float scale, uintptr_t partials) {
  return {at<void>(grad), stride, scale, at<float>(partials)};
}

Normalizers normalizers(uintptr_t rows_near, uintptr_t rows_rest, uintptr_t columns_near, uintptr_t columns_rest,
                        uintptr_t positive_grad) {
  return {at<float>(rows_near), at<float>(rows_rest), at<float>(columns_near), at<float>(columns_rest),
          at<float>(positive_grad)};
}

std::vector<std::string_view> views(const std::vector<py::bytes>& files) { return {files.begin(), files.end()}; }

// (plan, words, errors), the plan as bytes to copy to the device.
py::tuple plan_images(const std::vector<std::vector<int64_t>>& places, int size, const std::string& crop,
                      uintptr_t boxes, bool bicubic) {
  const auto kind = crop == "center" ? cpu::Crop::kCenter : crop == "squash" ? cpu::Crop::kSquash : cpu::Crop::kBoxes;
  const ImagePlan plan = image_plan(places, size, kind, at<int64_t>(boxes), bicubic);
  const auto* const pictures = reinterpret_cast<const char*>(plan.pictures.data());
  return py::make_tuple(py::bytes(pictures, plan.pictures.size() * sizeof(Picture)), plan.words, plan.errors);
}

void resize_images(uintptr_t pixels, uintptr_t plan, uintptr_t weights, int64_t count, int size, bool bicubic,
                   const std::vector<float>& factor, const std::vector<float>& shift, uintptr_t out,
                   const std::string& type, uintptr_t stream) {
  const auto kind = type == "uint8"     ? ImageType::kUint8
                    : type == "float32" ? ImageType::kFloat32
                    : type == "float16" ? ImageType::kFloat16
                                        : ImageType::kBfloat16;
  ImageResize call{at<uint8_t>(pixels), at<Picture>(plan), at<int32_t>(weights), count, size, bicubic, {}, {},
                   at<void>(out),       kind,              at<void>(stream)};
  for (int c = 0; c < 3; ++c) {
    call.factor[c] = factor.at(c);
    call.shift[c] = shift.at(c);
  }
  image_resize(call);
}

std::vector<int64_t> decode_images(NvJpeg& library, const std::vector<py::bytes>& files,
                                   const std::vector<uintptr_t>& pixels, const std::vector<int>& widths, int threads,
                                   uintptr_t stream) {
  const auto data = views(files);
  std::vector<uint8_t*> to;
  for (const uintptr_t address : pixels) to.push_back(at<uint8_t>(address));
  const py::gil_scoped_release release;
  return library.decode(data, to, widths, threads, at<void>(stream));
}

}  // namespace

void define_operators(py::module_& module) {
  py::class_<Attention>(module, "Attention", py::module_local(), "As in csrc/cuda/attention.h; pointers are addresses, 0 is null.")
      .def(py::init(&attention));
  module.def("attention_forward", [](const Attention& call, uintptr_t out, uintptr_t lse, int splits) {
    attention_forward(call, at<void>(out), at<float>(lse), splits);
  });
  module.def("attention_backward",
             [](const Attention& call, uintptr_t out_grad, uintptr_t out, int64_t out_grad_token_stride,
                int64_t out_grad_head_stride, uintptr_t lse, uintptr_t qkv_grad, uintptr_t workspace) {
               attention_backward(call, {at<void>(out_grad), at<void>(out), out_grad_token_stride, out_grad_head_stride,
                                         at<float>(lse), at<void>(qkv_grad), at<float>(workspace)});
             });
  module.def("attention_backward_keys", &attention_backward_keys);
  module.def("attention_forward_shared_bytes", &attention_forward_shared_bytes);
  module.def("attention_backward_shared_bytes", &attention_backward_shared_bytes);
  module.attr("CONTRASTIVE_SHARED_BYTES") = CONTRASTIVE_SHARED_BYTES;
  module.attr("CONTRASTIVE_TILE") = CONTRASTIVE_TILE;
  py::class_<Features>(module, "Features", py::module_local(), "As in csrc/cuda/contrastive.h, like the following.")
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
  module.attr("IMAGE_SHARED_BYTES") = IMAGE_SHARED_BYTES;
  module.attr("IMAGE_THREADS") = IMAGE_THREADS;
  module.def("plain_jpegs", [](const std::vector<py::bytes>& files) { return plain_jpegs(views(files)); });
  module.def("plan_images", &plan_images, "As image_plan in csrc/cuda/image.h.");
  module.def("resize_images", &resize_images, "As image_resize there.");
  py::class_<NvJpeg>(module, "NvJpeg", py::module_local(), "As in csrc/cuda/nvjpeg.h.")
      .def(py::init<const std::string&>())
      .def("decode", &decode_images);
}

}  // namespace bclip::cuda
