// From a group's number to its factors, rank and scaling, on the device.
//
// The first entries of the lists travel with a kernel's parameters: a pool's stacks, or some tens of adapters. Longer
// lists are written to the workspace, by launches that carry their entries in the same way: a graph that captured them
// holds no address of host memory.
#pragma once

#include "../launch.cuh"
#include "../plan.h"
#include "../mma/operands.cuh"
#include "tile_sizes.h"

namespace lora_ext::cuda::grouped {

struct GroupTable {
  GroupedEntry inline_entries[kInlineEntries];
  const GroupedEntry* all_entries;  // [num_entries], if there are more than kInlineEntries
  int num_entries;
  GroupedRows rows;

  __device__ __forceinline__ const GroupedEntry& entry_of(int64_t number) const {
    const GroupedEntry* entries = num_entries > kInlineEntries ? all_entries : inline_entries;
    int first = 0, count = num_entries;
    while (count > 1) {
      const int half = count / 2;
      if (entries[first + half].first_group <= number) {
        first += half;
        count -= half;
      } else {
        count = half;
      }
    }
    return entries[first];
  }
};

static_assert(sizeof(GroupTable) <= 3 * 1024, "the parameters of a kernel fit in 4 KiB, which every driver takes");

__device__ __forceinline__ int64_t group_number(const GroupedRows& rows, int64_t given) {
  if (given >= 0 && given < rows.num_groups) return given;
  return given == -1 ? rows.num_groups : rows.num_groups + 1;
}

struct Group {
  int64_t rank = 0;
  const void* lora_A = nullptr;  // [rank, in_features]
  const void* lora_B = nullptr;  // [out_features, rank]
  int64_t A_stride = 0, B_stride = 0;
  float scale = 0;
  float added = 0;  // to every result: NaN for a number or a rank that does not exist

  // lora_B, or lora_A.
  __device__ __forceinline__ mma::MatrixFactor factor(bool of_B, int64_t features, DType dtype) const {
    const void* data = of_B ? lora_B : lora_A;
    const int64_t stride = of_B ? B_stride : A_stride;
    return {.rank = rank,
            .features = features,
            .data = data,
            .stride = stride,
            .dtype = dtype,
            .in_chunks = has_aligned_eights(data, stride)};
  }
};

// number: of group_number.
__device__ __forceinline__ Group find_group(const GroupTable& table, int64_t number, DType factor_dtype) {
  const GroupedRows& rows = table.rows;
  Group group;
  const float nan = static_cast<float>(__uint_as_float(0x7FC00000u));
  if (number >= rows.num_groups) {
    if (number > rows.num_groups) group.added = nan;
    return group;
  }
  const GroupedEntry& entry = table.entry_of(number);
  const int64_t slot = number - entry.first_group, size = dtype_size(factor_dtype);
  group.rank = rows.ranks ? rows.ranks[number] : entry.rank;
  if (group.rank < 0 || group.rank > entry.rank) {
    group.rank = 0;
    group.added = nan;
  }
  group.lora_A = static_cast<const char*>(entry.lora_A) + slot * entry.A_slot_stride * size;
  group.lora_B = static_cast<const char*>(entry.lora_B) + slot * entry.B_slot_stride * size;
  group.A_stride = entry.A_stride;
  group.B_stride = entry.B_stride;
  group.scale = static_cast<float>(rows.scalings[number] * rows.rescale);
  return group;
}

struct WriteEntriesParams {
  GroupedEntry entries[kInlineEntries];
  GroupedEntry* to;
  int count;
};

__global__ void __launch_bounds__(kInlineEntries) write_entries_kernel(const __grid_constant__ WriteEntriesParams p) {
  ptx::wait_for_earlier_launches();
  const int i = static_cast<int>(threadIdx.x);
  if (i < p.count) p.to[i] = p.entries[i];
}

}  // namespace lora_ext::cuda::grouped
