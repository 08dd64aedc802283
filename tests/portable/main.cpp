// Compares the CPU kernels with loops in double precision, without Python or torch.
//
//   checks                   fails unless every result is within its bound
//   checks --fault=entries   gives the references altered inputs, and fails unless every quantity
//                            exceeds its bound
//   checks --fault=rounding  gives the references inputs in bfloat16, and fails unless every fp32
//                            quantity exceeds its bound
//
// BCLIP_CPU_ISA chooses the instruction set, as in the package.
#include <cstdio>
#include <map>

#include "csrc/cpu/simd/isa.h"
#include "checks.h"

namespace checks {

Fault fault = Fault::kNone;
std::string instruction_set;

namespace {

struct Quantity {
  int64_t count = 0, wrong = 0;
  double worst = 0;  // error / bound
};

std::map<std::string, Quantity> quantities;
std::map<std::string, bool> properties;

}  // namespace

void compare(const std::string& quantity, double value, double exact, double bound) {
  Quantity& all = quantities[quantity];
  ++all.count;
  // Equal values agree for any bound, also infinite ones.
  const double error = value == exact ? 0 : std::abs(value - exact);
  if (!(error <= bound)) {
    if (all.wrong++ == 0 && fault == Fault::kNone)
      std::printf("FAILED %s: %.9g instead of %.9g, error %.3g, allowed %.3g\n", quantity.c_str(),
                  value, exact, error, bound);
    return;
  }
  if (error > 0) all.worst = std::max(all.worst, error / bound);
}

void expect(const std::string& property, bool holds) {
  const bool before = properties.count(property) == 0 || properties[property];
  properties[property] = before && holds;
  if (!holds) std::printf("FAILED %s\n", property.c_str());
}

}  // namespace checks

int main(int count, char** arguments) {
  using namespace checks;
  const std::string argument = count > 1 ? arguments[1] : "";
  if (argument == "--fault=entries") {
    fault = Fault::kEntries;
  } else if (argument == "--fault=rounding") {
    fault = Fault::kRounding;
  } else if (!argument.empty()) {
    std::fprintf(stderr, "unknown argument %s; known: --fault=entries, --fault=rounding\n",
                 argument.c_str());
    return 2;
  }
  checks::instruction_set = bclip::cpu::instruction_set();
  check_attention();
  check_single_query_attention();
  check_contrastive();
  check_pointwise();
  check_ranking();
  check_image();

  int failed = 0;
  if (fault == Fault::kNone) {
    for (const auto& [name, quantity] : quantities) {
      std::printf("%-58s %6lld values, at most %.2f of the bound%s\n", name.c_str(),
                  static_cast<long long>(quantity.count), quantity.worst,
                  quantity.wrong ? ", FAILED" : "");
      failed += quantity.wrong > 0;
    }
    for (const auto& [name, holds] : properties) failed += !holds;
    std::printf("%s: %zu quantities and %zu properties, %d failed\n", checks::instruction_set.c_str(),
                quantities.size(), properties.size(), failed);
  } else {
    int missed = 0, noticed = 0;
    for (const auto& [name, quantity] : quantities) {
      // bf16 inputs and bytes are exact in bfloat16.
      if (fault == Fault::kRounding && name.find("fp32") == std::string::npos) continue;
      (quantity.wrong ? noticed : missed) += 1;
      if (!quantity.wrong) std::printf("MISSED %s\n", name.c_str());
    }
    std::printf("%s %s: noticed in %d quantities, missed in %d\n", checks::instruction_set.c_str(),
                argument.c_str(), noticed, missed);
    failed = missed + (noticed == 0);
  }
  return failed ? 1 : 0;
}
