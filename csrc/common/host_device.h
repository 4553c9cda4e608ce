// Marks functions that nvcc compiles for the host and for the device.
#pragma once

#if defined(__CUDACC__)
#define LORA_EXT_HOST_DEVICE __host__ __device__
#else
#define LORA_EXT_HOST_DEVICE
#endif
