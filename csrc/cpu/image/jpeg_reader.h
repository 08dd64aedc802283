// A JPEG file as rows of RGB pixels, by libjpeg-turbo. Damage of the compressed data is an error.
#pragma once

#include <algorithm>
#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include <jpeglib.h>
#include <jerror.h>

namespace bclip::cpu {

// A progressive file can repeat scans without end. Real encoders write a few dozen at most.
constexpr int kMaxScans = 500;

// Whether a file may lack its end marker. Its pixels must be complete all the same.
enum class End { kRequired, kOptional };

// The start of libjpeg's internal entropy decoder, which is the same in every release since 6.
struct EntropyDecoder {
  void (*start_pass)(j_decompress_ptr jpeg);
  boolean (*decode_mcu)(j_decompress_ptr jpeg, JBLOCKROW* blocks);
};

// libjpeg reports errors through a callback that must not return, and C++ exceptions must not cross
// its C frames. So each error jumps back to run(), which throws. No object with a destructor may be
// created between the two.
class Reader {
 public:
  // The delegated constructor completes the object, so it is destroyed if the rest throws.
  explicit Reader(std::string_view data, End end = End::kRequired) : Reader() {
    end_ = end;
    run("not a JPEG", [&] {
      jpeg_create_decompress(&jpeg);
      progress_.progress_monitor = on_progress;
      jpeg.progress = &progress_;
      jpeg_mem_src(&jpeg, reinterpret_cast<const uint8_t*>(data.data()),
                   static_cast<unsigned long>(data.size()));
      jpeg_read_header(&jpeg, TRUE);
    });
    has_header_ = true;
    jpeg.out_color_space = is_cmyk() ? JCS_CMYK : JCS_RGB;
  }

  Reader(const Reader&) = delete;

  ~Reader() { jpeg_destroy_decompress(&jpeg); }

  template <typename Calls>
  __attribute__((noinline)) void run(const char* failed, Calls calls) {
    if (setjmp(back_)) throw std::invalid_argument(std::string(failed) + ": " + message_);
    calls();
  }

  void start() {
    run(kFailed, [&] {
      jpeg_start_decompress(&jpeg);
      watch_brightness();
    });
  }

  // Reads `count` rows of jpeg.output_width RGB pixels.
  void read(uint8_t* const* rows, int count) {
    if (is_cmyk() && cmyk_.empty()) cmyk_.resize(size_t{4} * jpeg.output_width);
    run(kFailed, [&] {
      for (int done = 0; done < count;) {
        JSAMPROW cmyk = cmyk_.data();
        done += jpeg_read_scanlines(&jpeg, is_cmyk() ? &cmyk : const_cast<JSAMPARRAY>(rows + done),
                                    is_cmyk() ? 1 : count - done);
        if (is_cmyk()) to_rgb(cmyk, rows[done - 1]);
      }
    });
  }

  void finish() {
    run(kFailed, [&] { jpeg_finish_decompress(&jpeg); });
  }

  int height() const { return static_cast<int>(jpeg.image_height); }
  int width() const { return static_cast<int>(jpeg.image_width); }

  static constexpr const char* kFailed = "JPEG cannot be decoded";
  jpeg_decompress_struct jpeg{};

 private:
  Reader() {
    jpeg.err = jpeg_std_error(&errors_);
    errors_.error_exit = fail;
    errors_.emit_message = on_message;
    jpeg.client_data = this;
  }

  [[noreturn]] static void fail(j_common_ptr jpeg) {
    auto* reader = static_cast<Reader*>(jpeg->client_data);
    (*jpeg->err->format_message)(jpeg, reader->message_);
    std::longjmp(reader->back_, 1);
  }

  [[noreturn]] void fail_with(const char* reason) {
    std::snprintf(message_, sizeof message_, "%s", reason);
    std::longjmp(back_, 1);
  }

  static void on_message(j_common_ptr jpeg, int level) {
    if (level >= 0) return;
    if (static_cast<Reader*>(jpeg->client_data)->is_damage(jpeg->err->msg_code)) fail(jpeg);
    jpeg->err->num_warnings++;
  }

  // Whether a warning means that pixels are lost. libjpeg would invent them.
  bool is_damage(int warning) {
    switch (warning) {
      case JWRN_JPEG_EOF:
        lacks_end_ = true;
        return end_ == End::kRequired || !has_header_ || jpeg_has_multiple_scans(&jpeg);
      case JWRN_EXTRANEOUS_DATA:  // some writers leave unused bytes in the header
        return has_header_ && !lacks_end_;
      case JWRN_HIT_MARKER:
      case JWRN_HUFF_BAD_CODE:
      case JWRN_ARITH_BAD_CODE:
      case JWRN_MUST_RESYNC:
        return true;
      default:  // odd headers and orders of scans, which leave the pixels intact
        return false;
    }
  }

  // libjpeg calls this before it decodes each row of blocks.
  static void on_progress(j_common_ptr common) {
    auto* reader = static_cast<Reader*>(common->client_data);
    if (reader->jpeg.input_scan_number > kMaxScans) reader->fail_with("too many scans");
    reader->watch_brightness();
  }

  // Lets decode_watched() decode the blocks of the current scan, if the scan codes their averages.
  void watch_brightness() {
    auto* const entropy = reinterpret_cast<EntropyDecoder*>(jpeg.entropy);
    if (watched_scan_ == jpeg.input_scan_number || !entropy || !entropy->decode_mcu || jpeg.Ss != 0)
      return;
    watched_scan_ = jpeg.input_scan_number;
    // A block's average times 8 is in +-range. Encoders miss it by a step of the quantisation.
    const int range = (8 << (jpeg.data_precision - 1)) + 8 * kMaxOvershoot;
    for (int i = 0; i < jpeg.comps_in_scan; ++i) {
      const JQUANT_TBL* table = jpeg.cur_comp_info[i]->quant_table;
      const int step = table ? std::max<int>(1, table->quantval[0]) : 1;
      max_average_[i] = range / step + (1 << jpeg.Al);
    }
    if (entropy->decode_mcu != decode_watched) {
      decode_mcu_ = entropy->decode_mcu;
      entropy->decode_mcu = decode_watched;
    }
  }

  // Decodes the blocks of one unit. Each average is coded as the difference from the one before, so
  // damage shifts all later ones, and sooner or later one leaves the range of pixels.
  static boolean decode_watched(j_decompress_ptr jpeg, JBLOCKROW* blocks) {
    auto* const reader = static_cast<Reader*>(jpeg->client_data);
    const boolean is_done = reader->decode_mcu_(jpeg, blocks);
    for (int i = 0; blocks && i < jpeg->blocks_in_MCU; ++i) {
      const int limit = reader->max_average_[jpeg->MCU_membership[i]], average = blocks[i][0][0];
      if (average > limit || average < -limit)
        reader->fail_with("Corrupt JPEG data: the brightness of a block is out of range");
    }
    return is_done;
  }

  bool is_cmyk() const {
    return jpeg.jpeg_color_space == JCS_CMYK || jpeg.jpeg_color_space == JCS_YCCK;
  }

  static uint8_t times_over_255(int a, int b) {
    const int product = a * b + 128;
    return static_cast<uint8_t>((product + (product >> 8)) >> 8);
  }

  // Files hold inverted CMYK, as Adobe writes it. This is Pillow's conversion: red = k - round(k *
  // cyan / 255), where k is the light that black lets through.
  void to_rgb(const uint8_t* cmyk, uint8_t* rgb) const {
    for (unsigned x = 0; x < jpeg.output_width; ++x, cmyk += 4, rgb += 3) {
      for (int color = 0; color < 3; ++color) {
        rgb[color] = static_cast<uint8_t>(cmyk[3] - times_over_255(255 - cmyk[color], cmyk[3]));
      }
    }
  }

  // In grey levels. Rounding in an encoder shifts an average by less than one level.
  static constexpr int kMaxOvershoot = 4;

  End end_ = End::kRequired;
  bool has_header_ = false;
  bool lacks_end_ = false;
  int watched_scan_ = 0;
  int max_average_[MAX_COMPS_IN_SCAN] = {};
  boolean (*decode_mcu_)(j_decompress_ptr, JBLOCKROW*) = nullptr;
  jpeg_error_mgr errors_{};
  jpeg_progress_mgr progress_{};
  std::jmp_buf back_{};
  char message_[JMSG_LENGTH_MAX] = {};
  std::vector<uint8_t> cmyk_;
};

}  // namespace bclip::cpu
