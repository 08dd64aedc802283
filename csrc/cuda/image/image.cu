// The resize of csrc/image.h in Pillow's arithmetic: a pass sums products of bytes with
// coefficients of 22 binary places and rounds to a byte. A small kernel writes the coefficients.
// Then a block of threads computes a tile of a square, one pixel per thread. The first pass goes to
// shared memory, a chunk of lines at a time, so any scale needs at most 2 KiB.
#include "csrc/cuda/image/image.h"

#include <algorithm>
#include <type_traits>

#include "csrc/image_edges.h"
#include "csrc/cuda/device.cuh"

namespace bclip::cuda {
namespace {

constexpr int kSide = kImageSide, kChunk = kImageChunk, kThreads = kImageThreads, kPrecision = 22;

__device__ inline double filter(double x, bool bicubic) {
  x = x < 0 ? -x : x;
  if (!bicubic) return x < 1 ? 1 - x : 0;
  constexpr double a = -0.5;
  if (x < 1) return product(product(product(a + 2, x) - (a + 3), x), x) + 1;
  return x < 2 ? product(product(product(x - 5, x) + 8, x) - 4, a) : 0;
}

// A thread computes an output of an axis. The order of sums and roundings is Pillow's. Products
// without product() are by a power of two, which is exact.
__global__ void __launch_bounds__(kThreads) weigh(ImageResize call) {
  const int64_t index = block_index() * kThreads + thread_index();
  if (index >= call.count * 2 * call.size) return;
  const ImageLayout& image = call.images[index / (2 * call.size)];
  if (load_global(&image.pixels) < 0) return;
  const Axis& axis = index / call.size % 2 ? image.second : image.first;
  const int64_t output = index % call.size, length = load_global(&axis.length);
  const double scale = double(length) / double(load_global(&axis.resized)),
               stretch = scale > 1 ? scale : 1;
  const double reach = (call.bicubic ? 2 : 1) * stretch,
               center = product(double(load_global(&axis.offset) + output) + 0.5, scale);
  const int begin = int(center - reach + 0.5), end = int(center + reach + 0.5);
  const int low = begin < 0 ? 0 : begin, high = end > length ? int(length) : end;
  const auto weight = [&](int x) {
    return filter(product(x - center + 0.5, 1 / stretch), call.bicubic);
  };
  double sum = 0;
  for (int x = low; x < high; ++x) sum += weight(x);
  int32_t* const words =
      call.weights + load_global(&axis.words) + output * (2 + load_global(&axis.taps));
  store_global(&words[0], low);
  store_global(&words[1], high - low);
  for (int x = low; x < high; ++x) {
    const double normal = (sum != 0 ? weight(x) / sum : weight(x)) * (1 << kPrecision);
    store_global(&words[2 + x - low], int32_t(normal < 0 ? normal - 0.5 : normal + 0.5));
  }
}

__device__ inline int level_of(int sum) {
  const int level = sum >> kPrecision;
  return level < 0 ? 0 : level > 255 ? 255 : level;
}

__device__ inline void put(float* to, float value) { store_global(to, value); }
template <class T>
__device__ inline void put(T* to, float value) {
  store_global(&to->bits, uint16_t(pack<T>(value, 0.0f)));
}

// The index in shared memory of pixel i of line j of a chunk. The first pass stores 32 lines or 16
// pixels at once, and the second reads lines that are a step of the resize apart. Lines permute
// their pixels, so that these are in different banks.
__device__ inline int place_of(int line, int pixel) {
  return line * kSide + (pixel ^ (line / 2 & (kSide - 1)));
}

template <class T>
__global__ void __launch_bounds__(kThreads) resize(ImageResize call) {
  constexpr int kHalf = 1 << (kPrecision - 1);
  const Shared<uint32_t> between{0};  // (kChunk, kSide) pixels
  const int size = call.size, tiles = (size + kSide - 1) / kSide;
  const int64_t index = block_index() / (int64_t(tiles) * tiles);
  const int tile = int(block_index() - index * tiles * tiles);
  const int top = tile / tiles * kSide, left = tile % tiles * kSide;
  const int row = top + thread_index() / kSide, column = left + thread_index() % kSide;
  const bool inside = row < size && column < size;
  const ImageLayout& image = call.images[index];
  int levels[3] = {};
  const int64_t pixels = load_global(&image.pixels);
  if (pixels >= 0) {
    const bool along = load_global(&image.along_first);
    const Axis &first = image.first, &second = image.second;
    const auto words = [&](const Axis& axis, int output) {
      return call.weights + load_global(&axis.words) + output * (2 + load_global(&axis.taps));
    };
    const int first_origin = along ? left : top, second_origin = along ? top : left;
    const int column_in_chunk = along ? column - left : row - top;
    const int32_t* const last =
        words(second, (second_origin + kSide < size ? second_origin + kSide : size) - 1);
    const int begin = load_global(words(second, second_origin)),
              end = load_global(&last[0]) + load_global(&last[1]);
    const int32_t* const taps_of_output =
        words(second, inside ? (along ? row : column) : second_origin);
    const int low = load_global(&taps_of_output[0]),
              high = inside ? low + load_global(&taps_of_output[1]) : low;
    int sums[3] = {kHalf, kHalf, kHalf};
    for (int start = begin; start < end; start += kChunk) {
      for (int at = thread_index(); at < kSide * kChunk; at += kThreads) {
        rejoin_lanes();
        // Neighbouring threads read neighbouring pixels of a row.
        const int i = along ? at % kSide : at / kChunk, j = along ? at / kSide : at % kChunk;
        if (first_origin + i >= size || start + j >= end) continue;
        const int32_t* const taps = words(first, first_origin + i);
        const int count = load_global(&taps[1]);
        const int64_t step = load_global(&first.step);
        const uint8_t* from =
            call.pixels + pixels + (load_global(&first.start) + load_global(&taps[0])) * step +
            (load_global(&second.start) + start + j) * load_global(&second.step);
        int red = kHalf, green = kHalf, blue = kHalf;
        for (int x = 0; x < count; ++x, from += step) {
          const int coefficient = load_global(&taps[2 + x]);
          red += load_global(&from[0]) * coefficient;
          green += load_global(&from[1]) * coefficient;
          blue += load_global(&from[2]) * coefficient;
        }
        rejoin_lanes();
        between.store(place_of(j, i),
                      uint32_t(level_of(red) | level_of(green) << 8 | level_of(blue) << 16));
      }
      block_barrier();
      const int stop = high < start + kChunk ? high : start + kChunk;
      for (int x = low > start ? low : start; x < stop; ++x) {
        const uint32_t pixel = between.load(place_of(x - start, column_in_chunk));
        const int coefficient = load_global(&taps_of_output[2 + x - low]);
        for (int c = 0; c < 3; ++c) sums[c] += int(pixel >> 8 * c & 255) * coefficient;
      }
      block_barrier();
    }
    for (int c = 0; c < 3; ++c) levels[c] = level_of(sums[c]);
  }
  if (!inside) return;
  for (int c = 0; c < 3; ++c) {
    if constexpr (std::is_same_v<T, uint8_t>) {
      T* const to =
          static_cast<T*>(call.out) + ((index * size + row) * size + column) * 3 + c;
      store_global(to, T(levels[c]));
    } else {
      T* const to = static_cast<T*>(call.out) + ((index * 3 + c) * size + row) * size + column;
      put(to, float(levels[c]) * call.factor[c] + call.shift[c]);
    }
  }
}

Axis axis_of(const Edge& edge, int64_t step, bool bicubic, int size, int64_t& words) {
  const double stretch = std::max(double(edge.length) / double(edge.resized), 1.0);
  const int64_t taps = std::min(int64_t((bicubic ? 4 : 2) * stretch) + 2, edge.length);
  const Axis axis{edge.start, edge.length, edge.resized, edge.offset, step, taps, words};
  words += size * (2 + taps);
  return axis;
}

}  // namespace

ImagePlan image_plan(const std::vector<std::vector<int64_t>>& places, int size, cpu::Crop crop,
                     const int64_t* boxes, bool bicubic) {
  ImagePlan plan;
  for (size_t index = 0; index < places.size(); ++index) {
    const int64_t pixels = places[index].at(0), height = places[index].at(1),
                  width = places[index].at(2);
    ImageLayout image{-1, {}, {}, 0};
    if (pixels >= 0) {
      try {
        const auto [down, along] =
            edges(size, crop, boxes ? boxes + 4 * index : nullptr, height, width);
        const Axis vertical = axis_of(down, 3 * width, bicubic, size, plan.words);
        const Axis horizontal = axis_of(along, 3, bicubic, size, plan.words);
        const bool down_first = is_down_first(down, along);
        image = {pixels, down_first ? vertical : horizontal, down_first ? horizontal : vertical,
                 !down_first};
      } catch (const std::invalid_argument& error) {
        plan.errors.emplace_back(index, error.what());
      }
    }
    plan.images.push_back(image);
  }
  return plan;
}

void image_resize(const ImageResize& call) {
  const int64_t tiles = (call.size + kSide - 1) / kSide, outputs = call.count * 2 * call.size;
  launch(weigh, {(outputs + kThreads - 1) / kThreads, kThreads, 0, call.stream}, call);
  void (*kernel)(ImageResize) = nullptr;
  switch (call.type) {
    case ImageType::kUint8:
      kernel = resize<uint8_t>;
      break;
    case ImageType::kFloat32:
      kernel = resize<float>;
      break;
    case ImageType::kFloat16:
      kernel = resize<Half>;
      break;
    case ImageType::kBfloat16:
      kernel = resize<Bfloat16>;
      break;
  }
  launch(kernel, {call.count * tiles * tiles, kThreads, kImageSharedBytes, call.stream}, call);
}

}  // namespace bclip::cuda
