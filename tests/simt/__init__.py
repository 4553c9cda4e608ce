"""Runs the CUDA kernels on the CPU, every CUDA thread a fiber, and finds bugs in them. README.md tells how."""
