// The format of a merge's corrections, from which unmerging restores every bit. merge_params.h defines a correction.
//
// A row is divided into segments of kMergeSegment columns (the last may be shorter). A segment's record is a sequence
// of 16-bit words. Its length is stored per segment, and a layer's records are concatenated in the order of the
// segments.
//
//   no words          the segment needs no correction
//   sparse            for each correction, in the order of the columns, the words that sum up to it: the segment's
//                     column in the low byte, -127 to 127 in the high byte. Most corrections take one word.
//   whole segment     the original elements, if they take no more words than the sparse form. A sparse form of exactly
//                     that length is never written, so the length distinguishes the two.
//
// A record therefore never takes more than the weight itself, plus 2 bytes per segment. The ordered integers of
// neighbouring floating-point numbers differ by one, also those of -0.0 and 0.0: signs of zero are restored.
#pragma once

#include <cstdint>
#include <type_traits>

#include "philox.h"  // LORA_EXT_HOST_DEVICE

namespace lora_ext {

constexpr int kMergeSegment = 256;  // columns; a position fits in a byte
constexpr int kLargestCorrection = 127;

LORA_EXT_HOST_DEVICE constexpr int64_t merge_segments(int64_t in_features) {
  return (in_features + kMergeSegment - 1) / kMergeSegment;
}

// Maps an element's bits to an integer that grows with the element's value; its own inverse. Arithmetic on it wraps.
template <class Word>
LORA_EXT_HOST_DEVICE constexpr Word ordered(Word bits) {
  constexpr Word kSign = static_cast<Word>(Word{1} << (8 * sizeof(Word) - 1));
  return static_cast<Word>(bits & kSign ? bits ^ (kSign - 1) : bits);
}

template <class Word>
LORA_EXT_HOST_DEVICE constexpr std::make_signed_t<Word> correction_of(Word original, Word candidate) {
  return static_cast<std::make_signed_t<Word>>(ordered(original) - ordered(candidate));
}

template <class Word>
LORA_EXT_HOST_DEVICE constexpr Word corrected(Word candidate, int correction) {
  return ordered(static_cast<Word>(ordered(candidate) + static_cast<Word>(correction)));
}

LORA_EXT_HOST_DEVICE inline uint16_t correction_word(int col, int correction) {
  return static_cast<uint16_t>(col | (correction & 0xFF) << 8);
}
LORA_EXT_HOST_DEVICE inline int word_column(uint16_t word) { return word & 0xFF; }
LORA_EXT_HOST_DEVICE inline int word_correction(uint16_t word) { return static_cast<int8_t>(word >> 8); }

// Words that a correction takes: 0 if it is 0, and at most as many as the longest segment.
template <class Integer>
LORA_EXT_HOST_DEVICE constexpr int correction_words(Integer correction) {
  constexpr int kMost = kMergeSegment * static_cast<int>(sizeof(double) / 2);
  const Integer full = correction / kLargestCorrection;
  if (full >= kMost || full <= -kMost) return kMost;
  return static_cast<int>(full < 0 ? -full : full) + (correction % kLargestCorrection != 0 ? 1 : 0);
}

// The correction in the next word of what remains of one.
template <class Integer>
LORA_EXT_HOST_DEVICE constexpr int next_correction(Integer remaining) {
  return static_cast<int>(remaining > kLargestCorrection    ? kLargestCorrection
                          : remaining < -kLargestCorrection ? -kLargestCorrection
                                                            : remaining);
}

// Length of the record of a segment of `cols` columns, whose sparse form takes `sparse` words.
LORA_EXT_HOST_DEVICE inline int64_t record_words(int64_t sparse, int64_t cols, int element_words) {
  return sparse < cols * element_words ? sparse : cols * element_words;
}

}  // namespace lora_ext
