#include "csrc/cpu/register.h"
#include "csrc/cpu/simd/isa.h"

using namespace bclip::bindings;

PYBIND11_MODULE(_cpu, module) {
  module.doc() = "CPU kernels on raw pointers; the wrappers in bclip_fast.ops make every check.";
  module.def("instruction_set", &bclip::cpu::instruction_set);
  module.def("has_amx", &bclip::cpu::has_amx);
  register_attention(module);
  register_checksum(module);
  register_contrastive(module);
#ifdef BCLIP_JPEG
  register_image(module);
#endif
  register_matmul(module);
  register_pointwise(module);
  register_ranking(module);
}
