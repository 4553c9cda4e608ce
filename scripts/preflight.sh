#!/usr/bin/env bash
# Reports missing requirements for building lora_ext, and what to install. Usage: preflight.sh PYTHON
set -u
python=$1
problems=0
complain() { # problem, remedy
  printf 'lora_ext set-up: %s\n    %s\n' "$1" "$2" >&2
  problems=1
}

if ! command -v "$python" >/dev/null; then
  complain "no $python on PATH" "Install Python 3.10 or newer (apt-get install python3 python3-venv), or name one: make PYTHON=/path/to/python3"
else
  version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    complain "$python is Python $version, want 3.10 or newer" "Install a newer one and name it: make PYTHON=/path/to/python3.12"
  "$python" -c 'import venv, ensurepip' 2>/dev/null ||
    complain "$python has no venv module" "apt-get install python3-venv (Debian, Ubuntu), or use another Python"
fi

compiler=${CXX:-c++}
if ! command -v "${compiler%% *}" >/dev/null; then
  complain "no C++ compiler ($compiler)" "apt-get install g++ (Debian, Ubuntu) or dnf install gcc-c++ (Fedora), or set CXX"
else
  object=$(mktemp)
  printf '#include <bit>\nint main() {\n#ifdef __x86_64__\n__builtin_cpu_supports("avx512bf16");\n#endif\nreturn std::bit_cast<int>(0.0f); }\n' | $compiler -std=c++20 -x c++ -c -o "$object" - 2>/dev/null ||
    complain "$compiler is too old: it does not compile C++20, or does not know AVX512-BF16" "Install g++ 11 or newer, or clang 16 or newer, and set CXX"
  rm -f "$object"
fi
exit $problems
