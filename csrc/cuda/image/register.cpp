#include "csrc/cuda/register.h"

#include <pybind11/stl.h>

#include "csrc/cuda/image/image.h"
#include "csrc/cuda/image/nvjpeg.h"

namespace bclip::cuda {

namespace {

std::vector<std::string_view> views(const std::vector<py::bytes>& files) {
  return {files.begin(), files.end()};
}

// Returns (plan, words, errors), where the plan is bytes to copy to the device.
py::tuple plan_images(const std::vector<std::vector<int64_t>>& places, int size,
                      const std::string& crop, uintptr_t boxes, bool bicubic) {
  const auto kind = crop == "center"   ? cpu::Crop::kCenter
                    : crop == "squash" ? cpu::Crop::kSquash
                                       : cpu::Crop::kBoxes;
  const ImagePlan plan = image_plan(places, size, kind, at<int64_t>(boxes), bicubic);
  const auto* const images = reinterpret_cast<const char*>(plan.images.data());
  return py::make_tuple(py::bytes(images, plan.images.size() * sizeof(ImageLayout)), plan.words,
                        plan.errors);
}

void resize_images(uintptr_t pixels, uintptr_t plan, uintptr_t weights, int64_t count, int size,
                   bool bicubic, const std::vector<float>& factor, const std::vector<float>& shift,
                   uintptr_t out, const std::string& type, uintptr_t stream) {
  const auto kind = type == "uint8"     ? ImageType::kUint8
                    : type == "float32" ? ImageType::kFloat32
                    : type == "float16" ? ImageType::kFloat16
                                        : ImageType::kBfloat16;
  ImageResize call{at<uint8_t>(pixels),
                   at<ImageLayout>(plan),
                   at<int32_t>(weights),
                   count,
                   size,
                   bicubic,
                   {},
                   {},
                   at<void>(out),
                   kind,
                   at<void>(stream)};
  for (int c = 0; c < 3; ++c) {
    call.factor[c] = factor.at(c);
    call.shift[c] = shift.at(c);
  }
  image_resize(call);
}

std::vector<int64_t> decode_images(NvJpeg& library, const std::vector<py::bytes>& files,
                                   const std::vector<uintptr_t>& pixels,
                                   const std::vector<int>& widths, int threads, uintptr_t stream) {
  const auto data = views(files);
  std::vector<uint8_t*> to;
  for (const uintptr_t address : pixels) to.push_back(at<uint8_t>(address));
  const py::gil_scoped_release release;
  return library.decode(data, to, widths, threads, at<void>(stream));
}

}  // namespace

void register_image(py::module_& module) {
  module.attr("IMAGE_SHARED_BYTES") = kImageSharedBytes;
  module.attr("IMAGE_THREADS") = kImageThreads;
  module.def("plain_jpegs",
             [](const std::vector<py::bytes>& files) { return plain_jpegs(views(files)); });
  module.def("plan_images", &plan_images, "As image_plan in csrc/cuda/image/image.h.");
  module.def("resize_images", &resize_images, "As image_resize there.");
  py::class_<NvJpeg>(module, "NvJpeg", py::module_local(), "As in csrc/cuda/image/nvjpeg.h.")
      .def(py::init<const std::string&>())
      .def("decode", &decode_images);
}

}  // namespace bclip::cuda
