// Parameters of the CUDA kernels of lora_grouped_, besides those that all devices share.
//
// Which row has which group, the ranks and the scalings are read on the device only: nothing here waits for it, and a
// CUDA graph that captured a call follows their later values. Grids have a size that suits every choice. So a number
// that does not exist cannot be refused: its row of y and of grad_x becomes NaN.
#pragma once

#include <cstdint>

#include "../common/params.h"

namespace lora_ext::cuda {

// An entry of the lists of factors: a matrix of each, or a stack of matrices. Groups are counted through all entries.
struct GroupedEntry {
  int64_t first_group, rank;
  const void* lora_A;                                        // [slots, rank, in_features], factor_dtype
  const void* lora_B;                                        // [slots, out_features, rank], factor_dtype
  void* grad_lora_A = nullptr;                               // as lora_A, contiguous, where it is wanted
  void* grad_lora_B = nullptr;                               // as lora_B, contiguous, where it is wanted
  int64_t A_slot_stride, B_slot_stride, A_stride, B_stride;  // in elements, of matrices and of their rows
  bool wants_grad_A = false, wants_grad_B = false;
};

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
