// Lets wheels that are built on a newer system run on those of 2018 (manylinux_2_28: glibc 2.28, the libstdc++ of GCC
// 8): defines what GCC's headers leave to a newer libstdc++ or glibc. Every library contains a copy of its own, which
// it does not export (exports.map). A compiler that wants more is found by `make wheel`: auditwheel refuses the tag. On
// a system with glibc 2.28, newer compilers bring all this in a static library.
#include <features.h>

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

}  // namespace std

#endif
#endif
