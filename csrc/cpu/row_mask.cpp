#include "cpu/row_mask.h"

#include <algorithm>

#include "check.h"
#include "cpu/kernels/row_bitmask.h"
#include "ops/conv_args.h"

namespace prunekernels {

std::optional<MaskTable> read_row_mask(const char* op, const std::optional<at::Tensor>& mask,
                                       const at::Tensor& parameter) {
  if (!mask) return std::nullopt;
  check_table_tensor(op, "masks", *mask, at::kCPU);
  const int32_t* words = mask->const_data_ptr<int32_t>();
  check_table_words(op, "masks", words, mask->size(0));
  const MaskTable table(words);
  if (!masks_rows(op, table, parameter)) return std::nullopt;
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
