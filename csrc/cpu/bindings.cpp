#include <cstdint>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "csrc/attention.h"
#include "csrc/contrastive.h"
#include "csrc/image.h"
#include "csrc/matmul.h"
#include "csrc/pointwise.h"
#include "csrc/single_query_attention.h"
#include "csrc/ranking.h"

namespace py = pybind11;

namespace {

#ifdef BCLIP_JPEG
std::pair<int, int> jpeg_size(const py::bytes& data) {
  const std::string_view view = data;
  const py::gil_scoped_release release;
  const auto size = bclip::cpu::jpeg_size(view);
  return {size.height, size.width};
}

void decode_jpeg(const py::bytes& data, uintptr_t pixels, int height, int width) {
  const std::string_view view = data;
  const py::gil_scoped_release release;
  bclip::cpu::decode_jpeg(view, reinterpret_cast<uint8_t*>(pixels), height, width);
}

std::vector<std::pair<int64_t, std::string>> decode_resize(const std::vector<py::bytes>& files, int size,
                                                           bclip::cpu::Crop crop, uintptr_t boxes, bool bicubic,
                                                           bool exact, int64_t max_pixels, uintptr_t pixels,
                                                           int threads) {
  const std::vector<std::string_view> views(files.begin(), files.end());
  const py::gil_scoped_release release;
  return bclip::cpu::decode_resize(
      views, {size, crop, reinterpret_cast<const int64_t*>(boxes), bicubic, exact, max_pixels},
      reinterpret_cast<uint8_t*>(pixels), threads);
}
#endif

template <typename T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Addresses of ids and shares, 0 where there are none.
using GroupAddresses = std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t>;

bclip::cpu::Groups groups_at(const GroupAddresses& groups) {
  const auto [rows, columns, row_shares, column_shares] = groups;
  return {at<int32_t>(rows), at<int32_t>(columns), at<float>(row_shares), at<float>(column_shares)};
}

void exponential_sums(uintptr_t dots, int64_t num_rows, int64_t num_columns, int64_t first, double factor, float offset,
                      uintptr_t rows, uintptr_t columns, int threads) {
  const py::gil_scoped_release release;
  bclip::cpu::exponential_sums({at<float>(dots), num_columns, num_rows, num_columns, first}, factor, offset,
                               {at<float>(rows), at<double>(columns)}, threads);
}

void softmax_gradient(uintptr_t dots, int64_t num_rows, int64_t num_columns, int64_t first, double scale,
                      double weight, uintptr_t rows_lse, uintptr_t columns_lse, uintptr_t positive_grad,
                      const GroupAddresses& groups, int threads) {
  const py::gil_scoped_release release;
  bclip::cpu::softmax_gradient({at<float>(dots), num_columns, num_rows, num_columns, first},
                               {scale, weight, at<double>(rows_lse), at<double>(columns_lse), at<float>(positive_grad),
                                groups_at(groups)},
                               threads);
}

std::pair<double, double> sigmoid_gradient(uintptr_t dots, int64_t num_rows, int64_t num_columns, int64_t first,
                                           double scale, double bias, double weight, bool with_gradients,
                                           const GroupAddresses& groups, int threads) {
  const py::gil_scoped_release release;
  const auto sums = bclip::cpu::sigmoid_gradient({at<float>(dots), num_columns, num_rows, num_columns, first},
                                                 {scale, bias, weight, with_gradients, groups_at(groups)}, threads);
  return {sums.loss, sums.gradient};
}

bclip::cpu::AmxProblem amx_problem(uintptr_t image, uintptr_t text, int64_t num_rows, int64_t num_columns,
                                   int64_t width, int64_t first) {
  return {at<uint16_t>(image), at<uint16_t>(text), num_rows, num_columns, width, first};
}

void amx_exponential_sums(const bclip::cpu::AmxProblem& problem, double factor, float offset, uintptr_t rows,
                          uintptr_t columns, int threads) {
  const py::gil_scoped_release release;
  bclip::cpu::amx_exponential_sums(problem, factor, offset, {at<float>(rows), at<double>(columns)}, threads);
}

bclip::cpu::AmxGradients amx_gradients(uintptr_t image, uintptr_t text, bool in_single, double scale) {
  return {at<void>(image), at<void>(text), in_single, scale};
}

double amx_softmax_gradient(const bclip::cpu::AmxProblem& problem, double scale, double weight, uintptr_t rows_lse,
                            uintptr_t columns_lse, uintptr_t positive_grad, const GroupAddresses& groups,
                            const bclip::cpu::AmxGradients& gradients, int threads) {
  const py::gil_scoped_release release;
  return bclip::cpu::amx_softmax_gradient(
      problem,
      {scale, weight, at<double>(rows_lse), at<double>(columns_lse), at<float>(positive_grad), groups_at(groups)},
      gradients, threads);
}

std::tuple<double, double, double> amx_sigmoid_gradient(const bclip::cpu::AmxProblem& problem, double scale,
                                                        double bias, double weight, const GroupAddresses& groups,
                                                        const bclip::cpu::AmxGradients* gradients, int threads) {
  const py::gil_scoped_release release;
  const bool wanted = gradients != nullptr;
  const auto sums = bclip::cpu::amx_sigmoid_gradient(problem, {scale, bias, weight, wanted, groups_at(groups)},
                                                     wanted ? *gradients : bclip::cpu::AmxGradients{}, threads);
  return {sums.loss, sums.gradient, sums.product};
}

bclip::cpu::Values values(uintptr_t address, bool half) { return {at<void>(address), half}; }

bclip::cpu::Dropout dropout(uint64_t seed, uint32_t drop_below, float kept) { return {seed, drop_below, kept}; }

using bclip::cpu::Dropout;
using bclip::cpu::Values;

void add_norm(int64_t rows, int64_t columns, Values stream, Values branch, Values weight, Values bias, Values total,
              Values normed, Values wide, double eps, Dropout dropout, int threads) {
  const py::gil_scoped_release release;
  bclip::cpu::add_norm({rows, columns, stream, branch, weight, bias, total, normed, wide, eps, dropout}, threads);
}

void add_norm_backward(int64_t rows, int64_t columns, Values grad, Values wide_grad, Values total_grad, Values total,
                       Values weight, Values stream_grad, Values branch_grad, uintptr_t weight_grad,
                       uintptr_t bias_grad, double eps, Dropout dropout, int threads) {
  const py::gil_scoped_release release;
  bclip::cpu::add_norm_backward({rows, columns, grad, wide_grad, total_grad, total, weight, stream_grad, branch_grad,
                                 at<float>(weight_grad), at<float>(bias_grad), eps, dropout},
                                threads);
}

void gelu(Values x, Values out, int64_t count, int threads) {
  const py::gil_scoped_release release;
  bclip::cpu::gelu(x, out, count, threads);
}

void gelu_backward(Values grad, Values x, Values out, int64_t count, int threads) {
  const py::gil_scoped_release release;
  bclip::cpu::gelu_backward(grad, x, out, count, threads);
}

bclip::cpu::Attention attention(std::string instruction_set, uintptr_t qkv, bool bfloat16, int64_t num_rows,
                                int64_t num_heads, int64_t dim, uintptr_t bounds, int64_t num_sequences,
                                uintptr_t key_mask, bool causal, double scale, double dropout_p, uint64_t seed) {
  return {std::move(instruction_set), at<void>(qkv),  bfloat16,      num_rows,              num_heads, dim,
          at<int32_t>(bounds),        num_sequences,  at<uint8_t>(key_mask), causal, scale,     dropout_p, seed};
}

void attention_forward(const bclip::cpu::Attention& attention, uintptr_t out, uintptr_t lse, int threads) {
  const py::gil_scoped_release release;
  bclip::cpu::attention_forward(attention, at<void>(out), at<float>(lse), threads);
}

void attention_backward(const bclip::cpu::Attention& attention, uintptr_t out_grad, uintptr_t out, uintptr_t lse,
                        uintptr_t qkv_grad, int threads) {
  const py::gil_scoped_release release;
  bclip::cpu::attention_backward(attention, {at<void>(out_grad), at<void>(out), at<float>(lse), at<void>(qkv_grad)},
                                 threads);
}

bclip::cpu::PooledAttention pooled_attention(std::string instruction_set, uintptr_t query, uintptr_t key_value,
                                             bool bfloat16, int64_t num_tokens, int64_t num_sequences, int64_t num_heads, int64_t dim, uintptr_t bounds,
                                             uintptr_t rows, bool causal, double scale, double dropout_p,
                                             uint64_t seed) {
  return {std::move(instruction_set), at<void>(query), at<void>(key_value), bfloat16, num_tokens, num_sequences, num_heads, dim,
          at<int32_t>(bounds), at<int64_t>(rows), causal, scale, dropout_p, seed};
}

void pooled_attention_forward(const bclip::cpu::PooledAttention& attention, uintptr_t out, uintptr_t lse,
                              int threads) {
  const py::gil_scoped_release release;
  bclip::cpu::pooled_attention_forward(attention, at<void>(out), at<float>(lse), threads);
}

void pooled_attention_backward(const bclip::cpu::PooledAttention& attention, uintptr_t out_grad, uintptr_t out,
                               uintptr_t lse, uintptr_t query_grad, uintptr_t key_value_grad, int threads) {
  const py::gil_scoped_release release;
  bclip::cpu::pooled_attention_backward(
      attention, {at<void>(out_grad), at<void>(out), at<float>(lse), at<void>(query_grad), at<void>(key_value_grad)},
      threads);
}

void amx_product(int64_t rows, int64_t columns, int64_t depth, uintptr_t left, bool left_transposed, uintptr_t right,
                 bool right_transposed, bool right_in_single, uintptr_t bias, uintptr_t result, bool result_in_single,
                 uintptr_t left_sums, uintptr_t workspace, int threads) {
  const py::gil_scoped_release release;
  bclip::cpu::amx_product({rows, columns, depth, at<uint16_t>(left), left_transposed, at<void>(right),
                           right_transposed, right_in_single, at<float>(bias), at<void>(result), result_in_single,
                           at<float>(left_sums), at<uint16_t>(workspace)},
                          threads);
}

// As bytes: a list of millions of Python's numbers would take longer than they took to find.
py::bytes amx_screen(uintptr_t left, uintptr_t right, int64_t num_rows, int64_t num_columns, int64_t width,
                     uintptr_t row_low, uintptr_t row_high, uintptr_t column_low, uintptr_t column_high,
                     uintptr_t row_counts, uintptr_t column_counts, int64_t most, int threads) {
  std::vector<int64_t> pairs;
  {
    const py::gil_scoped_release release;
    pairs = bclip::cpu::amx_screen(
        {at<uint16_t>(left), at<uint16_t>(right), num_rows, num_columns, width, at<float>(row_low), at<float>(row_high),
         at<float>(column_low), at<float>(column_high), at<int64_t>(row_counts), at<int64_t>(column_counts)},
        most, threads);
  }
  return {reinterpret_cast<const char*>(pairs.data()), pairs.size() * sizeof(int64_t)};
}

void dot_products(uintptr_t left, uintptr_t right, int64_t num_columns, int64_t width, uintptr_t pairs, int64_t count,
                  uintptr_t out, int threads) {
  const py::gil_scoped_release release;
  bclip::cpu::dot_products(at<float>(left), at<float>(right), num_columns, width, at<int64_t>(pairs), count,
                           at<double>(out), threads);
}

}  // namespace

PYBIND11_MODULE(_cpu, module) {
  module.doc() = "CPU kernels on raw pointers; the wrappers in bclip_fast.ops make every check.";
#ifdef BCLIP_JPEG
  module.def("jpeg_size", &jpeg_size, py::arg("data"));
  module.def("decode_jpeg", &decode_jpeg, py::arg("data"), py::arg("pixels"), py::arg("height"), py::arg("width"));
  py::enum_<bclip::cpu::Crop>(module, "Crop", py::module_local())
      .value("center", bclip::cpu::Crop::kCenter)
      .value("squash", bclip::cpu::Crop::kSquash)
      .value("boxes", bclip::cpu::Crop::kBoxes);
  module.def("decode_resize", &decode_resize, py::arg("files"), py::arg("size"), py::arg("crop"), py::arg("boxes"),
             py::arg("bicubic"), py::arg("exact"), py::arg("max_pixels"), py::arg("pixels"), py::arg("threads"));
#endif
  module.def("instruction_set", &bclip::cpu::instruction_set);
  module.def("exponential_sums", &exponential_sums, py::arg("dots"), py::arg("num_rows"), py::arg("num_columns"),
             py::arg("first"), py::arg("factor"), py::arg("offset"), py::arg("rows"), py::arg("columns"),
             py::arg("threads"));
  module.def("softmax_gradient", &softmax_gradient, py::arg("dots"), py::arg("num_rows"), py::arg("num_columns"),
             py::arg("first"), py::arg("scale"), py::arg("weight"), py::arg("rows_lse"), py::arg("columns_lse"),
             py::arg("positive_grad"), py::arg("groups"), py::arg("threads"));
  module.def("sigmoid_gradient", &sigmoid_gradient, py::arg("dots"), py::arg("num_rows"), py::arg("num_columns"),
             py::arg("first"), py::arg("scale"), py::arg("bias"), py::arg("weight"), py::arg("with_gradients"),
             py::arg("groups"), py::arg("threads"));
  module.def("has_amx", &bclip::cpu::has_amx);
  py::class_<bclip::cpu::AmxProblem>(module, "AmxProblem", py::module_local())
      .def(py::init(&amx_problem), py::arg("image"), py::arg("text"), py::arg("num_rows"), py::arg("num_columns"),
           py::arg("width"), py::arg("first"));
  py::class_<bclip::cpu::AmxGradients>(module, "AmxGradients", py::module_local())
      .def(py::init(&amx_gradients), py::arg("image"), py::arg("text"), py::arg("in_single"), py::arg("scale"));
  module.def("amx_exponential_sums", &amx_exponential_sums, py::arg("problem"), py::arg("factor"), py::arg("offset"),
             py::arg("rows"), py::arg("columns"), py::arg("threads"));
  module.def("amx_softmax_gradient", &amx_softmax_gradient, py::arg("problem"), py::arg("scale"), py::arg("weight"),
             py::arg("rows_lse"), py::arg("columns_lse"), py::arg("positive_grad"), py::arg("groups"),
             py::arg("gradients"), py::arg("threads"));
  module.def("amx_sigmoid_gradient", &amx_sigmoid_gradient, py::arg("problem"), py::arg("scale"), py::arg("bias"),
             py::arg("weight"), py::arg("groups"), py::arg("gradients").none(true), py::arg("threads"));
  py::class_<Values>(module, "Values", py::module_local())
      .def(py::init(&values), py::arg("address"), py::arg("half"));
  py::class_<Dropout>(module, "Dropout", py::module_local())
      .def(py::init(&dropout), py::arg("seed"), py::arg("drop_below"), py::arg("kept"));
  module.def("add_norm", &add_norm, py::arg("rows"), py::arg("columns"), py::arg("stream"), py::arg("branch"),
             py::arg("weight"), py::arg("bias"), py::arg("total"), py::arg("normed"), py::arg("wide"), py::arg("eps"),
             py::arg("dropout"), py::arg("threads"));
  module.def("add_norm_backward", &add_norm_backward, py::arg("rows"), py::arg("columns"), py::arg("grad"),
             py::arg("wide_grad"), py::arg("total_grad"), py::arg("total"), py::arg("weight"), py::arg("stream_grad"),
             py::arg("branch_grad"), py::arg("weight_grad"), py::arg("bias_grad"), py::arg("eps"), py::arg("dropout"),
             py::arg("threads"));
  module.def("gelu", &gelu, py::arg("x"), py::arg("out"), py::arg("count"), py::arg("threads"));
  module.def("gelu_backward", &gelu_backward, py::arg("grad"), py::arg("x"), py::arg("out"), py::arg("count"),
             py::arg("threads"));
  py::class_<bclip::cpu::Attention>(module, "Attention", py::module_local())
      .def(py::init(&attention), py::arg("instruction_set"), py::arg("qkv"), py::arg("bfloat16"), py::arg("num_rows"),
           py::arg("num_heads"), py::arg("dim"), py::arg("bounds"), py::arg("num_sequences"),
           py::arg("key_mask"), py::arg("causal"), py::arg("scale"), py::arg("dropout_p"), py::arg("seed"));
  module.def("attention_instruction_sets", &bclip::cpu::attention_instruction_sets, py::arg("bfloat16"));
  module.def("attention_forward", &attention_forward, py::arg("attention"), py::arg("out"), py::arg("lse"),
             py::arg("threads"));
  module.def("attention_backward", &attention_backward, py::arg("attention"), py::arg("out_grad"), py::arg("out"),
             py::arg("lse"), py::arg("qkv_grad"), py::arg("threads"));
  py::class_<bclip::cpu::PooledAttention>(module, "PooledAttention", py::module_local())
      .def(py::init(&pooled_attention), py::arg("instruction_set"), py::arg("query"), py::arg("key_value"), py::arg("bfloat16"),
           py::arg("num_tokens"), py::arg("num_sequences"), py::arg("num_heads"), py::arg("dim"), py::arg("bounds"),
           py::arg("rows"), py::arg("causal"), py::arg("scale"), py::arg("dropout_p"), py::arg("seed"));
  module.def("pooled_attention_forward", &pooled_attention_forward, py::arg("attention"), py::arg("out"),
             py::arg("lse"), py::arg("threads"));
  module.def("pooled_attention_backward", &pooled_attention_backward, py::arg("attention"), py::arg("out_grad"),
             py::arg("out"), py::arg("lse"), py::arg("query_grad"), py::arg("key_value_grad"), py::arg("threads"));
  module.def("product_workspace", &bclip::cpu::product_workspace, py::arg("columns"), py::arg("depth"));
  module.def("amx_product", &amx_product, py::arg("rows"), py::arg("columns"), py::arg("depth"), py::arg("left"),
             py::arg("left_transposed"), py::arg("right"), py::arg("right_transposed"), py::arg("right_in_single"),
             py::arg("bias"), py::arg("result"), py::arg("result_in_single"), py::arg("left_sums"),
             py::arg("workspace"), py::arg("threads"));
  module.def("amx_screen", &amx_screen, py::arg("left"), py::arg("right"), py::arg("num_rows"), py::arg("num_columns"),
             py::arg("width"), py::arg("row_low"), py::arg("row_high"), py::arg("column_low"), py::arg("column_high"),
             py::arg("row_counts"), py::arg("column_counts"), py::arg("most"), py::arg("threads"));
  module.def("dot_products", &dot_products, py::arg("left"), py::arg("right"), py::arg("num_columns"),
             py::arg("width"), py::arg("pairs"), py::arg("count"), py::arg("out"), py::arg("threads"));
}
