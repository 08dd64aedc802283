#include "csrc/ranking.h"

#include "csrc/cpu/simd/isa.h"
#include "checks.h"

namespace checks {

void check_ranking() {
  const int64_t rows = 13, columns = 29, width = 83, count = 4097;  // two tasks
  Random random(3);
  const Buffer<float> left(rows * width, random, -1, 1), right(columns * width, random, -1, 1);
  std::vector<int64_t> pairs(count);
  for (int64_t& pair : pairs) pair = random.below(rows * columns);
  Buffer<double> out(count), again(count);
  bclip::cpu::dot_products(left.data(), right.data(), columns, width, pairs.data(), count,
                           out.data(), 1);
  bclip::cpu::dot_products(left.data(), right.data(), columns, width, pairs.data(), count,
                           again.data(), kThreads);
  expect("dot products fp32: the same on more threads", out.same_bits(again));
  expect("dot products fp32: stay inside their output", out.intact());
  const std::vector<double> lefts = exact(left), rights = exact(right);
  for (int64_t p = 0; p < count; ++p) {
    const double *one = lefts.data() + pairs[p] / columns * width,
                 *two = rights.data() + pairs[p] % columns * width;
    double truth = 0, size = 0;
    for (int64_t k = 0; k < width; ++k) {
      truth += one[k] * two[k];
      size += std::abs(one[k] * two[k]);
    }
    // Products are exact in double precision; both sums round.
    compare("dot products fp32", out[p], truth, 2 * static_cast<double>(width) * 0x1p-53 * size);
  }
  if (bclip::cpu::has_amx()) return;
  expect_refusal("ranking: AMX is refused where it is missing",
                 [] { bclip::cpu::amx_screen({}, 1, 1); });
}

}  // namespace checks
