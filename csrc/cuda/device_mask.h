// A mask table of the device as the plans need it: its words on the host for counts and choices, and a copy on the
// device with every list that kernels read. The copy and not the tensor itself, so that a captured graph does not
// follow half a change of masks: its counts are fixed, so its lists must be.
#pragma once

#include <array>
#include <map>
#include <optional>

#include "core/mask_table.h"
#include "core/sparse_lists.h"
#include "core/tile_lists.h"
#include "cuda/device.h"
#include "cuda/kernels/igemm.h"
#include "cuda/kernels/nan_repair.h"
#include "cuda/kernels/pack_weights.h"

namespace prunekernels {

// Filters or input channels of a mask.
struct ChannelSide {
  int64_t channels;           // full width
  int64_t live;               // of the table's list
  int64_t padded;             // channels of a compact tensor: live, for one group rounded up to a multiple of 8
  bool identity;              // all live: the full tensor serves as the compact one
  int64_t granule;            // channel_granule()
  const int32_t* host_index;  // [live]
  const int32_t* index;       // device [padded], -1: zeros
  const int32_t* slot;        // device [channels]

  ChannelView view(Element element) const;
};

class DeviceMask : public device::DeviceBuffers {
 public:
  DeviceMask(std::vector<int32_t> words, at::Device device);

  const MaskTable& table() const { return table_; }          // on the host
  const at::Tensor& words() const { return device_words_; }  // the same on the device
  const ChannelSide& out() const { return out_; }
  const ChannelSide& in() const { return in_; }

  const uint32_t* pairs() const { return pairs_; }               // device [K, ceil(C / G / 32)]
  const int32_t* kept_filters() const { return kept_filters_; }  // device [K]: k, or -1 where the filter mask is false
  const at::Tensor& constants() const { return constants_; }     // int64 [table[kConstants]], on the device
  const SentinelChannels& sentinels(bool forward) const { return sentinels_[forward]; }
  PackMask pack() const;
  PackMask pack_dense() const;  // of the same kernels between all filters and all channels

  // Made when first asked for, which copies them to the device: see host_cache.h on capturing.
  const SparseLists& sparse_lists(const char* op, const int32_t** device_words) const;
  DeviceTileLists tile_lists(const char* op, bool of_filters, int64_t tile, int64_t chunk) const;
  double listed_share(bool of_filters, int64_t tile, int64_t chunk) const;  // of all chunks

 private:
  struct Lists {
    TileLists host;
    double share;
    const int32_t* first = nullptr;  // device
  };
  struct Sparse {
    SparseLists host;
    const int32_t* words;  // device
  };
  Lists& lists(bool of_filters, int64_t tile, int64_t chunk) const;
  const int32_t* keep_late(const char* op, const std::vector<int32_t>& words) const;

  std::vector<int32_t> words_;
  MaskTable table_;
  at::Device device_;
  ChannelSide out_, in_;
  at::Tensor device_words_;
  const int32_t* device_table_;
  const uint32_t* pairs_;
  const int32_t* kept_filters_;
  at::Tensor constants_;
  std::array<SentinelChannels, 2> sentinels_;
  std::vector<int32_t> dense_words_;
  const int32_t* device_dense_;

  mutable std::mutex mutex_;  // of what is made late
  mutable std::map<std::array<int64_t, 3>, Lists> lists_;
  mutable std::optional<Sparse> sparse_;
};

// Checked for these sizes; null where nothing is dead. C and G < 0: only the number of filters is known, and a mask
// comes back even if nothing is dead.
std::shared_ptr<const DeviceMask> device_mask(const char* op, const char* argument,
                                              const std::optional<at::Tensor>& mask, int64_t K, int64_t C, int64_t G,
                                              const at::Tensor& like);

// The same for a parameter's rows: of a vector only its length is checked, and only dead filters count.
std::shared_ptr<const DeviceMask> device_row_mask(const char* op, const std::optional<at::Tensor>& mask,
                                                  const at::Tensor& parameter);

}  // namespace prunekernels
