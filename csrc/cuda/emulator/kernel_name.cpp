// The names of kernels. They have internal linkage, so that dladdr() doesn't find them. The full
// table of symbols in the module's file does.
#include <cxxabi.h>
#include <dlfcn.h>
#include <elf.h>

#include <cstdlib>
#include <fstream>
#include <iterator>
#include <map>
#include <memory>
#include <regex>
#include <stdexcept>

#include "csrc/cuda/emulator/counters.h"

namespace bclip::cuda::emulator {
namespace {

struct Symbol {
  std::string file, name;
};

// The functions of an ELF file by their addresses. A symbol of a file precedes its local symbols.
std::map<uintptr_t, Symbol> functions_of(const char* path) {
  std::ifstream stream(path, std::ios::binary);
  const std::string bytes{std::istreambuf_iterator<char>(stream), {}};
  const auto at = [&](uint64_t offset) { return bytes.data() + offset; };
  const auto& header = *reinterpret_cast<const Elf64_Ehdr*>(at(0));
  const auto* const sections = reinterpret_cast<const Elf64_Shdr*>(at(header.e_shoff));
  std::map<uintptr_t, Symbol> functions;
  for (int index = 0; index < header.e_shnum; ++index) {
    const Elf64_Shdr& section = sections[index];
    if (section.sh_type != SHT_SYMTAB) continue;
    const char* const names = at(sections[section.sh_link].sh_offset);
    const auto* const symbols = reinterpret_cast<const Elf64_Sym*>(at(section.sh_offset));
    std::string file;
    for (uint64_t i = 0; i < section.sh_size / sizeof(Elf64_Sym); ++i) {
      const Elf64_Sym& symbol = symbols[i];
      const char* const name = names + symbol.st_name;
      if (ELF64_ST_TYPE(symbol.st_info) == STT_FILE) file = name;
      if (ELF64_ST_TYPE(symbol.st_info) == STT_FUNC) functions[symbol.st_value] = {file, name};
    }
  }
  return functions;
}

std::string replaced(const std::string& text, const char* pattern, const char* by) {
  return std::regex_replace(text, std::regex(pattern), by);
}

}  // namespace

std::string kernel_name(const void* kernel) {
  Dl_info info;
  if (!dladdr(kernel, &info)) throw std::runtime_error("the kernel is in no module");
  static const std::map<uintptr_t, Symbol> functions = functions_of(info.dli_fname);
  const auto found = functions.find(reinterpret_cast<uintptr_t>(kernel) -
                                    reinterpret_cast<uintptr_t>(info.dli_fbase));
  if (found == functions.end()) throw std::runtime_error("the kernel has no symbol");
  const std::unique_ptr<char, void (*)(void*)> demangled(
      abi::__cxa_demangle(found->second.name.c_str(), nullptr, nullptr, nullptr), std::free);
  // void bclip::cuda::(anonymous namespace)::forward<bclip::cuda::Half, 64>(...)
  std::string name = replaced(demangled.get(), R"(\(anonymous namespace\)::)", "");
  name = replaced(name, "bclip::|cuda::|emulator::", "");
  name = replaced(name, R"(\(.*|^void )", "");
  name = replaced(name, "unsigned char", "uint8");
  if (name.back() != '>') name += "<>";
  return replaced(found->second.file, R"([_.].*)", "") + "_" + name;
}

}  // namespace bclip::cuda::emulator
