// A mask, prepared: which filters, channels and kernels are live, as sorted lists, in one flat int32 array of a size
// that depends on (K, C, G) alone. One array, so that it moves between devices, is broadcast and is updated in place as
// a single tensor.
//
// clang-format off
//   header    [kHeaderWords]
//   out_index [K]   compact filter  -> filter, -1 = zero padding of a ragged group
//   out_slot  [K]   filter -> compact filter, kDead, or kConstant (live, but none of its kernels is: the output is its bias)
//   in_index  [C]   compact channel -> channel, -1 = zero padding of a ragged group
//   in_slot   [C]   channel -> compact channel, kDead where no live kernel reads it
//   pairs     [K, ceil(C / G / 32)]   one bit per kernel: live after all three masks
// clang-format on
//
// A group with no live kernel drops out. The others get equal counts (the largest), so that one grouped convolution
// serves them all.
#pragma once

#include <cstdint>

namespace prunekernels {

constexpr int32_t kTableMagic = 0x314d4b50;
constexpr int32_t kDead = -1;
constexpr int32_t kConstant = -2;

enum TableWord : int {
  kMagic,
  kFilters,      // K
  kChannels,     // C
  kGroups,       // G
  kLiveGroups,   // groups of the compact convolution
  kOutPerGroup,  // filters per group of the compact convolution, padding included
  kInPerGroup,   // channels per group of the compact convolution, padding included
  kLiveFilters,  // filters that the filter mask leaves
  kLiveInputs,   // channels that the input mask leaves
  kLivePairs,    // kernels that all three masks leave
  kConstants,    // filters marked kConstant
  kPairsFull,    // 1: every kernel between a listed filter and a listed channel of its group is live
  kRagged,       // 1: the lists hold padding
  kHeaderWords = 16
};

inline int64_t pair_words(int64_t channels_per_group) { return (channels_per_group + 31) / 32; }

inline int64_t mask_table_words(int64_t K, int64_t C, int64_t G) {
  return kHeaderWords + 2 * K + 2 * C + K * pair_words(C / G);
}

class MaskTable {
 public:
  explicit MaskTable(const int32_t* words) : words_(words) {}

  int64_t operator[](TableWord w) const { return words_[w]; }
  int64_t out_count() const { return (*this)[kLiveGroups] * (*this)[kOutPerGroup]; }
  int64_t in_count() const { return (*this)[kLiveGroups] * (*this)[kInPerGroup]; }
  int64_t channels_per_group() const { return (*this)[kChannels] / (*this)[kGroups]; }
  bool nothing_dead() const { return (*this)[kLivePairs] == (*this)[kFilters] * channels_per_group(); }

  const int32_t* out_index() const { return words_ + kHeaderWords; }
  const int32_t* out_slot() const { return out_index() + (*this)[kFilters]; }
  const int32_t* in_index() const { return out_slot() + (*this)[kFilters]; }
  const int32_t* in_slot() const { return in_index() + (*this)[kChannels]; }
  const uint32_t* pairs(int64_t filter) const {
    return reinterpret_cast<const uint32_t*>(in_slot() + (*this)[kChannels]) +
           filter * pair_words(channels_per_group());
  }
  bool pair(int64_t filter, int64_t channel_in_group) const {
    return pairs(filter)[channel_in_group >> 5] >> (channel_in_group & 31) & 1;
  }
  // visit(c) for the live kernels of a filter, c = channel in its group
  template <typename Visit>
  void each_live_channel(int64_t filter, Visit visit) const {
    for (int64_t word = 0; word < pair_words(channels_per_group()); ++word)
      for (uint32_t live = pairs(filter)[word]; live; live &= live - 1) visit(word * 32 + __builtin_ctz(live));
  }

 private:
  const int32_t* words_;
};

// Fills table[mask_table_words(K, C, G)]. A null mask means all live.
void build_mask_table(const bool* filter,  // [K]
                      const bool* kernel,  // [K, C / G]
                      const bool* input,   // [C]
                      int64_t K, int64_t C, int64_t G, int32_t* table);

}  // namespace prunekernels
