#include "cpu/channel_map.h"

#include <ATen/Parallel.h>

#include <algorithm>

#include "core/mask_table.h"

namespace prunekernels {
namespace {

constexpr int64_t kGrainBytes = 32 << 10;  // less than this per thread is not worth waking it

// One channel or one pixel makes a tensor dense in both formats; the other tensor then decides.
bool pixels_first(const at::Tensor& a, const at::Tensor& b) {
  const auto last = [](const at::Tensor& t) {
    return t.is_contiguous(at::MemoryFormat::ChannelsLast) && !t.is_contiguous();
  };
  return last(a) || last(b) || a.size(2) * a.size(3) == 1;
}

template <typename Copy>
void in_parallel(int64_t items, int64_t item_bytes, Copy copy) {
  at::parallel_for(0, items, std::max<int64_t>(1, kGrainBytes / std::max<int64_t>(1, item_bytes)), copy);
}

}  // namespace

ChannelMap::ChannelMap(const int32_t* index, int64_t live, int64_t channels, bool padded)
    : index_(index),
      live_(live),
      channels_(channels),
      padded_(padded),
      slot_(channels, kDead),
      bits_((channels + 63) / 64, 0) {
  for (int64_t j = 0; j < live; ++j) {
    const int32_t c = index[j];
    if (c < 0) continue;
    slot_[c] = static_cast<int32_t>(j);
    bits_[c >> 6] |= 1ull << (c & 63);
  }
}

ChannelList ChannelMap::list() const {
  return {index_, slot_.data(), padded_ ? nullptr : bits_.data(), live_, channels_};
}

void ChannelMap::gather(const at::Tensor& full, const at::Tensor& compact) const {
  const char* from = static_cast<const char*>(full.const_data_ptr());
  char* to = static_cast<char*>(compact.mutable_data_ptr());
  const int64_t pixels = full.size(2) * full.size(3), bytes = full.element_size();
  if (pixels_first(full, compact)) {
    const PixelCopy copy = pick_gather_pixels(bytes, list());
    in_parallel(full.size(0) * pixels, live_ * bytes, [&](int64_t a, int64_t b) { copy(from, to, a, b, list()); });
  } else {
    in_parallel(full.size(0) * live_, pixels * bytes,
                [&](int64_t a, int64_t b) { gather_planes(from, to, pixels * bytes, a, b, list()); });
  }
}

void ChannelMap::scatter(const at::Tensor& compact, const at::Tensor& full) const {
  const char* from = static_cast<const char*>(compact.const_data_ptr());
  char* to = static_cast<char*>(full.mutable_data_ptr());
  const int64_t pixels = full.size(2) * full.size(3), bytes = full.element_size();
  if (pixels_first(full, compact)) {
    const PixelCopy copy = pick_scatter_pixels(bytes, list());
    in_parallel(full.size(0) * pixels, channels_ * bytes, [&](int64_t a, int64_t b) { copy(from, to, a, b, list()); });
  } else {
    in_parallel(full.size(0) * channels_, pixels * bytes,
                [&](int64_t a, int64_t b) { scatter_planes(from, to, pixels * bytes, a, b, list()); });
  }
}

}  // namespace prunekernels
