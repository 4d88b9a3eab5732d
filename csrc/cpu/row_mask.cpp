#include "cpu/row_mask.h"

#include <algorithm>

#include "check.h"
#include "conv_args.h"
#include "cpu/kernels/live_bits.h"

namespace prunekernels {

std::optional<RowLayout> row_layout(const at::Tensor& parameter) {
  const int64_t rows = parameter.dim() ? parameter.size(0) : 1;
  const int64_t channels = parameter.dim() > 1 ? parameter.size(1) : 1;
  const int64_t taps = parameter.numel() ? parameter.numel() / (rows * channels) : 0;
  if (parameter.is_contiguous()) return RowLayout{rows, channels, taps, taps == 1};
  if (parameter.dim() == 4 && parameter.is_contiguous(at::MemoryFormat::ChannelsLast))
    return RowLayout{rows, channels, taps, true};
  return std::nullopt;
}

std::optional<MaskTable> read_row_mask(const char* op, const std::optional<at::Tensor>& mask,
                                       const at::Tensor& parameter) {
  if (!mask) return std::nullopt;
  check_table_tensor(op, "masks", *mask, at::kCPU);
  const int32_t* words = mask->const_data_ptr<int32_t>();
  check_table_words(op, "masks", words, mask->size(0));
  const MaskTable table(words);
  const int64_t filters = table[kFilters], channels = table.channels_per_group();
  const bool is_vector = parameter.dim() == 1;
  PK_CHECK(parameter.dim() >= 1 && parameter.size(0) == filters && (is_vector || parameter.size(1) == channels), op,
           "masks", "a table for a parameter " + c10::str(parameter.sizes()),
           "one of " + std::to_string(filters) + " filters of " + std::to_string(channels) + " channels");
  if (is_vector ? table[kLiveFilters] == filters : table.nothing_dead()) return std::nullopt;
  return table;
}

bool same_channels(const MaskTable& mask, int32_t a, int32_t b) {
  if (a < 0 || b < 0) return false;
  if (mask[kPairsFull] && mask[kGroups] == 1) return true;
  return std::equal(mask.pairs(a), mask.pairs(a) + pair_words(mask.channels_per_group()), mask.pairs(b));
}

const uint32_t* RowBits::of_row(const MaskTable& mask, const RowLayout& layout, int64_t row) {
  const int64_t channels = layout.channels, words = pair_words(channels);
  const uint32_t* pairs = mask.pairs(row);
  const bool same = layout.channels == layout_.channels && layout.taps == layout_.taps &&
                    layout.channels_last == layout_.channels_last && std::equal(pairs, pairs + words, pairs_.begin());
  if (!same) {
    layout_ = layout;
    pairs_.assign(pairs, pairs + words);
    full_ = true;
    for (int64_t word = 0; word < words; ++word)
      full_ &= pairs[word] == (channels - word * 32 < 32 ? (1u << (channels - word * 32)) - 1 : ~0u);
    bits_.resize(bit_words(layout.row_elements()));
    if (!full_) spread_bits(pairs, channels, layout.taps, layout.channels_last, bits_.data());
  }
  return full_ ? nullptr : bits_.data();
}

const uint32_t* RowBits::of_vector(const MaskTable& mask) {
  layout_ = {};
  bits_.resize(bit_words(mask[kFilters]));
  slot_bits(mask.out_slot(), mask[kFilters], bits_.data());
  return bits_.data();
}

}  // namespace prunekernels
