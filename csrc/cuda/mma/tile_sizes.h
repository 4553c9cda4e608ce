// The sizes of tiles and blocks of the kernels for 16-bit x: plans (plan.cpp) and kernels read them. Includes no header
// of CUDA.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../sizes.h"

namespace lora_ext::cuda::mma {

constexpr int kChunk = 8;  // elements of 16 bytes, the unit of ldmatrix

// Ranks of one read of x or grad_y, by shrink or token_sum: 16 are enough for most ranks in use, and leave room for
// more tiles of x; of 128, one block fits on an SM, by its registers.
constexpr int kSmallRankTile = 16, kRankTile = 64, kLargeRankTile = 128;

constexpr int rank_tile(int64_t rank) {
  return rank <= kSmallRankTile ? kSmallRankTile : rank <= kRankTile ? kRankTile : kLargeRankTile;
}
constexpr int blocks_per_sm(int64_t ranks) { return ranks > kRankTile ? 1 : 2; }

constexpr int kMaxFusedRank = 32;  // of shrink_and_sum: both sums of more ranks do not fit in registers
constexpr int kShortRank = 64;     // of expand_short

// --- padding of factors: it reads as zero ---

constexpr int64_t kRankStep = 16;     // the ranks of one tensor-core operand
constexpr int64_t kFeatureStep = 64;  // the columns of one word of the dropout mask

LORA_EXT_HOST_DEVICE constexpr int64_t padded_ranks(int64_t rank) { return round_up(rank, kRankStep); }
LORA_EXT_HOST_DEVICE constexpr int64_t padded_features(int64_t features) { return round_up(features, kFeatureStep); }

struct PaddedShape {
  int64_t ranks = 0, features = 0;

  constexpr PaddedShape() = default;
  LORA_EXT_HOST_DEVICE constexpr PaddedShape(int64_t rank, int64_t num_features)
      : ranks(padded_ranks(rank)), features(padded_features(num_features)) {}
};

// --- kernels that read x or grad_y [num_tokens, features]; kRanks: ranks of a block ---

template <int kRanks, int kBlockWarps = kWarps>
struct ShrinkTiles {
  static constexpr int kWarpTokens = 16, kTokens = kWarpTokens * kBlockWarps, kFeatures = 64;
  static constexpr int kRowChunks = kFeatures / kChunk;
  static constexpr int kWarpChunks = kWarpTokens * kRowChunks;  // of a tile of x
  static constexpr int kFactorChunks = kRanks * kRowChunks;
  // As many as fit in 96 KiB: two blocks on an SM of 228 KiB, one where a block gets 99 KiB.
  static constexpr int kStages = std::clamp(96 * 1024 / 16 / (kBlockWarps * kWarpChunks + kFactorChunks), 2, 4);
  static constexpr uint32_t kSharedBytes =
      shared_bytes_of(kStages * kBlockWarps * kWarpChunks * 16) + shared_bytes_of(kStages * kFactorChunks * 16);
  static_assert(kStages >= 3, "a tile that was fetched in one step is stored in the next, and read after that");
  static_assert(kWarpTokens == 16, "a warp has the rows of one left operand");
  static_assert(kFeatureStep % kFeatures == 0, "a padded factor is whole tiles of features");
  static_assert(kRankStep % 16 == 0, "a padded factor is whole operands of 16 ranks");
  static_assert(kRanks % kRankStep == 0, "padding adds no tile of ranks");
};

template <int kRanks>
struct TokenSumTiles {
  static constexpr int kTokens = 64, kFeatures = 128, kRowChunks = kFeatures / kChunk;
  static constexpr int kChunks = kTokens * kRowChunks;            // of a tile of x
  static constexpr int kSmallChunks = kTokens * kRanks / kChunk;  // of a tile of the small operand
  // Keep bits of a warp's 16 features, one number per token. Rows start 16 bytes apart in banks: writes do not
  // conflict.
  static constexpr int kKeepPitch = kTokens + 8, kKeepWords = kWarps * kKeepPitch;
  static constexpr int kStages = std::min(4, (97 * 1024 / 16 - 2 * kSmallChunks) / kChunks);
  static constexpr uint32_t kSharedBytes =
      shared_bytes_of(kStages * kChunks * 16) + shared_bytes_of(2 * kSmallChunks * 16);
  static constexpr uint32_t kKeepBytes = shared_bytes_of(2 * kKeepWords * 2);  // where there is a mask
  static_assert(kFeatures == 16 * kWarps, "a warp has the columns of two right operands");
  static_assert(kTokens * kFeatures / 32 == kThreads, "a thread has one word of keep bits");
};

template <int kRanks>
struct ShrinkAndSumTiles {
  static constexpr int kTokens = 16, kFeatures = 512, kWarpFeatures = kFeatures / kWarps;
  static constexpr int kRowChunks = kWarpFeatures / kChunk, kWarpChunks = kTokens * kRowChunks;  // of grad_y, a warp's
  static constexpr int kXaChunks = kTokens * kRanks / kChunk;
  static constexpr int kShares = kTokens * kRanks / 4;  // of a warp's share of the rank sums: four numbers each
  // As many as fit in 99 KiB.
  static constexpr int kStages =
      std::min(5, (99 * 1024 / 16 - 2 * kXaChunks - 2 * kWarps * kShares) / (kWarps * kWarpChunks));
  static constexpr uint32_t kSharedBytes = shared_bytes_of(kStages * kWarps * kWarpChunks * 16) +
                                           shared_bytes_of(2 * kXaChunks * 16) +
                                           shared_bytes_of(2 * kWarps * kShares * 16);
  static_assert(kTokens == 16, "a tile has the tokens of one product over tokens");
  static_assert(kStages >= 3, "two tiles are copied while one is multiplied");
  static_assert(kFeatureStep % kWarpFeatures == 0, "a warp's features are all in the padded factor, or none");
};

// Partial sums over tokens are written in pairs.
constexpr int64_t partial_pitch(int64_t features) { return round_up(features, 2); }

// --- kernels that write y or grad_x [num_tokens, cols] ---

constexpr int kPieceRows = 16, kPieceCols = 32;  // a warp's piece of output: its sums are 16 registers
// Wide tiles reuse the small operand; shared memory limits them, so that two blocks fit on every GPU.
constexpr int64_t kShortSharedBytes = 48 * 1024, kShortMaxCols = 512;

// Tiles of the factor in expand_long, one product high, and the warps of a block.
constexpr int kLongRanks = 16, kLongCols = 128, kLongStages = 4;
constexpr uint32_t kLongSharedBytes = shared_bytes_of(kLongStages * kLongRanks * kLongCols * 2);
constexpr int kLongRowWarps = 4, kLongColPieces = kLongCols / kPieceCols / (kWarps / kLongRowWarps);
constexpr int kLongRowPieces = 2;  // of a warp, where rows follow each other
constexpr int kLongRows = kLongRowWarps * kLongRowPieces * kPieceRows;

// --- few_tokens: when it, and not the library's product, reads the weights of a forward ---

constexpr int64_t kFewTokens = 32;     // of more, the library's product reads x less often
constexpr int kFewTokensRank = 64;     // of a layer: xa and lora_B fit in shared memory
constexpr int64_t kFewTokensStep = 8;  // in_features are read 16 bytes at a time

// The distances between rows in shared memory. They are longer than a row, so that threads which access one column of
// several rows, or pairs of columns of eight rows, use different banks.
constexpr int kFewTokensRankPitch = kFewTokensRank + 1;
constexpr int few_tokens_pitch(int tokens) { return tokens + 8; }

constexpr uint32_t few_tokens_shared_bytes(int tokens, int rows) {
  return shared_bytes_of(kWarps * rows * few_tokens_pitch(tokens) * 4) +
         shared_bytes_of(tokens * kFewTokensRankPitch * 4) + shared_bytes_of(rows * kFewTokensRankPitch * 4);
}

}  // namespace lora_ext::cuda::mma
