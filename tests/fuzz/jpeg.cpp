// Feeds mutated JPEGs to every function of csrc/image.h. Build it with
// -fsanitize=address,undefined.
//   jpeg SEED FIRST RUNS FILE...
// Run i depends only on SEED, i and the files, so FIRST = i and RUNS = 1 repeat a failure. A signal
// ends the program if a run takes more than ten seconds of CPU time. The sanitizers detect faults
// inside libjpeg only if libjpeg is built with them.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <fstream>
#include <iterator>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include <sys/time.h>

#include "csrc/cpu/simd/isa.h"
#include "csrc/image.h"

namespace {

constexpr int64_t kMaxPixels = 1 << 20;
long current_run = -1;

using Random = std::mt19937_64;

int64_t below(Random& random, int64_t bound) {
  return static_cast<int64_t>(random() % static_cast<uint64_t>(std::max<int64_t>(1, bound)));
}

// The positions of markers, where segments begin. Some may be inside entropy-coded data.
std::vector<size_t> markers(const std::string& data) {
  std::vector<size_t> positions;
  for (size_t i = 0; i + 1 < data.size(); ++i)
    if (data[i] == '\xff' && data[i + 1] != 0 && data[i + 1] != '\xff') positions.push_back(i);
  return positions;
}

std::string mutated(Random& random, const std::vector<std::string>& files) {
  std::string data = files[below(random, files.size())];
  for (int64_t rounds = below(random, 3) ? 1 : 1 + below(random, 4); rounds > 0; --rounds) {
    if (data.empty()) return data;
    const auto starts = markers(data);
    switch (below(random, 6)) {
      case 0:  // bits
        for (int64_t n = 1 + below(random, 8); n > 0; --n)
          data[below(random, data.size())] ^= 1 << below(random, 8);
        break;
      case 1:  // truncation
        data.resize(below(random, data.size()));
        break;
      case 2:  // a byte of a header: sizes, sampling factors, tables, scans
        if (!starts.empty()) {
          const size_t at =
              starts[below(random, std::min<int64_t>(starts.size(), 24))] + 1 + below(random, 24);
          if (at < data.size())
            data[at] = static_cast<char>(below(random, 4) ? random() : 255 * below(random, 2));
        }
        break;
      case 3: {  // a part of another file, at a marker of this one
        const std::string& other = files[below(random, files.size())];
        const auto others = markers(other);
        if (starts.empty() || others.empty()) break;
        const size_t from = others[below(random, others.size())];
        const std::string part = other.substr(from, 2 + below(random, 600));
        const size_t at = starts[below(random, starts.size())];
        data = below(random, 2) ? data.substr(0, at) + part + data.substr(at)
                                : data.substr(0, at) + part +
                                      data.substr(std::min(data.size(), at + part.size()));
        break;
      }
      case 4: {  // a part, repeated or removed
        const size_t from = below(random, data.size()), length = below(random, data.size() - from);
        data = below(random, 2) ? data.substr(0, from) + data.substr(from + length)
                                : data + data.substr(from, length);
        break;
      }
      default: {  // noise
        const size_t from = below(random, data.size());
        for (size_t i = from; i < std::min(data.size(), from + 32); ++i)
          data[i] = static_cast<char>(random());
      }
    }
    if (data.size() > 1 << 18) data.resize(1 << 18);
  }
  return data;
}

// A copy with its exact size, so that a read after its end is outside the allocation.
struct Exact {
  explicit Exact(const std::string& data)
      : bytes(new char[data.size()]), view(bytes.get(), data.size()) {
    std::memcpy(bytes.get(), data.data(), data.size());
  }
  std::unique_ptr<char[]> bytes;
  std::string_view view;
};

struct Counts {
  int64_t read = 0, decoded = 0, resized = 0, refused = 0;
};

void run(Random& random, const std::vector<std::string>& files, Counts& counts) {
  const Exact one(mutated(random, files)), two(mutated(random, files));
  bclip::cpu::ImageSize size{1, 1};
  try {
    size = bclip::cpu::jpeg_size(one.view);
    ++counts.read;
    const int64_t pixels = int64_t{size.height} * size.width;
    if (pixels <= kMaxPixels) {
      const std::unique_ptr<uint8_t[]> out(new uint8_t[3 * pixels]);
      bclip::cpu::decode_jpeg(one.view, out.get(), size.height, size.width);
      ++counts.decoded;
    }
  } catch (const std::invalid_argument&) {
    ++counts.refused;
  }
  const int side = static_cast<int>(1 + below(random, below(random, 4) ? 64 : 400));
  int64_t boxes[8];
  for (int64_t* box = boxes; box < boxes + 8; box += 4) {
    box[0] = below(random, size.height);
    box[1] = below(random, size.width);
    box[2] = 1 + below(random, size.height - box[0] + !below(random, 50));
    box[3] = 1 + below(random, size.width - box[1] + !below(random, 50));
  }
  const auto crop = static_cast<bclip::cpu::Crop>(below(random, 3));
  const bool bicubic = below(random, 2), exact = below(random, 2);
  const std::unique_ptr<uint8_t[]> out(new uint8_t[int64_t{6} * side * side]);
  const auto errors = bclip::cpu::decode_resize({one.view, two.view},
                                                {side, crop, boxes, bicubic, exact, kMaxPixels},
                                                out.get(), 1 + below(random, 50) / 49);
  counts.resized += 2 - static_cast<int64_t>(errors.size());
}

}  // namespace

extern "C" void __asan_on_error() { std::fprintf(stderr, "run %ld\n", current_run); }

int main(int argc, char** argv) {
  if (argc < 5) return std::fprintf(stderr, "usage: %s SEED FIRST RUNS FILE...\n", argv[0]), 2;
  const long seed = std::atol(argv[1]), first = std::atol(argv[2]), runs = std::atol(argv[3]);
  std::vector<std::string> files;
  for (int i = 4; i < argc; ++i) {
    std::ifstream file(argv[i], std::ios::binary);
    files.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
  }
  std::clock_t slowest = 0;
  Counts counts;
  for (current_run = first; current_run < first + runs; ++current_run) {
    std::seed_seq key{seed, current_run};
    Random random(key);
    // CPU time, so that a busy machine doesn't look like a slow decoder.
    const itimerval limit{{0, 0}, {10, 0}};
    setitimer(ITIMER_PROF, &limit, nullptr);
    const std::clock_t begin = std::clock();
    run(random, files, counts);
    slowest = std::max(slowest, std::clock() - begin);
  }
  std::printf(
      "%ld runs of 2 files on %s: headers %ld, decoded %ld, refused %ld, resized %ld; slowest %.2f "
      "s\n",
      current_run - first, bclip::cpu::instruction_set().c_str(), counts.read, counts.decoded,
      counts.refused, counts.resized, static_cast<double>(slowest) / CLOCKS_PER_SEC);
}
