#include "cuda/row_mask.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/where.h>

#include <limits>

#include "check.h"

namespace prunekernels {

WeightMask RowMask::of_rows(const char* op, const at::Tensor& parameter, const RowLayout& layout) const {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  PK_CHECK(layout.rows <= kMost && layout.channels <= kMost && layout.taps <= kMost, op, "a parameter",
           "fewer than 2^31 rows, channels and taps", parameter.sizes());
  WeightMask mask{nullptr,
                  nullptr,
                  static_cast<int32_t>(layout.rows),
                  static_cast<int32_t>(layout.channels),
                  static_cast<int32_t>(layout.taps),
                  layout.channels_last};
  if (!mask_) return mask;
  if (parameter.dim() == 1) {
    mask.out_slot = mask_->kept_filters();
    return mask;
  }
  const MaskTable& table = mask_->table();
  mask.out_slot = mask_->out().slot;
  const bool whole_rows = table[kLivePairs] == (table[kLiveFilters] - table[kConstants]) * table.channels_per_group();
  if (!whole_rows) mask.pairs = mask_->pairs();
  return mask;
}

at::Tensor RowMask::live(const at::Tensor& parameter) const {
  const MaskTable& table = mask_->table();
  const int64_t K = table[kFilters], pairs = kHeaderWords + 2 * K + 2 * table[kChannels];
  if (parameter.dim() == 1) return words_.narrow(0, kHeaderWords + K, K).ne(kDead);
  const at::Tensor bits = at::arange(32, words_.options());
  c10::SmallVector<int64_t, 5> size(parameter.dim(), 1);
  size[0] = K, size[1] = table.channels_per_group();
  return words_.narrow(0, pairs, words_.numel() - pairs)
      .view({K, -1, 1})
      .bitwise_right_shift(bits)
      .bitwise_and(1)
      .view({K, -1})
      .narrow(1, 0, size[1])
      .ne(0)
      .view(size);
}

at::Tensor RowMask::choose(const at::Tensor& value, const at::Tensor& other) const {
  return mask_ ? at::where(live(value), value, other) : value;
}

std::vector<RowMask> read_row_masks(const char* op, const OptionalTensors& masks, at::TensorList parameters) {
  std::vector<RowMask> read;
  for (size_t i = 0; i < parameters.size(); ++i)
    read.emplace_back(op, masks.empty() ? std::nullopt : masks.get(i), parameters[i]);
  return read;
}

}  // namespace prunekernels
