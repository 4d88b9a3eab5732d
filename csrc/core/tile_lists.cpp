#include "core/tile_lists.h"

#include <algorithm>

namespace prunekernels {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// visit(position of the first of `together` neighbouring filters, position of a channel that any of them reads)
template <typename Visit>
void each_channel_read(const MaskTable& mask, int64_t together, Visit visit) {
  std::vector<uint32_t> read(pair_words(mask.channels_per_group()));
  for (int64_t i = 0; i < mask.out_count(); i += together) {
    std::fill(read.begin(), read.end(), 0);
    for (int64_t j = i; j < std::min(i + together, mask.out_count()); ++j)
      for (size_t word = 0; word < read.size(); ++word) read[word] |= mask.pairs(mask.out_index()[j])[word];
    for (size_t word = 0; word < read.size(); ++word)
      for (uint32_t bits = read[word]; bits; bits &= bits - 1)
        visit(i, int64_t{mask.in_slot()[word * 32 + __builtin_ctz(bits)]});
  }
}

TileLists lists(const MaskTable& mask, bool of_filters, int64_t tile, int64_t chunk) {
  const int64_t results = of_filters ? mask.out_count() : mask.in_count();
  const int64_t operands = of_filters ? mask.in_count() : mask.out_count();
  const int64_t tiles = std::max<int64_t>(1, ceil_div(results, tile)), words = ceil_div(ceil_div(operands, chunk), 64);
  std::vector<uint64_t> live(tiles * words, 0);  // a bit for each chunk
  const auto mark = [&](int64_t t, int64_t c) { live[t * words + (c >> 6)] |= uint64_t{1} << (c & 63); };
  if (of_filters)
    each_channel_read(mask, tile, [&](int64_t filter, int64_t channel) { mark(filter / tile, channel / chunk); });
  else
    each_channel_read(mask, chunk, [&](int64_t filter, int64_t channel) { mark(channel / tile, filter / chunk); });
  TileLists lists;
  lists.first.push_back(0);
  for (int64_t t = 0; t < tiles; ++t) {
    for (int64_t w = 0; w < words; ++w)
      for (uint64_t bits = live[t * words + w]; bits; bits &= bits - 1)
        lists.chunks.push_back(static_cast<int32_t>(w * 64 + __builtin_ctzll(bits)));
    lists.first.push_back(static_cast<int32_t>(lists.chunks.size()));
  }
  return lists;
}

}  // namespace

int64_t TileLists::longest() const {
  int64_t most = 0;
  for (int64_t t = 0; t < tiles(); ++t) most = std::max<int64_t>(most, first[t + 1] - first[t]);
  return most;
}

double TileLists::share(int64_t all_chunks) const {
  return all_chunks == 0 ? 0 : static_cast<double>(chunks.size()) / static_cast<double>(tiles() * all_chunks);
}

TileLists filter_tile_lists(const MaskTable& mask, int64_t tile, int64_t chunk) {
  return lists(mask, true, tile, chunk);
}

TileLists channel_tile_lists(const MaskTable& mask, int64_t tile, int64_t chunk) {
  return lists(mask, false, tile, chunk);
}

}  // namespace prunekernels
