#include "module.h"

#include <cxxabi.h>
#include <dlfcn.h>
#include <elf.h>
#include <link.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace simt {
namespace {

// The C library allocates a thread's copy of the block at the first access to one of its variables.
thread_local volatile char touched = 1;

std::string demangle(const std::string& mangled) {
  int status = 0;
  char* text = abi::__cxa_demangle(mangled.c_str(), nullptr, nullptr, &status);
  std::string result = status == 0 ? text : mangled;
  free(text);
  return result;
}

std::vector<char> read_file(const std::string& path) {
  std::vector<char> bytes;
  if (FILE* file = fopen(path.c_str(), "rb")) {
    fseek(file, 0, SEEK_END);
    bytes.resize(static_cast<size_t>(ftell(file)));
    rewind(file);
    bytes.resize(fread(bytes.data(), 1, bytes.size(), file));
    fclose(file);
  }
  return bytes;
}

void read_symbols(Module& module) {
  const std::vector<char> file = read_file(module.path);
  if (file.size() < sizeof(ElfW(Ehdr))) return;
  const auto* header = reinterpret_cast<const ElfW(Ehdr)*>(file.data());
  const auto* sections = reinterpret_cast<const ElfW(Shdr)*>(file.data() + header->e_shoff);
  for (int i = 0; i < header->e_shnum; ++i) {
    if (sections[i].sh_type != SHT_SYMTAB) continue;
    const auto* symbols = reinterpret_cast<const ElfW(Sym)*>(file.data() + sections[i].sh_offset);
    const char* names = file.data() + sections[sections[i].sh_link].sh_offset;
    for (size_t j = 0; j < sections[i].sh_size / sizeof(ElfW(Sym)); ++j) {
      const Module::Symbol symbol{names + symbols[j].st_name, symbols[j].st_value, symbols[j].st_size};
      const int type = ELF64_ST_TYPE(symbols[j].st_info);
      if (type == STT_FUNC && symbol.value != 0) module.functions.push_back(symbol);
      if (type == STT_TLS) module.thread_locals.push_back(symbol);
    }
  }
  std::sort(module.thread_locals.begin(), module.thread_locals.end(),
            [](const Module::Symbol& a, const Module::Symbol& b) { return a.value < b.value; });
}

Module load_module() {
  Module module{};
  Dl_info info{};
  dladdr(reinterpret_cast<const void*>(&load_module), &info);
  module.base = static_cast<const char*>(info.dli_fbase);
  module.path = info.dli_fname;
  dl_iterate_phdr(
      [](dl_phdr_info* object, size_t, void* data) {
        Module& module = *static_cast<Module*>(data);
        if (reinterpret_cast<const char*>(object->dlpi_addr) != module.base) return 0;
        module.image_begin = module.base;
        for (int i = 0; i < object->dlpi_phnum; ++i) {
          const ElfW(Phdr) & segment = object->dlpi_phdr[i];
          if (segment.p_type != PT_LOAD) continue;
          module.image_end = std::max(module.image_end, module.base + segment.p_vaddr + segment.p_memsz);
        }
        return 1;
      },
      &module);
  read_symbols(module);
  return module;
}

}  // namespace

const Module& this_module() {
  static const Module module = load_module();
  return module;
}

FunctionSymbol Module::function_at(const void* address) const {
  const uint64_t value = static_cast<uint64_t>(static_cast<const char*>(address) - base);
  for (const Symbol& symbol : functions) {
    if (symbol.value == value) return {symbol.name, demangle(symbol.name)};
  }
  return {"", "?"};
}

std::vector<SharedVariable> Module::shared_variables_of(const FunctionSymbol& function) const {
  // A variable of function _Zxyz is mangled _ZZxyzE<length><name>.
  std::vector<SharedVariable> variables;
  if (function.mangled.compare(0, 2, "_Z") != 0) return variables;
  const std::string prefix = "_ZZ" + function.mangled.substr(2) + "E";
  for (const Symbol& symbol : thread_locals) {
    if (symbol.name.compare(0, prefix.size(), prefix) != 0) continue;
    const std::string rest = symbol.name.substr(prefix.size());
    const size_t digits = rest.find_first_not_of("0123456789");
    const std::string name = digits == 0 ? rest : rest.substr(digits, strtoul(rest.c_str(), nullptr, 10));
    variables.push_back({name, symbol.value, symbol.size});
  }
  return variables;
}

ThreadLocalBlock thread_local_block() {
  touched = 1;
  ThreadLocalBlock block{};
  dl_iterate_phdr(
      [](dl_phdr_info* object, size_t, void* data) {
        if (reinterpret_cast<const char*>(object->dlpi_addr) != this_module().base) return 0;
        auto& block = *static_cast<ThreadLocalBlock*>(data);
        block.begin = static_cast<uint8_t*>(object->dlpi_tls_data);
        for (int i = 0; i < object->dlpi_phnum; ++i) {
          if (object->dlpi_phdr[i].p_type == PT_TLS) block.size = object->dlpi_phdr[i].p_memsz;
        }
        return 1;
      },
      &block);
  return block;
}

}  // namespace simt
