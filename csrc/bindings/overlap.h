// Tensors that an op changes: none of them may share memory with another argument.
#pragma once

#include <algorithm>
#include <vector>

#include "checks.h"

namespace lora_ext {

// Where an argument lies in memory: rows of row_bytes, row_stride bytes apart.
struct MemoryRegion {
  ArgumentName name;
  const char *begin, *end;
  int64_t row_bytes, row_stride;  // of a matrix; else row_stride is 0
  bool changes;
};

inline void add_region(std::vector<MemoryRegion>& regions, const ArgumentName& name, const Tensor& tensor,
                       bool changes) {
  if (tensor.numel() == 0) return;
  const int64_t size = static_cast<int64_t>(tensor.element_size()), dims = tensor.dim();
  int64_t last = 0;  // element: within the storage, as op.h has checked
  for (int64_t i = 0; i < dims; ++i) last += (tensor.size(i) - 1) * tensor.stride(i);
  const bool is_matrix = dims == 2 && tensor.size(0) > 1 && (tensor.size(1) == 1 || tensor.stride(1) == 1);
  const char* begin = static_cast<const char*>(tensor.const_data_ptr());
  regions.push_back({.name = name,
                     .begin = begin,
                     .end = begin + (last + 1) * size,
                     .row_bytes = is_matrix ? tensor.size(1) * size : 0,
                     .row_stride = is_matrix ? tensor.stride(0) * size : 0,
                     .changes = changes});
}

// Whether two regions share bytes, of which the second begins where the first has not ended yet. Two blocks of columns
// of one matrix lie side by side; otherwise what lies within the other's extent counts as shared.
inline bool share_bytes(const MemoryRegion& first, const MemoryRegion& second) {
  if (first.row_stride == 0 || first.row_stride != second.row_stride) return true;
  const int64_t column = (second.begin - first.begin) % first.row_stride;
  return column < first.row_bytes || column + second.row_bytes > first.row_stride;
}

inline void check_disjoint(const char* op, std::vector<MemoryRegion>& regions) {
  std::sort(regions.begin(), regions.end(), [](const auto& a, const auto& b) { return a.begin < b.begin; });
  std::vector<const MemoryRegion*> reaching;  // those that begin before and end behind
  for (const MemoryRegion& region : regions) {
    std::erase_if(reaching, [&](const MemoryRegion* before) { return before->end <= region.begin; });
    for (const MemoryRegion* before : reaching) {
      if (!(before->changes || region.changes) || !share_bytes(*before, region)) continue;
      const bool in_order = before->changes;
      const MemoryRegion &changed = in_order ? *before : region, &other = in_order ? region : *before;
      STD_TORCH_CHECK(false, op, ": ", changed.name, " shares memory with ", other.name,
                      ", which would change with it; pass a clone of one of them");
    }
    reaching.push_back(&region);
  }
}

}  // namespace lora_ext
