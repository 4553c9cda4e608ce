// Lets wheels that are built on a newer system run on those of 2018 (manylinux_2_28: glibc 2.28, the libstdc++ of GCC
// 8): defines what GCC's headers leave to a newer libstdc++ or glibc. Every library contains a copy of its own, which
// it does not export (exports.map). A compiler that wants more is found by `make wheel`: auditwheel refuses the tag. On
// a system with glibc 2.28, newer compilers bring all this in a static library.
#include <dlfcn.h>
#include <features.h>

#include <exception>
#include <new>
#include <sstream>
#include <string>

#if defined(__GLIBCXX__) && defined(__GLIBC_PREREQ)
#if __GLIBC_PREREQ(2, 29)

// glibc 2.32. Whether libstdc++ may count references without atomics: it never may.
extern "C" char __libc_single_threaded;
char __libc_single_threaded = 0;

namespace std {

// GCC 11.
void __throw_bad_array_new_length() { throw bad_array_new_length(); }

// GCC 9 and 11.
template basic_ostringstream<char>::basic_ostringstream();
template basic_stringstream<char>::basic_stringstream();
template basic_string<char> basic_stringbuf<char>::str() const&;
template basic_string<char> basic_stringbuf<char>::str() &&;

// GCC 12 counts references to exceptions, which pybind11 holds, by two functions of their own. Older ones do it in the
// copy constructor and the destructor, which every libstdc++ exports.
namespace __exception_ptr {

void exception_ptr::_M_addref() noexcept {
  using Copy = void (*)(void*, const exception_ptr*);
  static const auto copy = reinterpret_cast<Copy>(dlsym(RTLD_DEFAULT, "_ZNSt15__exception_ptr13exception_ptrC1ERKS0_"));
  void* counted;  // and never released
  copy(&counted, this);
}

void exception_ptr::_M_release() noexcept {
  using Destroy = void (*)(exception_ptr*);
  static const auto destroy =
      reinterpret_cast<Destroy>(dlsym(RTLD_DEFAULT, "_ZNSt15__exception_ptr13exception_ptrD1Ev"));
  destroy(this);
}

}  // namespace __exception_ptr
}  // namespace std

#endif
#endif
