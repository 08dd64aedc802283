#include "csrc/cuda/image/nvjpeg.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace bclip::cuda {

struct NvJpeg::Image {
  unsigned char* channel[4];
  size_t pitch[4];
};

namespace {

constexpr int kRgbInterleaved = 5, kDefaultBackend = 0;
// As in libjpeg, a malformed stream is an error, and chroma is interpolated.
constexpr unsigned kStrict = 4, kInterpolated = 32;

template <class T>
T* function(void* library, const char* name) {
  void* const address = dlsym(library, name);
  if (!address) throw std::runtime_error(std::string("it has no ") + name);
  return reinterpret_cast<T*>(address);
}

// The size of a file that plain_jpegs() accepts, else (0, 0).
std::pair<int, int> plain_size(std::string_view file) {
  const auto byte = [&](size_t at) { return int(static_cast<unsigned char>(file[at])); };
  const auto two = [&](size_t at) { return byte(at) << 8 | byte(at + 1); };
  constexpr std::pair<int, int> kUnsuitable{0, 0};
  if (file.size() < 4 || two(0) != 0xffd8 || two(file.size() - 2) != 0xffd9) return kUnsuitable;
  std::pair<int, int> size = kUnsuitable;
  int components = 0;
  for (size_t at = 2; at + 4 <= file.size();) {
    if (byte(at) != 0xff) return kUnsuitable;
    const int marker = byte(at + 1);
    if (marker == 0xff) {
      ++at;
      continue;
    }
    const size_t length = two(at + 2);
    if (length < 2 || at + 2 + length > file.size()) return kUnsuitable;
    const size_t body = at + 4, end = at + 2 + length;
    if (marker == 0xc0) {
      if (components || length < 8 || byte(body) != 8) return kUnsuitable;
      size = {two(body + 1), two(body + 3)};
      components = byte(body + 5);
      if ((components != 1 && components != 3) || length != 8 + size_t(3) * components)
        return kUnsuitable;
      if (components == 3 && (byte(body + 10) != 0x11 || byte(body + 13) != 0x11))
        return kUnsuitable;
      const int luma = byte(body + 7);
      if (components == 3 && luma != 0x11 && luma != 0x21 && luma != 0x22 && luma != 0x12 &&
          luma != 0x41)
        return kUnsuitable;
      for (int i = 0; i < components; ++i) {
        // The ids of RGB components are letters.
        if (byte(body + 6 + 3 * i) > 3) return kUnsuitable;
      }
    } else if (marker > 0xc0 && marker < 0xd0 && marker != 0xc4 && marker != 0xc8) {
      return kUnsuitable;
    } else if (marker == 0xee && length >= 14 && file.substr(body, 5) == "Adobe") {
      if (byte(body + 11) != 1) return kUnsuitable;
    } else if (marker == 0xda) {
      return components && end > body && byte(body) == components && size.first && size.second
                 ? size
                 : kUnsuitable;
    } else if (marker < 0xc0 || (marker >= 0xd0 && marker < 0xda)) {
      return kUnsuitable;
    }
    at = end;
  }
  return kUnsuitable;
}

}  // namespace

struct NvJpeg::Functions {
  // Each returns 0 on success. Enumerations are ints; handles and streams are pointers.
  int (*create)(int backend, void* device_allocator, void* pinned_allocator, unsigned flags,
                void** handle);
  int (*destroy)(void* handle);
  int (*create_state)(void* handle, void** state);
  int (*destroy_state)(void* state);
  int (*size)(void* handle, const unsigned char* file, size_t length, int* components,
              int* subsampling, int* widths, int* heights);
  int (*initialize)(void* handle, void* state, int batch, int threads, int format);
  int (*decode_batch)(void* handle, void* state, const unsigned char* const* files,
                      const size_t* lengths, Image* to, void* stream);
  int (*decode)(void* handle, void* state, const unsigned char* file, size_t length, int format,
                Image* to, void* stream);
};

std::vector<std::pair<int, int>> plain_jpegs(const std::vector<std::string_view>& files) {
  std::vector<std::pair<int, int>> sizes;
  for (const auto& file : files) sizes.push_back(plain_size(file));
  return sizes;
}

NvJpeg::NvJpeg(const std::string& path) {
  // The library and its functions are never released, because the library keeps threads and memory.
  void* const library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!library) throw std::runtime_error(dlerror());
  functions_ = new Functions{
      function<int(int, void*, void*, unsigned, void**)>(library, "nvjpegCreateEx"),
      function<int(void*)>(library, "nvjpegDestroy"),
      function<int(void*, void**)>(library, "nvjpegJpegStateCreate"),
      function<int(void*)>(library, "nvjpegJpegStateDestroy"),
      function<int(void*, const unsigned char*, size_t, int*, int*, int*, int*)>(
          library, "nvjpegGetImageInfo"),
      function<int(void*, void*, int, int, int)>(library, "nvjpegDecodeBatchedInitialize"),
      function<int(void*, void*, const unsigned char* const*, const size_t*, Image*, void*)>(
          library, "nvjpegDecodeBatched"),
      function<int(void*, void*, const unsigned char*, size_t, int, Image*, void*)>(library,
                                                                                    "nvjpegDecode"),
  };
  const auto check = [&](int status, const char* name) {
    if (!status) return;
    release();
    throw std::runtime_error(std::string(name) + " fails with status " + std::to_string(status));
  };
  check(functions_->create(kDefaultBackend, nullptr, nullptr, kStrict | kInterpolated, &handle_),
        "nvjpegCreateEx");
  for (void*& state : states_)
    check(functions_->create_state(handle_, &state), "nvjpegJpegStateCreate");
}

NvJpeg::~NvJpeg() {
  try {
    last_work_.wait();
  } catch (const std::runtime_error&) {
    // A device that fails has no work to wait for.
  }
  release();
}

void NvJpeg::release() {
  for (void* state : states_) {
    if (state) functions_->destroy_state(state);
  }
  if (handle_) functions_->destroy(handle_);
}

std::vector<int64_t> NvJpeg::decode(const std::vector<std::string_view>& files,
                                    const std::vector<uint8_t*>& pixels,
                                    const std::vector<int>& widths, int threads, void* stream) {
  std::vector<int64_t> refused;
  if (files.empty()) return refused;
  if (pixels.size() != files.size() || widths.size() != files.size())
    throw std::invalid_argument("lists differ");
  const std::lock_guard<std::mutex> lock(mutex_);
  std::vector<const unsigned char*> data;
  std::vector<size_t> lengths;
  std::vector<Image> images;
  std::vector<int64_t> indices;
  for (size_t i = 0; i < files.size(); ++i) {
    const auto* const file = reinterpret_cast<const unsigned char*>(files[i].data());
    int components = 0, subsampling = 0, own_widths[4] = {}, own_heights[4] = {};
    const int status = functions_->size(handle_, file, files[i].size(), &components, &subsampling,
                                        own_widths, own_heights);
    // nvJPEG writes as many pixels as the header says, so these must match the memory.
    if (status || std::pair{own_heights[0], own_widths[0]} != plain_size(files[i]) ||
        own_widths[0] != widths[i]) {
      refused.push_back(i);
      continue;
    }
    data.push_back(file);
    lengths.push_back(files[i].size());
    images.push_back({{pixels[i]}, {size_t(3) * widths[i]}});
    indices.push_back(i);
  }
  if (data.empty()) return refused;
  // The states hold memory that work on another stream may still use.
  last_work_.wait();
  const auto failed = decode_with_states(data, lengths, images, threads, stream);
  last_work_.record(stream);
  for (const int i : failed) refused.push_back(indices[i]);
  return refused;
}

std::vector<int> NvJpeg::decode_with_states(const std::vector<const unsigned char*>& files,
                                            const std::vector<size_t>& lengths,
                                            std::vector<Image>& images, int threads, void* stream) {
  std::vector<int> failed;
  const int count = static_cast<int>(files.size());
  if (!functions_->initialize(handle_, states_[0], count, threads, kRgbInterleaved) &&
      !functions_->decode_batch(handle_, states_[0], files.data(), lengths.data(), images.data(),
                                stream)) {
    return failed;
  }
  // nvJPEG doesn't name the file that failed, so each file is decoded by itself.
  for (int i = 0; i < count; ++i) {
    if (functions_->decode(handle_, states_[1], files[i], lengths[i], kRgbInterleaved, &images[i],
                           stream)) {
      failed.push_back(i);
    }
  }
  return failed;
}

}  // namespace bclip::cuda
