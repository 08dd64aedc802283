// Compares resampling with integer loops, bit for bit. With libjpeg (BCLIP_JPEG) it also compares
// whole images with a direct use of the decoder and a plain implementation of Pillow's resize.
#include "csrc/image.h"

#include <cstdio>

#include "csrc/cpu/image/image_kernels.h"
#include "csrc/image_edges.h"
#include "checks.h"

#ifdef BCLIP_JPEG
#include <jpeglib.h>
#endif

namespace checks {

namespace {

uint8_t rounded(int64_t sum) {
  return static_cast<uint8_t>(std::clamp<int64_t>((sum + (int64_t{1} << 21)) >> 22, 0, 255));
}

// Checks the portable kernels on any processor, while decode_resize() uses those of BCLIP_CPU_ISA.
void check_resampling() {
  const ResampleKernels& kernels = bclip::cpu::portable::kResample;
  Random random(11);
  const int64_t groups = 9, quads = 3, width = 4 * groups, size = 22, padded = 24;
  std::vector<std::vector<uint8_t>> rows(12,
                                         std::vector<uint8_t>(3 * width + bclip::cpu::kPadding));
  for (auto& row : rows)
    for (uint8_t& byte : row) byte = static_cast<uint8_t>(random.below(256));
  std::vector<int> first;
  std::vector<int32_t> coefficients;  // (padded, 4 quads)
  std::vector<Quad> packed;
  for (int64_t i = 0; i < padded; ++i) {
    first.push_back(static_cast<int>(random.below(groups - quads + 1)));
    for (int64_t k = 0; k < 4 * quads; ++k)
      coefficients.push_back(
          static_cast<int32_t>(random.uniform(-0.2, 0.4) * (1 << bclip::cpu::kPrecision)));
    for (int64_t q = 0; q < quads; ++q)
      packed.push_back(kernels.pack(&coefficients[4 * (i * quads + q)]));
  }
  Buffer<float> as_numbers(static_cast<int64_t>(rows.size()) * 3 * width);
  for (int64_t i = 0; i < as_numbers.size(); ++i)
    as_numbers[i] = rows[i / (3 * width)][i % (3 * width)];
  const std::vector<double> bytes = exact(as_numbers);
  // An injected fault of 1/2 becomes 64 levels.
  const auto byte = [&](int64_t row, int64_t at) {
    const double value = bytes[row * 3 * width + at];
    return static_cast<int64_t>(value) + (value != std::floor(value) ? 64 : 0);
  };

  std::vector<uint8_t> scratch(64 * groups), out(4 * (3 * padded + bclip::cpu::kPadding), 0xA5);
  const uint8_t* from[4];
  uint8_t* to[4];
  for (int64_t i = 0; i < 4; ++i) {
    from[i] = rows[4 + i].data();
    to[i] = out.data() + i * (3 * padded + bclip::cpu::kPadding);
  }
  kernels.along(
      from, Taps{first.data(), packed.data(), static_cast<int>(padded), static_cast<int>(quads)},
      static_cast<int>(groups), scratch.data(), to);
  for (int64_t row = 0; row < 4; ++row)
    for (int64_t i = 0; i < padded; ++i)
      for (int64_t color = 0; color < 3; ++color) {
        int64_t sum = 0;
        for (int64_t k = 0; k < 4 * quads; ++k)
          sum += coefficients[4 * quads * i + k] * byte(4 + row, 3 * (4 * first[i] + k) + color);
        compare("resampling: along rows", to[row][3 * i + color], rounded(sum), 0);
      }

  std::vector<const uint8_t*> window;
  for (const auto& row : rows) window.push_back(row.data());
  std::vector<uint8_t> column(3 * size + 1, 0xA5);
  kernels.across(window.data(), packed.data(), static_cast<int>(quads), 3 * size, column.data());
  for (int64_t i = 0; i < 3 * size; ++i) {
    int64_t sum = 0;
    for (int64_t k = 0; k < 4 * quads; ++k) sum += coefficients[k] * byte(k, i);
    compare("resampling: across rows", column[i], rounded(sum), 0);
  }
  expect("resampling: across rows stays inside its output", column.back() == 0xA5);
}

#ifdef BCLIP_JPEG

using Pixels = std::vector<uint8_t>;  // (height, width, 3)

Pixels test_image(int height, int width) {
  Random random(static_cast<uint64_t>(height) * 1000 + width);
  Pixels pixels(static_cast<size_t>(height) * width * 3);
  for (int y = 0; y < height; ++y)
    for (int x = 0; x < width; ++x)
      for (int color = 0; color < 3; ++color)
        pixels[(static_cast<size_t>(y) * width + x) * 3 + color] =
            static_cast<uint8_t>(128 + 90 * std::sin(0.13 * x * (color + 1) + 0.02 * y) +
                                 30 * std::cos(0.3 * y) + random.uniform(-4, 4));
  return pixels;
}

std::string encode(const Pixels& pixels, int height, int width) {
  jpeg_compress_struct jpeg{};
  jpeg_error_mgr errors{};
  jpeg.err = jpeg_std_error(&errors);
  jpeg_create_compress(&jpeg);
  unsigned char* data = nullptr;
  unsigned long size = 0;
  jpeg_mem_dest(&jpeg, &data, &size);
  jpeg.image_height = height;
  jpeg.image_width = width;
  jpeg.input_components = 3;
  jpeg.in_color_space = JCS_RGB;
  jpeg_set_defaults(&jpeg);
  jpeg_set_quality(&jpeg, 90, TRUE);
  jpeg_start_compress(&jpeg, TRUE);
  for (int y = 0; y < height; ++y) {
    auto* row = const_cast<uint8_t*>(pixels.data()) + static_cast<size_t>(y) * width * 3;
    jpeg_write_scanlines(&jpeg, &row, 1);
  }
  jpeg_finish_compress(&jpeg);
  jpeg_destroy_compress(&jpeg);
  std::string file(reinterpret_cast<char*>(data), size);
  std::free(data);
  return file;
}

Pixels decode(const std::string& file, int height, int width) {
  jpeg_decompress_struct jpeg{};
  jpeg_error_mgr errors{};
  jpeg.err = jpeg_std_error(&errors);
  jpeg_create_decompress(&jpeg);
  jpeg_mem_src(&jpeg, reinterpret_cast<const unsigned char*>(file.data()), file.size());
  jpeg_read_header(&jpeg, TRUE);
  jpeg.out_color_space = JCS_RGB;
  jpeg_start_decompress(&jpeg);
  Pixels pixels(static_cast<size_t>(height) * width * 3);
  while (jpeg.output_scanline < jpeg.output_height) {
    uint8_t* row = pixels.data() + static_cast<size_t>(jpeg.output_scanline) * width * 3;
    jpeg_read_scanlines(&jpeg, &row, 1);
  }
  jpeg_finish_decompress(&jpeg);
  jpeg_destroy_decompress(&jpeg);
  if (fault == Fault::kEntries)
    for (size_t i = pixels.size() / 2; i < pixels.size() / 2 + 30; ++i) pixels[i] ^= 128;
  return pixels;
}

double cubic(double x) {
  constexpr double a = -0.5;
  x = std::abs(x);
  if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  return x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0;
}

// Resizes `count` lines of RGB pixels to `size` pixels each. Pixels of a line are `next` bytes
// apart, lines are `line` bytes apart.
Pixels resize(const Pixels& pixels, int64_t count, int64_t line, int64_t next,
              const bclip::Edge& edge, int64_t size, bool lines_are_rows) {
  Pixels result(count * size * 3);
  const double scale = static_cast<double>(edge.length) / static_cast<double>(edge.resized);
  const double stretch = std::max(scale, 1.0), reach = 2 * stretch;
  for (int64_t i = 0; i < size; ++i) {
    const double center = (static_cast<double>(edge.offset + i) + 0.5) * scale;
    const int64_t low = std::max<int64_t>(0, static_cast<int64_t>(center - reach + 0.5));
    const int64_t high = std::min(edge.length, static_cast<int64_t>(center + reach + 0.5));
    std::vector<double> weights;
    double total = 0;
    for (int64_t x = low; x < high; ++x) {
      weights.push_back(cubic((static_cast<double>(x) - center + 0.5) * (1 / stretch)));
      total += weights.back();
    }
    for (int64_t other = 0; other < count; ++other)
      for (int64_t color = 0; color < 3; ++color) {
        int64_t sum = 0;
        for (int64_t x = low; x < high; ++x) {
          const double normal = weights[x - low] / total * (1 << 22);
          sum += static_cast<int64_t>(normal < 0 ? normal - 0.5 : normal + 0.5) *
                 pixels[other * line + (edge.start + x) * next + color];
        }
        result[(lines_are_rows ? other * size + i : i * count + other) * 3 + color] = rounded(sum);
      }
  }
  return result;
}

void check_images() {
  struct Size {
    int height, width;
  };
  // Images that are taller, wider and smaller than the result, and one whose height is resized
  // first.
  for (const Size of : {Size{83, 61}, Size{57, 131}, Size{19, 23}, Size{211, 35}}) {
    const std::string name = "image " + std::to_string(of.width) + "x" + std::to_string(of.height);
    const std::string file = encode(test_image(of.height, of.width), of.height, of.width);
    const bclip::cpu::ImageSize size = bclip::cpu::jpeg_size(file);
    expect(name + ": its size is read", size.height == of.height && size.width == of.width);
    const Pixels expected = decode(file, of.height, of.width);
    Pixels result(expected.size());
    bclip::cpu::decode_jpeg(file, result.data(), of.height, of.width);
    for (size_t i = 0; i < result.size(); ++i)
      compare(name + ": decoded", result[i], expected[i], 0);

    constexpr int kSize = 32;
    const auto [vertical, horizontal] =
        bclip::edges(kSize, bclip::cpu::Crop::kSquash, nullptr, of.height, of.width);
    Pixels square;
    if (bclip::is_down_first(vertical, horizontal)) {
      square = resize(expected, of.width, 3, int64_t{3} * of.width, vertical, kSize, false);
      square = resize(square, kSize, int64_t{3} * of.width, 3, horizontal, kSize, true);
    } else {
      square = resize(expected, of.height, int64_t{3} * of.width, 3, horizontal, kSize, true);
      square = resize(square, kSize, 3, 3 * kSize, vertical, kSize, false);
    }
    const std::vector<std::string_view> files = {
        file, std::string_view(file).substr(0, file.size() / 2), file};
    Pixels squares(3 * kSize * kSize * 3, 0xA5);
    const auto errors = bclip::cpu::decode_resize(
        files, {kSize, bclip::cpu::Crop::kSquash, nullptr, true, true, 1 << 20}, squares.data(),
        kThreads);
    expect(name + ": the truncated file is named, no other",
           errors.size() == 1 && errors[0].first == 1);
    for (size_t i = 0; i < square.size(); ++i) {
      compare(name + ": resized", squares[i], square[i], 0);
      compare(name + ": resized", squares[2 * square.size() + i], square[i], 0);
    }
  }
}

#else

void check_images() {
  std::printf("images: not checked, as libjpeg for this target was not result\n");
}

#endif

}  // namespace

void check_image() {
  check_resampling();
  check_images();
}

}  // namespace checks
