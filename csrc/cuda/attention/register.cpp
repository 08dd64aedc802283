#include "csrc/cuda/register.h"

#include <pybind11/stl.h>

#include "csrc/cuda/attention/attention.h"

namespace bclip::cuda {

namespace {

Attention attention(uintptr_t qkv, bool bfloat16, int64_t token_stride, int64_t part_stride,
                    int64_t head_stride, int64_t rows, int64_t sequences, int heads, int dim,
                    uintptr_t bounds, int max_length, uintptr_t key_mask, bool causal, float scale,
                    uintptr_t seed, uint32_t threshold, float keep_scale, int block_bytes,
                    uintptr_t stream) {
  return {at<void>(qkv),
          bfloat16,
          token_stride,
          part_stride,
          head_stride,
          rows,
          sequences,
          heads,
          dim,
          at<int32_t>(bounds),
          max_length,
          at<uint8_t>(key_mask),
          causal,
          scale,
          at<int64_t>(seed),
          threshold,
          keep_scale,
          block_bytes,
          at<void>(stream)};
}

}  // namespace

void register_attention(py::module_& module) {
  py::class_<Attention>(module, "Attention", py::module_local(),
                        "As in csrc/cuda/attention/attention.h; pointers are addresses, 0 is null.")
      .def(py::init(&attention));
  module.def("attention_forward",
             [](const Attention& call, uintptr_t out, uintptr_t lse, int splits) {
               attention_forward(call, at<void>(out), at<float>(lse), splits);
             });
  module.def("attention_backward", [](const Attention& call, uintptr_t out_grad, uintptr_t out,
                                      int64_t out_grad_token_stride, int64_t out_grad_head_stride,
                                      uintptr_t lse, uintptr_t qkv_grad, uintptr_t workspace) {
    attention_backward(
        call, {at<void>(out_grad), at<void>(out), out_grad_token_stride, out_grad_head_stride,
               at<float>(lse), at<void>(qkv_grad), at<float>(workspace)});
  });
  module.def("attention_backward_keys", &attention_backward_keys);
  module.def("attention_forward_shared_bytes", &attention_forward_shared_bytes);
  module.def("attention_backward_shared_bytes", &attention_backward_shared_bytes);
}

}  // namespace bclip::cuda
