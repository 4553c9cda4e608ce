"""Runs the CPU kernels and their bindings under the compiler's sanitizers: `make asan`, `make ubsan`, `make tsan`."""
