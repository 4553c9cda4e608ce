// Parameters of the CUDA kernels of lora_grouped_, besides those that all devices share.
//
// Which row has which group, the ranks and the scalings are read on the device only: nothing here waits for it, and a
// CUDA graph that captured a call follows their later values. Grids have a size that suits every choice. So a number
// that does not exist cannot be refused: its row of y and of grad_x becomes NaN.
#pragma once

#include <cstdint>

#include "../common/params.h"

namespace lora_ext::cuda {

// Which row has which group. An entry stands for rows_per_entry rows that follow each other.
struct GroupedRows {
  int64_t num_tokens, num_groups, num_entries, rows_per_entry;
  const int64_t* group_of_row;  // [num_entries]
  const double* scalings;       // [num_groups]
  const int64_t* ranks;         // [num_groups], where there are ranks
  double rescale;               // 1 / (1 - p)
  bool has_ranks;
};

// The largest number of rows that the index takes.
constexpr int64_t kMostGroupedRows = 2147483647;

}  // namespace lora_ext::cuda
