// Checks that no tensor that an op changes shares memory with another argument.
#pragma once

#include <algorithm>
#include <vector>

#include "arguments.h"

namespace lora_ext {

// The memory of an argument: rows of row_bytes, row_stride bytes apart.
struct MemoryRegion {
  ArgumentName name;
  size_t order;  // among the arguments
  const char *begin, *end;
  int64_t row_bytes, row_stride;  // of a matrix; row_stride is 0 for any other tensor
  bool changes;
};

inline void add_region(std::vector<MemoryRegion>& regions, const ArgumentName& name, const Tensor& tensor,
                       bool changes) {
  if (tensor.numel() == 0) return;
  const int64_t size = static_cast<int64_t>(tensor.element_size());
  const bool is_matrix = tensor.dim() == 2 && tensor.size(0) > 1 && (tensor.size(1) == 1 || tensor.stride(1) == 1);
  const char* begin = static_cast<const char*>(tensor.const_data_ptr());
  regions.push_back({.name = name,
                     .order = regions.size(),
                     .begin = begin,
                     .end = begin + (last_element(tensor) + 1) * size,  // op.h has checked that it is in the storage
                     .row_bytes = is_matrix ? tensor.size(1) * size : 0,
                     .row_stride = is_matrix ? tensor.stride(0) * size : 0,
                     .changes = changes});
}

// Whether two regions share bytes; the second begins within the first. Two blocks of columns of one matrix may be
// disjoint; any other overlap of extents counts as shared.
inline bool share_bytes(const MemoryRegion& first, const MemoryRegion& second) {
  if (first.row_stride == 0 || first.row_stride != second.row_stride) return true;
  const int64_t column = (second.begin - first.begin) % first.row_stride;
  return column < first.row_bytes || column + second.row_bytes > first.row_stride;
}

inline void check_disjoint(std::span<const Parameter> parameters, const Argument* arguments) {
  std::vector<MemoryRegion> regions;
  for_each_tensor(parameters, arguments, [&](const ArgumentName& name, const Tensor& tensor, const Parameter& p) {
    add_region(regions, name, tensor, p.changes);
  });
  // A merge of a mixture has tens of thousands of them: only those whose extents overlap are compared.
  std::ranges::sort(regions, {}, &MemoryRegion::begin);
  for (auto a = regions.begin(); a != regions.end(); ++a) {
    for (auto b = a + 1; b != regions.end() && b->begin < a->end; ++b) {
      if (!(a->changes || b->changes) || !share_bytes(*a, *b)) continue;
      const bool a_is_named = a->changes && (!b->changes || a->order < b->order);
      refuse<"shared_memory">(a_is_named ? a->name : b->name, a_is_named ? b->name : a->name);
    }
  }
}

}  // namespace lora_ext
