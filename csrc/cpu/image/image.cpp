#include "csrc/image.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <mutex>
#include <stdexcept>

#include "csrc/image_edges.h"
#include "csrc/cpu/image/image_kernels.h"
#include "csrc/cpu/image/jpeg_reader.h"
#include "csrc/cpu/parallel.h"

namespace bclip::cpu {
namespace {

const ResampleKernels& kernels() {
#ifdef BCLIP_X86_TARGETS
  if (has_vnni()) return vnni::kResample;
  if (isa_in_use() != Isa::kPortable) return avx2::kResample;
#endif
  return portable::kResample;
}

double cubic(double x) {
  constexpr double a = -0.5;
  if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  return x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0;
}

double triangle(double x) { return x < 1 ? 1 - x : 0; }

// The coefficients for an edge that is decoded at 1 / `reduced` of its length. The order of sums
// and roundings is Pillow's.
class Axis {
 public:
  Axis(const Edge& edge, int reduced, int size, bool bicubic, int align) {
    base = static_cast<int>(edge.start / reduced);
    const double from = static_cast<double>(edge.start) / reduced - base;
    const double length = static_cast<double>(edge.length) / reduced;
    const int last_pixel = static_cast<int>(std::ceil(from + length));
    const double scale = length / edge.resized, stretch = std::max(scale, 1.0),
                 reach = (bicubic ? 2 : 1) * stretch;
    // The window [low, high) of output i.
    const auto window = [&](int i) {
      const double center = from + (edge.offset + i + 0.5) * scale;
      return std::pair{std::max(0, static_cast<int>(center - reach + 0.5)),
                       std::min(last_pixel, static_cast<int>(center + reach + 0.5))};
    };
    const int shift = window(0).first;
    base += shift;
    for (int i = 0; i < size; ++i) {
      const auto [low, high] = window(i);
      num_quads = std::max(num_quads, (high - shift - (low - shift) / align * align + 3) / 4);
    }
    count = (size + 3) / 4 * 4;
    first_.resize(count);
    quads_.resize(static_cast<size_t>(count) * num_quads,
                  kernels().pack(std::vector<int32_t>(4).data()));
    ends.resize(size);
    std::vector<double> weights;
    std::vector<int32_t> rounded(4 * num_quads);
    for (int i = 0; i < size; ++i) {
      const auto [low, high] = window(i);
      const double center = from + (edge.offset + i + 0.5) * scale;
      weights.clear();
      double sum = 0;
      for (int x = 0; x < high - low; ++x) {
        const double distance = std::abs((x + low - center + 0.5) * (1 / stretch));
        weights.push_back(bicubic ? cubic(distance) : triangle(distance));
        sum += weights.back();
      }
      first_[i] = (low - shift) / align;
      ends[i] = high - shift;
      std::fill(rounded.begin(), rounded.end(), 0);
      int32_t* to = rounded.data() + (low - shift) - first_[i] * align;
      for (const double weight : weights) {
        const double normal = (sum != 0 ? weight / sum : weight) * (1 << kPrecision);
        *to++ = static_cast<int32_t>(normal < 0 ? normal - 0.5 : normal + 0.5);
      }
      for (int q = 0; q < num_quads; ++q) {
        quads_[static_cast<size_t>(i) * num_quads + q] = kernels().pack(rounded.data() + 4 * q);
      }
    }
  }

  Taps taps() const { return {first_.data(), quads_.data(), count, num_quads}; }
  int first(int i) const { return first_[i]; }
  const Quad* quads(int i) const { return quads_.data() + static_cast<size_t>(i) * num_quads; }
  int length() const { return ends.back(); }

  int base = 0;  // the pixel of the decoded image to which other members are relative
  int count = 0;
  int num_quads = 0;
  std::vector<int> ends;  // end of each output's window

 private:
  std::vector<int> first_;
  std::vector<Quad> quads_;
};

// Whether the approximate mode may decode at 1 / `reduced` of the size. Fewer decoded pixels are
// faster but less exact. On figures at 224 pixels, 1.25 decoded pixels for each pixel of the result
// give a mean error of half a level. With 1.5 pixels the error is a quarter of a level, and with 1
// pixel nearly one level.
bool has_spare_pixels(const Edge& edge, int reduced) {
  return static_cast<double>(edge.length) >= 1.25 * static_cast<double>(reduced * edge.resized);
}

// Decodes four rows at a time and resamples them while they are in the L1 cache.
struct Rows {
  Reader& reader;
  const Axis &down, &along;
  const int size, first_column;
  uint8_t* const pixels;

  int taps_down() const { return 4 * down.num_quads; }
  int num_slots() const { return (taps_down() + 7) / 4 * 4; }
  int num_groups() const { return along.first(size - 1) + along.num_quads; }
  size_t decoded_size() const {
    return std::max<size_t>(3 * reader.jpeg.output_width, 3 * first_column + 12 * num_groups()) +
           kPadding;
  }
  size_t resized_size() const { return size_t{3} * along.count + kPadding; }
  uint8_t* result(int row) const { return pixels + int64_t{3} * size * row; }

  void along_first() const {
    std::vector<uint8_t> decoded(kRowsAtOnce * decoded_size()), groups(size_t{64} * num_groups());
    std::vector<uint8_t> ring(num_slots() * resized_size());
    const auto slot = [&](int row) { return ring.data() + row % num_slots() * resized_size(); };
    uint8_t *rows[kRowsAtOnce], *slots[kRowsAtOnce];
    const uint8_t* cropped[kRowsAtOnce];
    for (int i = 0; i < kRowsAtOnce; ++i) {
      rows[i] = decoded.data() + i * decoded_size();
      cropped[i] = rows[i] + 3 * first_column;
    }
    std::vector<const uint8_t*> window(taps_down());
    for (int row = 0, done = 0; done < size; row += kRowsAtOnce) {
      const int end = std::min(down.length(), row + kRowsAtOnce);
      reader.read(rows, end - row);
      for (int i = 0; i < kRowsAtOnce; ++i) slots[i] = slot(row + i);
      kernels().along(cropped, along.taps(), num_groups(), groups.data(), slots);
      for (; done < size && down.ends[done] <= end; ++done) {
        for (int i = 0; i < taps_down(); ++i) window[i] = slot(down.first(done) + i);
        kernels().across(window.data(), down.quads(done), down.num_quads, int64_t{3} * size,
                         result(done));
      }
    }
  }

  void down_first() const {
    const int64_t width = int64_t{12} * num_groups();
    std::vector<uint8_t> ring(num_slots() * decoded_size()), groups(size_t{64} * num_groups());
    std::vector<uint8_t> buffer(kRowsAtOnce * (width + kPadding + resized_size()));
    const auto slot = [&](int row) { return ring.data() + row % num_slots() * decoded_size(); };
    uint8_t *slots[kRowsAtOnce], *between[kRowsAtOnce], *resized[kRowsAtOnce];
    for (int i = 0; i < kRowsAtOnce; ++i) {
      between[i] = buffer.data() + i * (width + kPadding + resized_size());
      resized[i] = between[i] + width + kPadding;
    }
    std::vector<const uint8_t*> window(taps_down());
    for (int row = 0, done = 0; done < size; row += kRowsAtOnce) {
      const int end = std::min(down.length(), row + kRowsAtOnce);
      for (int i = 0; i < kRowsAtOnce; ++i) slots[i] = slot(row + i);
      reader.read(slots, end - row);
      for (; done < size && down.ends[done] <= end;) {
        for (int i = 0; i < taps_down(); ++i)
          window[i] = slot(down.first(done) + i) + 3 * first_column;
        kernels().across(window.data(), down.quads(done), down.num_quads, width,
                         between[done % kRowsAtOnce]);
        if (++done % kRowsAtOnce && done < size) continue;
        kernels().along(between, along.taps(), num_groups(), groups.data(), resized);
        const int first = (done - 1) / kRowsAtOnce * kRowsAtOnce;
        for (int i = first; i < done; ++i)
          std::memcpy(result(i), resized[i - first], size_t{3} * size);
      }
    }
  }
};

void decode_resize_one(std::string_view data, const DecodeResize& options, int64_t index,
                       uint8_t* pixels) {
  Reader reader(data);
  jpeg_decompress_struct& jpeg = reader.jpeg;
  const int64_t height = reader.height(), width = reader.width();
  if (height * width > options.max_pixels) {
    throw std::invalid_argument("JPEG of " + std::to_string(width) + "x" + std::to_string(height) +
                                " pixels exceeds the limit of " +
                                std::to_string(options.max_pixels) + " pixels");
  }
  const auto [vertical, horizontal] =
      edges(options.size, options.crop, options.boxes ? options.boxes + 4 * index : nullptr, height,
            width);
  const auto may_reduce = [&, v = vertical, h = horizontal](int by) {
    return !options.exact && has_spare_pixels(v, by) && has_spare_pixels(h, by);
  };
  int reduced = 1;
  while (reduced < 8 && may_reduce(2 * reduced)) reduced *= 2;
  const int size = options.size;
  const Axis down(vertical, reduced, size, options.bicubic, 1),
      along(horizontal, reduced, size, options.bicubic, 4);
  jpeg.scale_num = 1;
  jpeg.scale_denom = reduced;
  jpeg.do_fancy_upsampling = !may_reduce(reduced);
  reader.start();
  int first_column = along.base;
  // Chroma upsampling reads neighbouring columns. With two more columns on each side, the decoder's
  // edge doesn't change the pixels of the crop. The smoothing of a progressive file reads further,
  // so such a file isn't cropped.
  const int left = std::max(0, along.base - 2);
  const int right = std::min(static_cast<int>(jpeg.output_width), along.base + along.length() + 2);
  if (!jpeg.progressive_mode && right - left < static_cast<int>(jpeg.output_width)) {
    JDIMENSION start = left, columns = right - left;
    reader.run(Reader::kFailed, [&] { jpeg_crop_scanline(&jpeg, &start, &columns); });
    first_column -= static_cast<int>(start);
  }
  if (down.base > 0) reader.run(Reader::kFailed, [&] { jpeg_skip_scanlines(&jpeg, down.base); });

  const Rows rows{reader, down, along, size, first_column, pixels};
  if (is_down_first(vertical, horizontal)) {
    rows.down_first();
  } else {
    rows.along_first();
  }
  // Detects faults after the last row, like decode_jpeg().
  if (jpeg.output_scanline == jpeg.output_height) reader.finish();
}

}  // namespace

ImageSize jpeg_size(std::string_view data) {
  const Reader reader(data);
  return {reader.height(), reader.width()};
}

void decode_jpeg(std::string_view data, uint8_t* pixels, int height, int width, int reduced,
                 bool needs_end) {
  Reader reader(data, needs_end ? End::kRequired : End::kOptional);
  const int full_height = (reader.height() + reduced - 1) / reduced,
            full_width = (reader.width() + reduced - 1) / reduced;
  if (full_height != height || full_width != width) {
    throw std::invalid_argument("JPEG does not fit: it is " + std::to_string(full_width) + "x" +
                                std::to_string(full_height) + ", the output " +
                                std::to_string(width) + "x" + std::to_string(height));
  }
  reader.jpeg.scale_num = 1;
  reader.jpeg.scale_denom = reduced;
  reader.start();
  constexpr int kMost = 16;
  uint8_t* rows[kMost];
  for (int row = 0; row < height; row += kMost) {
    const int count = std::min(kMost, height - row);
    for (int i = 0; i < count; ++i) rows[i] = pixels + static_cast<size_t>(row + i) * width * 3;
    reader.read(rows, count);
  }
  reader.finish();
}

std::vector<std::pair<int64_t, std::string>> decode_resize(
    const std::vector<std::string_view>& files, const DecodeResize& options, uint8_t* pixels,
    int threads) {
  std::vector<std::pair<int64_t, std::string>> errors;
  std::mutex mutex;
  kernels();  // throws for an unknown BCLIP_CPU_ISA, which is not a fault of a file
  parallel(static_cast<int64_t>(files.size()), threads, [&](int64_t index) {
    const int64_t bytes = int64_t{3} * options.size * options.size;
    try {
      decode_resize_one(files[index], options, index, pixels + index * bytes);
    } catch (const std::exception& error) {
      std::memset(pixels + index * bytes, 0, bytes);
      const std::lock_guard<std::mutex> lock(mutex);
      errors.emplace_back(index, error.what());
    }
  });
  std::sort(errors.begin(), errors.end());
  return errors;
}

}  // namespace bclip::cpu
