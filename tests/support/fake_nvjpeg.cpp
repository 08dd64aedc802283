// The functions of nvJPEG that bclip_fast calls, for tests: libjpeg decodes to the host's memory. A
// file with the comment "refuse" fails, and so does its batch. The images that the batch has
// already decoded are then overwritten, because nvJPEG doesn't define them.
//
// A decode leaves its pixels in the state. A copy from there to the output follows in the order of
// the stream. The null stream copies at once. Those of fake_stream() copy as late as a GPU may:
// when somebody waits for them. So a decode on another stream before then changes the result.
#include <csetjmp>
#include <cstdio>
#include <cstring>
#include <functional>
#include <utility>
#include <vector>

#include <jpeglib.h>

namespace {

struct Image {
  unsigned char* channel[4];
  size_t pitch[4];
};

// It starts as csrc/cuda/emulator/stream.cpp says.
struct Stream {
  void (*run)(void*) = [](void* stream) {
    for (const auto& act : std::exchange(static_cast<Stream*>(stream)->work, {})) act();
  };
  std::vector<std::function<void()>> work;
};

struct State {
  void* stream = nullptr;
  std::vector<std::vector<unsigned char>> pixels;

  // nvJPEG orders the uses of a state on one stream.
  void begin(void* next, size_t images) {
    if (stream && stream == next) static_cast<Stream*>(stream)->run(stream);
    stream = next;
    pixels.resize(images);
  }
  void copy(size_t index, Image to) {
    const auto act = [this, index, to] {
      std::memcpy(to.channel[0], pixels[index].data(), pixels[index].size());
    };
    if (!stream) return act();
    static_cast<Stream*>(stream)->work.push_back(act);
  }
};

struct Failure {
  jpeg_error_mgr manager;
  std::jmp_buf back;
};

int batch_size = -1;
Stream streams[2];

int decode(const unsigned char* file, size_t length, int format, const Image& to,
           std::vector<unsigned char>& pixels) {
  if (format != 5) return 2;
  jpeg_decompress_struct jpeg;
  Failure failure;
  jpeg.err = jpeg_std_error(&failure.manager);
  failure.manager.error_exit = [](j_common_ptr any) {
    std::longjmp(reinterpret_cast<Failure*>(any->err)->back, 1);
  };
  failure.manager.emit_message = [](j_common_ptr any, int level) {
    if (level < 0) any->err->error_exit(any);
  };
  jpeg_create_decompress(&jpeg);
  if (setjmp(failure.back)) {
    jpeg_destroy_decompress(&jpeg);
    return 3;
  }
  jpeg_mem_src(&jpeg, file, length);
  jpeg_save_markers(&jpeg, JPEG_COM, 100);
  jpeg_read_header(&jpeg, TRUE);
  if (jpeg.marker_list && !std::memcmp(jpeg.marker_list->data, "refuse", 6))
    std::longjmp(failure.back, 1);
  jpeg.out_color_space = JCS_RGB;
  jpeg.dct_method = JDCT_ISLOW;
  jpeg_start_decompress(&jpeg);
  pixels.resize(jpeg.output_height * to.pitch[0]);
  while (jpeg.output_scanline < jpeg.output_height) {
    unsigned char* row = pixels.data() + jpeg.output_scanline * to.pitch[0];
    jpeg_read_scanlines(&jpeg, &row, 1);
  }
  jpeg_finish_decompress(&jpeg);
  jpeg_destroy_decompress(&jpeg);
  return 0;
}

}  // namespace

#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED int nvjpegCreateEx(int backend, void* device, void* pinned, unsigned flags,
                            void** handle) {
  *handle = &batch_size;
  return backend == 0 && !device && !pinned && flags == 36 ? 0 : 2;
}
EXPORTED int nvjpegDestroy(void*) { return 0; }
EXPORTED int nvjpegJpegStateCreate(void* handle, void** state) {
  *state = new State;
  return handle == &batch_size ? 0 : 2;
}
EXPORTED int nvjpegJpegStateDestroy(void* state) {
  delete static_cast<State*>(state);
  return 0;
}

EXPORTED int nvjpegDecode(void*, void* any, const unsigned char* file, size_t length, int format,
                          Image* to, void* stream) {
  State& state = *static_cast<State*>(any);
  state.begin(stream, 1);
  const int status = decode(file, length, format, *to, state.pixels[0]);
  if (!status) state.copy(0, *to);
  return status;
}

// For a file with the comment "grow", it reports a greater height than the header does.
EXPORTED int nvjpegGetImageInfo(void*, const unsigned char* file, size_t length, int* components,
                                int* subsampling, int* widths, int* heights) {
  *components = *subsampling = 0;
  for (size_t at = 2; at + 9 < length; at += 2 + (file[at + 2] << 8 | file[at + 3])) {
    if (file[at + 1] == 0xfe && !std::memcmp(file + at + 4, "grow", 4)) ++*heights;
    if (file[at + 1] != 0xc0) continue;
    *heights += file[at + 5] << 8 | file[at + 6];
    *widths = file[at + 7] << 8 | file[at + 8];
    return 0;
  }
  return 3;
}

EXPORTED int nvjpegDecodeBatchedInitialize(void*, void*, int batch, int threads, int format) {
  batch_size = batch;
  return batch > 0 && threads > 0 && format == 5 ? 0 : 2;
}

EXPORTED int nvjpegDecodeBatched(void*, void* any, const unsigned char* const* files,
                                 const size_t* lengths, Image* to, void* stream) {
  State& state = *static_cast<State*>(any);
  state.begin(stream, batch_size);
  for (int i = 0; i < batch_size; ++i) {
    if (const int status = decode(files[i], lengths[i], 5, to[i], state.pixels[i])) {
      for (int spoilt = 0; spoilt < i; ++spoilt)
        std::memset(to[spoilt].channel[0], 99, to[spoilt].pitch[0]);
      return status;
    }
  }
  for (int i = 0; i < batch_size; ++i) state.copy(i, to[i]);
  return 0;
}

EXPORTED void* fake_stream(int index) { return &streams[index]; }
EXPORTED void fake_synchronize(void* stream) { static_cast<Stream*>(stream)->run(stream); }
