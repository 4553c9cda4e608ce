// Reads the library's ELF symbols: the names of kernels and their __shared__ variables, which the stand-in turns into
// thread-local variables.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace simt {

struct FunctionSymbol {
  std::string mangled, demangled;
};

struct SharedVariable {
  std::string name;     // as written in the kernel
  size_t offset, size;  // in the thread-local block
};

struct Module {
  const char* base;                     // where the library is loaded
  const char *image_begin, *image_end;  // its code and data, constants among them
  std::string path;

  FunctionSymbol function_at(const void* address) const;
  // Returns the variables declared in the body of this function.
  std::vector<SharedVariable> shared_variables_of(const FunctionSymbol& function) const;

  struct Symbol {
    std::string name;
    uint64_t value, size;
  };
  std::vector<Symbol> functions, thread_locals;
};

const Module& this_module();

// This OS thread's copy of the library's thread-local block.
struct ThreadLocalBlock {
  uint8_t* begin;
  size_t size;
};
ThreadLocalBlock thread_local_block();

}  // namespace simt
