#include "core/mask_table.h"

#include <algorithm>
#include <cstring>
#include <vector>

namespace prunekernels {
namespace {

// Compacts the live entries of each live group into index[], -1 up to the common count; returns whether padding was
// needed.
bool fill_lists(const std::vector<int32_t>& live_groups, int64_t per_group, int64_t count,
                const std::vector<char>& live, int32_t* index, int32_t* slot) {
  bool ragged = false;
  int32_t at = 0;
  for (int32_t g : live_groups) {
    const int32_t end = at + static_cast<int32_t>(count);
    for (int64_t i = g * per_group; i < (g + 1) * per_group; ++i) {
      if (!live[i]) continue;
      slot[i] = at;
      index[at++] = static_cast<int32_t>(i);
    }
    ragged |= at < end;
    at = end;
  }
  return ragged;
}

int64_t largest_count(const std::vector<int32_t>& live_groups, int64_t per_group, const std::vector<char>& live) {
  int64_t most = 0;
  for (int32_t g : live_groups) {
    const auto first = live.begin() + g * per_group;
    most = std::max<int64_t>(most, std::count(first, first + per_group, 1));
  }
  return most;
}

// Bit i of bits = flags[i]; flags are bytes of 0 or 1, and a multiplication moves eight of them into the top byte.
void pack_bits(const bool* flags, int64_t count, uint32_t* bits) {
  std::fill_n(bits, pair_words(count), 0u);  // memset may not get the null pointer of an empty mask
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    uint64_t eight;
    std::memcpy(&eight, flags + i, 8);
    bits[i >> 5] |= static_cast<uint32_t>(eight * 0x0102040810204080ull >> 56) << (i & 31);
  }
  for (; i < count; ++i) bits[i >> 5] |= static_cast<uint32_t>(flags[i]) << (i & 31);
}

// The input mask, one row of words per group.
std::vector<uint32_t> group_bits(const bool* input, int64_t C, int64_t G) {
  const int64_t Cg = C / G, row_words = pair_words(Cg);
  const std::vector<char> all(Cg, 1);
  std::vector<uint32_t> bits(G * row_words);
  for (int64_t g = 0; g < G; ++g)
    pack_bits(input ? input + g * Cg : reinterpret_cast<const bool*>(all.data()), Cg, bits.data() + g * row_words);
  return bits;
}

}  // namespace

void build_mask_table(const bool* filter, const bool* kernel, const bool* input, int64_t K, int64_t C, int64_t G,
                      int32_t* table) {
  const int64_t Cg = C / G, Kg = K / G, row_words = pair_words(Cg);
  std::fill(table, table + kHeaderWords, 0);
  int32_t* out_index = table + kHeaderWords;
  int32_t* out_slot = out_index + K;
  int32_t* in_index = out_slot + K;
  int32_t* in_slot = in_index + C;
  uint32_t* pairs = reinterpret_cast<uint32_t*>(in_slot + C);
  std::fill(out_index, in_slot + C, kDead);
  std::memset(pairs, 0, K * row_words * sizeof(uint32_t));

  const std::vector<uint32_t> input_bits = group_bits(input, C, G);
  std::vector<uint32_t> read_bits(G * row_words, 0);  // channels that some live kernel reads
  std::vector<char> row_live(K, 0), column_live(C, 0), group_live(G, 0);
  int64_t live_pairs = 0, live_filters = 0, constants = 0;
  for (int64_t k = 0; k < K; ++k) {
    if (filter && !filter[k]) continue;
    ++live_filters;
    const int64_t g = k / Kg;
    uint32_t* row = pairs + k * row_words;
    const uint32_t* inputs = input_bits.data() + g * row_words;
    if (kernel)
      pack_bits(kernel + k * Cg, Cg, row);
    else
      std::copy(inputs, inputs + row_words, row);
    int64_t live = 0;
    for (int64_t w = 0; w < row_words; ++w) {
      row[w] &= inputs[w];
      read_bits[g * row_words + w] |= row[w];
      live += __builtin_popcount(row[w]);
    }
    live_pairs += live;
    row_live[k] = live > 0;
    group_live[g] |= row_live[k];
    if (!row_live[k]) out_slot[k] = kConstant, ++constants;
  }
  for (int64_t c = 0; c < C; ++c) {
    const int64_t in_group = c % Cg;
    column_live[c] = read_bits[c / Cg * row_words + (in_group >> 5)] >> (in_group & 31) & 1;
  }

  std::vector<int32_t> live_groups;
  for (int64_t g = 0; g < G; ++g)
    if (group_live[g]) live_groups.push_back(static_cast<int32_t>(g));
  const int64_t out_count = largest_count(live_groups, Kg, row_live);
  const int64_t in_count = largest_count(live_groups, Cg, column_live);
  const bool ragged_out = fill_lists(live_groups, Kg, out_count, row_live, out_index, out_slot);
  const bool ragged_in = fill_lists(live_groups, Cg, in_count, column_live, in_index, in_slot);

  // Sum over groups of rows x columns: the pairs a compact convolution would compute if no single kernel were dead.
  int64_t box = 0;
  for (int32_t g : live_groups)
    box += std::count(row_live.begin() + g * Kg, row_live.begin() + (g + 1) * Kg, 1) *
           std::count(column_live.begin() + g * Cg, column_live.begin() + (g + 1) * Cg, 1);

  table[kMagic] = kTableMagic;
  table[kFilters] = static_cast<int32_t>(K);
  table[kChannels] = static_cast<int32_t>(C);
  table[kGroups] = static_cast<int32_t>(G);
  table[kLiveGroups] = static_cast<int32_t>(live_groups.size());
  table[kOutPerGroup] = static_cast<int32_t>(out_count);
  table[kInPerGroup] = static_cast<int32_t>(in_count);
  table[kLiveFilters] = static_cast<int32_t>(live_filters);
  table[kLiveInputs] = static_cast<int32_t>(input ? std::count(input, input + C, true) : C);
  table[kLivePairs] = static_cast<int32_t>(live_pairs);
  table[kConstants] = static_cast<int32_t>(constants);
  table[kPairsFull] = live_pairs == box;
  table[kRagged] = ragged_out || ragged_in;
}

}  // namespace prunekernels
