#include "csrc/cpu/register.h"

#include <string>
#include <utility>

#include <pybind11/stl.h>

#include "csrc/attention.h"
#include "csrc/single_query_attention.h"

namespace bclip::bindings {

namespace {

cpu::Attention attention(std::string instruction_set, uintptr_t qkv, bool bfloat16,
                         int64_t num_rows, int64_t num_heads, int64_t dim, uintptr_t bounds,
                         int64_t num_sequences, uintptr_t key_mask, bool causal, double scale,
                         double dropout_p, uint64_t seed) {
  return {std::move(instruction_set),
          at<void>(qkv),
          bfloat16,
          num_rows,
          num_heads,
          dim,
          at<int32_t>(bounds),
          num_sequences,
          at<uint8_t>(key_mask),
          causal,
          scale,
          dropout_p,
          seed};
}

void attention_forward(const cpu::Attention& attention, uintptr_t out, uintptr_t lse, int threads) {
  const py::gil_scoped_release release;
  cpu::attention_forward(attention, at<void>(out), at<float>(lse), threads);
}

void attention_backward(const cpu::Attention& attention, uintptr_t out_grad, uintptr_t out,
                        uintptr_t lse, uintptr_t qkv_grad, int threads) {
  const py::gil_scoped_release release;
  cpu::attention_backward(
      attention, {at<void>(out_grad), at<void>(out), at<float>(lse), at<void>(qkv_grad)}, threads);
}

cpu::SingleQueryAttention single_query_attention(std::string instruction_set, uintptr_t query,
                                                 uintptr_t key_value, bool bfloat16,
                                                 int64_t num_tokens, int64_t num_sequences,
                                                 int64_t num_heads, int64_t dim, uintptr_t bounds,
                                                 uintptr_t rows, bool causal, double scale,
                                                 double dropout_p, uint64_t seed) {
  return {std::move(instruction_set),
          at<void>(query),
          at<void>(key_value),
          bfloat16,
          num_tokens,
          num_sequences,
          num_heads,
          dim,
          at<int32_t>(bounds),
          at<int64_t>(rows),
          causal,
          scale,
          dropout_p,
          seed};
}

void single_query_attention_forward(const cpu::SingleQueryAttention& attention, uintptr_t out,
                                    uintptr_t lse, int threads) {
  const py::gil_scoped_release release;
  cpu::single_query_attention_forward(attention, at<void>(out), at<float>(lse), threads);
}

void single_query_attention_backward(const cpu::SingleQueryAttention& attention, uintptr_t out_grad,
                                     uintptr_t out, uintptr_t lse, uintptr_t query_grad,
                                     uintptr_t key_value_grad, int threads) {
  const py::gil_scoped_release release;
  cpu::single_query_attention_backward(attention,
                                       {at<void>(out_grad), at<void>(out), at<float>(lse),
                                        at<void>(query_grad), at<void>(key_value_grad)},
                                       threads);
}

}  // namespace

void register_attention(py::module_& module) {
  py::class_<cpu::Attention>(module, "Attention", py::module_local())
      .def(py::init(&attention), py::arg("instruction_set"), py::arg("qkv"), py::arg("bfloat16"),
           py::arg("num_rows"), py::arg("num_heads"), py::arg("dim"), py::arg("bounds"),
           py::arg("num_sequences"), py::arg("key_mask"), py::arg("causal"), py::arg("scale"),
           py::arg("dropout_p"), py::arg("seed"));
  module.def("attention_instruction_sets", &cpu::attention_instruction_sets, py::arg("bfloat16"));
  module.def("attention_forward", &attention_forward, py::arg("attention"), py::arg("out"),
             py::arg("lse"), py::arg("threads"));
  module.def("attention_backward", &attention_backward, py::arg("attention"), py::arg("out_grad"),
             py::arg("out"), py::arg("lse"), py::arg("qkv_grad"), py::arg("threads"));
  py::class_<cpu::SingleQueryAttention>(module, "SingleQueryAttention", py::module_local())
      .def(py::init(&single_query_attention), py::arg("instruction_set"), py::arg("query"),
           py::arg("key_value"), py::arg("bfloat16"), py::arg("num_tokens"),
           py::arg("num_sequences"), py::arg("num_heads"), py::arg("dim"), py::arg("bounds"),
           py::arg("rows"), py::arg("causal"), py::arg("scale"), py::arg("dropout_p"),
           py::arg("seed"));
  module.def("single_query_attention_forward", &single_query_attention_forward,
             py::arg("attention"), py::arg("out"), py::arg("lse"), py::arg("threads"));
  module.def("single_query_attention_backward", &single_query_attention_backward,
             py::arg("attention"), py::arg("out_grad"), py::arg("out"), py::arg("lse"),
             py::arg("query_grad"), py::arg("key_value_grad"), py::arg("threads"));
}

}  // namespace bclip::bindings
