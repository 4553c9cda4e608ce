// Merges on the CPU: layer by layer, rows in parallel, with records in memory that grows on demand.
#pragma once

#include <algorithm>
#include <cstdlib>

#include "cpu_kernels.h"

namespace lora_ext::cpu {

// 16-bit words in memory that grows. Kept between calls unless it has become large: fresh memory is page-faulted each
// time, which at 4096 x 4096 would cost a tenth of the merge.
class RecordBuffer {
 public:
  // Makes room for `more` words after those in use. Returns false, and keeps those in use, if memory is short.
  bool reserve(int64_t more) {
    if (used_ + more <= capacity_) return true;
    const int64_t wanted = used_ + more + used_ / 2;
    void* grown = std::realloc(words_.get(), 2 * static_cast<size_t>(wanted));
    if (grown == nullptr) return false;
    (void)words_.release();  // realloc has freed it
    words_.reset(static_cast<uint16_t*>(grown));
    capacity_ = wanted;
    return true;
  }
  void append(int64_t words) { used_ += words; }
  void clear() {
    constexpr int64_t kKeptWords = 4 << 20;
    used_ = 0;
    if (capacity_ > kKeptWords) {
      words_.reset();
      capacity_ = 0;
    }
  }

  uint16_t* begin() const { return words_.get(); }
  uint16_t* end() const { return words_.get() + used_; }
  int64_t size() const { return used_; }

 private:
  struct Free {
    void operator()(uint16_t* words) const { std::free(words); }
  };
  std::unique_ptr<uint16_t, Free> words_;
  int64_t used_ = 0;
  int64_t capacity_ = 0;
};

// One call of a merge op. The constructor allocates all memory except that of records.
class MergeRun {
 public:
  MergeRun(const MergeParams& params, const std::vector<MergeLayer>& layers)
      : params_(params), kernels_(checked_kernels()), memory_(this_threads_memory()) {
    int64_t panel_elements = 0;
    for (const MergeLayer& layer : layers) {
      panel_elements =
          std::max(panel_elements, product({merge_segments(layer.in_features), layer.rank, kMergeSegment}));
    }
    panels_ = memory_.panels.at_least(product({panel_elements, dtype_size(accumulation_dtype(params.dtype))}));
    memory_.chunks.resize(std::max<size_t>(memory_.chunks.size(), torch::stable::get_num_threads()));
  }
  ~MergeRun() {
    for (Chunk& chunk : memory_.chunks) {
      chunk.records.clear();
      chunk.scratch.clear();
    }
  }

  void merge(const MergeLayer& layer) {
    for_rows(layer, [&](Chunk& chunk) { kernels_.merge(params_, layer, panels_, chunk.begin, chunk.end); });
  }

  // records.words: null where the layer has no record.
  void unmerge(const MergeLayer& layer, const RowRecords& records) {
    const int64_t segments = merge_segments(layer.in_features);
    for_rows(layer, [&](Chunk& chunk) {
      RowRecords chunk_records = records;
      if (records.words != nullptr) {
        const int64_t before = count_words(records.words, chunk.begin * segments);
        chunk_records.words += chunk.begin * segments;
        chunk_records.num_corrections = std::max<int64_t>(records.num_corrections - before, 0);
        chunk_records.corrections += std::min(before, records.num_corrections);
      }
      kernels_.unmerge(params_, layer, panels_, chunk.begin, chunk.end, chunk_records);
    });
  }

  // Returns the number of results that are NaN or infinite. words: [out_features, segments]. This object holds the
  // corrections until take_corrections() copies them; take_back() restores the weight from them. Throws if memory is
  // short.
  int64_t merge_record(const MergeLayer& layer, int16_t* words) {
    current_ = &layer;
    words_ = words;
    const int64_t segments = merge_segments(layer.in_features);
    const int64_t block = block_rows(layer);
    for_rows(layer, [&](Chunk& chunk) {
      chunk.records.clear();
      for (; chunk.done < chunk.end; chunk.done += std::min(block, chunk.end - chunk.done)) {
        const int64_t rows = std::min(block, chunk.end - chunk.done);
        if (!chunk.scratch.reserve(merge_scratch_bytes(params_.dtype, rows, layer.in_features) / 2) ||
            !chunk.records.reserve(most_record_words(params_.dtype, rows, layer.in_features))) {
          break;
        }
        const NewRowRecords records{words + chunk.done * segments, chunk.records.end()};
        const MergedRows merged = kernels_.merge_record(params_, layer, panels_, chunk.done, chunk.done + rows, records,
                                                        chunk.scratch.begin());
        chunk.records.append(merged.words);
        chunk.non_finite += merged.non_finite;
      }
    });
    int64_t non_finite = 0;
    for (int64_t i = 0; i < num_chunks_; ++i) {
      if (memory_.chunks[i].done < memory_.chunks[i].end) {
        fail(kOutOfMemory, "It wanted more than the ", 2 * num_corrections(),
             " bytes of the corrections so far on cpu");
      }
      non_finite += memory_.chunks[i].non_finite;
    }
    return non_finite;
  }

  int64_t num_corrections() const {
    int64_t total = 0;
    for (int64_t i = 0; i < num_chunks_; ++i) total += memory_.chunks[i].records.size();
    return total;
  }

  // Copies the corrections of merge_record() to corrections [num_corrections()]. take_back() is not possible
  // afterwards.
  void take_corrections(uint16_t* corrections) {
    int64_t total = 0;
    for (int64_t i = 0; i < num_chunks_; ++i) {
      memory_.chunks[i].place = total;
      total += memory_.chunks[i].records.size();
    }
    for_chunks(
        [&](const Chunk& chunk) { std::copy(chunk.records.begin(), chunk.records.end(), corrections + chunk.place); });
    current_ = nullptr;
  }

  // Undoes merge_record(), unless its corrections have been taken. Allocates nothing.
  void take_back() {
    if (current_ == nullptr) return;
    const MergeLayer& layer = *current_;
    for_chunks([&](const Chunk& chunk) {
      const RowRecords records{words_ + chunk.begin * merge_segments(layer.in_features), chunk.records.begin(),
                               chunk.records.size()};
      kernels_.unmerge(params_, layer, panels_, chunk.begin, chunk.done, records);
    });
    current_ = nullptr;
  }

 private:
  // Consecutive rows, and one thread's results for them.
  struct Chunk {
    int64_t begin, end, done, non_finite;
    RecordBuffer records, scratch;
    int64_t place;  // position of its records in the layer's corrections
  };
  struct Memory {
    ScratchMemory panels;
    std::vector<Chunk> chunks;
  };
  static Memory& this_threads_memory() {
    static thread_local Memory memory;
    return memory;
  }

  // Fewer rows than usual if a block's largest record would not fit in L2.
  int64_t block_rows(const MergeLayer& layer) const {
    constexpr int64_t kBlockBytes = 2 << 20;
    constexpr int64_t kLeastRows = 4;
    const int64_t fitting = kBlockBytes / std::max<int64_t>(layer.in_features * dtype_size(params_.dtype), 1);
    return std::min(std::max(fitting, kLeastRows), kMergeBlockRows);
  }

  // Packs lora_A and runs f(chunk) on all rows of the layer.
  template <class F>
  void for_rows(const MergeLayer& layer, const F& f) {
    constexpr int64_t kChunkElements = 32768;  // worth a thread
    torch::stable::parallel_for(0, merge_segments(layer.in_features), 8, [&](int64_t begin, int64_t end) {
      kernels_.pack_merge(params_.dtype, layer, panels_, begin, end);
    });
    const int64_t rows = layer.out_features;
    const int64_t threads = std::ssize(memory_.chunks);
    if (layer.in_features == 0) {  // the number of rows may be too large to loop over
      num_chunks_ = 0;
      return;
    }
    num_chunks_ = std::min(threads, std::max<int64_t>(rows * layer.in_features / kChunkElements, 1));
    for (int64_t i = 0; i < num_chunks_; ++i) {
      Chunk& chunk = memory_.chunks[i];
      chunk.begin = rows * i / num_chunks_;
      chunk.end = rows * (i + 1) / num_chunks_;
      chunk.done = chunk.begin;
      chunk.non_finite = 0;
    }
    for_chunks(f);
  }

  template <class F>
  void for_chunks(const F& f) {
    torch::stable::parallel_for(0, num_chunks_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) f(memory_.chunks[i]);
    });
  }

  const MergeParams& params_;
  const Kernels& kernels_;
  Memory& memory_;
  void* panels_;
  int64_t num_chunks_ = 0;
  const MergeLayer* current_ = nullptr;  // the layer whose corrections are in the chunks
  int16_t* words_ = nullptr;
};

}  // namespace lora_ext::cpu
