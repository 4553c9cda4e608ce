// The sizes of tiles and blocks of the kernels of lora_grouped_: plans (plan.cpp) and kernels read them. Includes no
// header of CUDA.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../../common/params.h"
#include "../mma/tile_sizes.h"
#include "../sizes.h"

namespace lora_ext::cuda::grouped {

constexpr int kInlineEntries = 32;  // that travel with a kernel's parameters (group_table.cuh)

// --- rows sorted by their groups (group_index.cuh) ---

// Two more numbers, so that all rows belong to a group: rows of -1, and rows of numbers that do not exist.
constexpr int64_t kMoreGroups = 2;
constexpr int64_t kTileRows = 64;    // of a tile of shrink and expand
constexpr int64_t kChunkRows = 512;  // of a chunk whose sums over rows one block makes
constexpr int kIndexThreads = 1024;  // of the one block that makes the index

// Warps that share the entries: a warp takes 32 at a time.
inline int index_warps(const GroupedRows& rows) {
  return static_cast<int>(std::clamp<int64_t>(ceil_div(rows.num_entries, 32), 1, kIndexThreads / 32));
}

inline int64_t num_tiles(const GroupedRows& rows) {
  return rows.num_tokens / kTileRows + std::min(rows.num_entries, rows.num_groups + kMoreGroups);
}

inline int64_t num_chunks(const GroupedRows& rows) {
  return rows.num_tokens / kChunkRows + rows.num_groups + kMoreGroups;
}

// Chunks of groups of several: only these have partial sums.
inline int64_t partial_chunks(const GroupedRows& rows) {
  return rows.num_tokens > kChunkRows ? rows.num_tokens / (kChunkRows / 2) : 0;
}

// --- kernels ---

constexpr int64_t kFewRows = 64, kFewRowsRank = 1024;  // that few_rows takes
constexpr int64_t kRangeStep = 32 * kEight;            // features that a warp of few_rows reads at a time

constexpr int kSmallRanks = 16, kLargeRanks = 64;  // of a block of shrink

constexpr int kShrinkWarps = static_cast<int>(kTileRows / 16), kShrinkThreads = 32 * kShrinkWarps;

template <int kRanks>
struct ShrinkTiles : mma::ShrinkTiles<kRanks, kShrinkWarps> {
  using Tiles = mma::ShrinkTiles<kRanks, kShrinkWarps>;
  static constexpr uint32_t kSharedBytes = Tiles::kSharedBytes + shared_bytes_of(Tiles::kTokens * 8);  // rows
};

constexpr int kExpandRowPieces = 1;                                                              // of a warp
constexpr uint32_t kExpandSharedBytes = mma::kLongSharedBytes + shared_bytes_of(kTileRows * 8);  // rows
static_assert(kTileRows == mma::kLongRowWarps * kExpandRowPieces * mma::kPieceRows);

struct FactorSumsTiles : mma::TokenSumTiles<16> {
  static constexpr int kRanks = 16;
  static constexpr uint32_t kSharedBytes =
      mma::TokenSumTiles<kRanks>::kSharedBytes + shared_bytes_of(static_cast<uint32_t>(kChunkRows) * 8);  // rows
};

}  // namespace lora_ext::cuda::grouped
