#include "../image.h"

#include <csetjmp>
#include <cstdio>
#include <stdexcept>
#include <string>

#include <jpeglib.h>
#include <jerror.h>

namespace bclip::cpu {
namespace {

// A progressive file can repeat scans without end; no real encoder writes more than a few dozen.
constexpr int kMaxScans = 500;

// libjpeg reports errors by a callback that must not return, and C++ exceptions must not cross its C frames: so each
// error jumps back to the reader's setjmp, where no object with a destructor has been made since.
struct Reader {
  jpeg_decompress_struct jpeg;
  jpeg_error_mgr errors;
  jpeg_progress_mgr progress;
  std::jmp_buf back;
  char message[JMSG_LENGTH_MAX];
};

[[noreturn]] void fail(j_common_ptr jpeg) {
  auto* reader = static_cast<Reader*>(jpeg->client_data);
  (*jpeg->err->format_message)(jpeg, reader->message);
  std::longjmp(reader->back, 1);
}

void on_message(j_common_ptr jpeg, int level) {
  if (level < 0) {
    // Damage inside the entropy-coded data can't be told from picture, but an end before the end can: libjpeg would
    // paint the missing rows grey.
    if (jpeg->err->msg_code == JWRN_JPEG_EOF) fail(jpeg);
    jpeg->err->num_warnings++;
  }
}

void on_progress(j_common_ptr common) {
  auto* jpeg = reinterpret_cast<j_decompress_ptr>(common);
  if (jpeg->input_scan_number <= kMaxScans) return;
  auto* reader = static_cast<Reader*>(common->client_data);
  std::snprintf(reader->message, sizeof reader->message, "more than %d scans", kMaxScans);
  std::longjmp(reader->back, 1);
}

void open(Reader& reader, const uint8_t* data, size_t size) {
  reader.jpeg.err = jpeg_std_error(&reader.errors);
  reader.errors.error_exit = fail;
  reader.errors.emit_message = on_message;
  reader.jpeg.client_data = &reader;
  jpeg_create_decompress(&reader.jpeg);
  reader.progress.progress_monitor = on_progress;
  reader.jpeg.progress = &reader.progress;
  jpeg_mem_src(&reader.jpeg, data, static_cast<unsigned long>(size));
  jpeg_read_header(&reader.jpeg, TRUE);
}

[[noreturn]] void refuse(Reader& reader, const char* what) {
  std::string message = std::string(what) + ": " + reader.message;
  jpeg_destroy_decompress(&reader.jpeg);
  throw std::invalid_argument(message);
}

uint8_t times_over_255(int a, int b) {
  const int product = a * b + 128;
  return static_cast<uint8_t>((product + (product >> 8)) >> 8);
}

// Files hold CMYK inverted, as Adobe writes it. Pillow's conversion: red = k - round(k * cyan / 255) with k the light
// that black lets through.
void cmyk_to_rgb(const uint8_t* cmyk, uint8_t* rgb, int width) {
  for (int x = 0; x < width; ++x, cmyk += 4, rgb += 3) {
    for (int channel = 0; channel < 3; ++channel) {
      rgb[channel] = static_cast<uint8_t>(cmyk[3] - times_over_255(255 - cmyk[channel], cmyk[3]));
    }
  }
}

}  // namespace

ImageSize jpeg_size(const uint8_t* data, size_t size) {
  Reader reader{};
  if (setjmp(reader.back)) refuse(reader, "not a JPEG");
  open(reader, data, size);
  const ImageSize result{static_cast<int>(reader.jpeg.image_height), static_cast<int>(reader.jpeg.image_width)};
  jpeg_destroy_decompress(&reader.jpeg);
  return result;
}

void decode_jpeg(const uint8_t* data, size_t size, uint8_t* pixels, int height, int width) {
  Reader reader{};
  if (setjmp(reader.back)) refuse(reader, "JPEG cannot be decoded");
  open(reader, data, size);
  jpeg_decompress_struct& jpeg = reader.jpeg;
  if (static_cast<int>(jpeg.image_height) != height || static_cast<int>(jpeg.image_width) != width) {
    std::snprintf(reader.message, sizeof reader.message, "it is %ux%u, the output %dx%d", jpeg.image_width,
                  jpeg.image_height, width, height);
    refuse(reader, "JPEG does not fit");
  }
  const bool cmyk = jpeg.jpeg_color_space == JCS_CMYK || jpeg.jpeg_color_space == JCS_YCCK;
  jpeg.out_color_space = cmyk ? JCS_CMYK : JCS_RGB;
  jpeg_start_decompress(&jpeg);
  // From libjpeg's pool, which jpeg_destroy_decompress frees on every path.
  uint8_t* const cmyk_row = cmyk ? static_cast<uint8_t*>((*jpeg.mem->alloc_large)(
                                       reinterpret_cast<j_common_ptr>(&jpeg), JPOOL_IMAGE, size_t{4} * width))
                                 : nullptr;
  while (jpeg.output_scanline < jpeg.output_height) {
    uint8_t* const out = pixels + static_cast<size_t>(jpeg.output_scanline) * width * 3;
    JSAMPROW row = cmyk ? cmyk_row : out;
    jpeg_read_scanlines(&jpeg, &row, 1);
    if (cmyk) cmyk_to_rgb(cmyk_row, out, width);
  }
  jpeg_finish_decompress(&jpeg);
  jpeg_destroy_decompress(&jpeg);
}

}  // namespace bclip::cpu
