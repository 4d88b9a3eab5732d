// Estimates what a plan costs on a GPU, for problems that were not measured: each of its kernels takes its arithmetic
// or its memory traffic, whichever is longer, and the kernels add up. In microseconds of an H100; other devices have
// other rates but about the same ratios. The rates are guesses: no GPU has run this yet.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/conv_shape.h"
#include "core/mask_table.h"
#include "plan/plan.h"

namespace prunekernels {

struct DeviceCase {
  const ConvShape& shape;
  const MaskTable& mask;
  Direction direction;
  int64_t element_bytes;
  bool tensor_cores;  // 2-byte elements, or floats as tf32
  bool channels_last;
  bool vectors;         // igemm_* load whole vectors of live channels
  double listed_share;  // of the reduction, for block_sparse_*
};

class DeviceCost {
 public:
  explicit DeviceCost(const DeviceCase& c) : c_(c), s_(c.shape) {}

  double of(Plan plan) const {
    switch (plan) {
      case Plan::dense:
        return dense();
      case Plan::compact:
        return compact();
      case Plan::direct:
        return own(c_.vectors ? kIgemm : kIgemmOfElements, 1);
      default:
        return c_.channels_last ? own(kIgemmOfElements, c_.listed_share) : sparse();
    }
  }

 private:
  // Millions of multiply-adds per microsecond, of 2-byte elements (the peak of an H100's tensor cores is about 400).
  // tf32 reaches half of them, floats on CUDA cores kFloats.
  static constexpr double kVendor = 220, kIgemm = 150, kIgemmOfElements = 90, kFloats = 22, kSparse = 10;
  static constexpr double kBytes = 2.8e6;  // per microsecond
  static constexpr double kLaunch = 3;
  static constexpr int64_t kSector = 32;

  double rate(double tensor_cores) const {
    if (!c_.tensor_cores) return std::min(kFloats, tensor_cores);
    return c_.element_bytes == 2 ? tensor_cores : tensor_cores / 2;
  }
  double products(int64_t groups, int64_t out, int64_t in) const {
    return static_cast<double>(s_.N) * s_.out_pixels() * s_.taps() * groups * out * in;
  }
  double x_bytes(int64_t channels) const {
    return static_cast<double>(s_.N) * s_.in_pixels() * channels * c_.element_bytes;
  }
  double y_bytes(int64_t channels) const {
    return static_cast<double>(s_.N) * s_.out_pixels() * channels * c_.element_bytes;
  }
  double weight_bytes() const {
    return static_cast<double>(s_.K) * s_.channels_per_group() * s_.taps() * c_.element_bytes;
  }
  double kernel(double products, double rate, double bytes) const {
    return kLaunch + std::max(products / (rate * 1e6), bytes / kBytes);
  }
  // Bytes that reading single live channels moves: their planes in NCHW; all in NHWC, where sectors hold several
  // channels.
  double read(double full, double live) const { return c_.channels_last ? full : live; }

  double dense() const {
    const double conv = kernel(products(s_.G, s_.K / s_.G, s_.C / s_.G), rate(kVendor), x_bytes(s_.C) + y_bytes(s_.K));
    const double weight = kernel(0, 1, 2 * weight_bytes());
    if (c_.direction == Direction::grad_weight) return conv + weight;
    const bool forward = c_.direction == Direction::forward;
    const double pixels = static_cast<double>(s_.N) * (forward ? s_.out_pixels() : s_.in_pixels());
    const double sentinel = pixels * (c_.channels_last ? kSector : c_.element_bytes);
    return conv + weight + kernel(0, 1, sentinel) + kLaunch;
  }

  double compact() const {
    const int64_t out = c_.mask.out_count(), in = c_.mask.in_count(),
                  groups = std::max<int64_t>(1, c_.mask[kLiveGroups]);
    const auto eights = [&](int64_t count) { return s_.G == 1 ? (count + 7) / 8 * 8 : count; };
    double time = kernel(0, 1, 2 * weight_bytes()) +
                  kernel(products(groups, eights(c_.mask[kOutPerGroup]), eights(c_.mask[kInPerGroup])), rate(kVendor),
                         x_bytes(in) + y_bytes(out));
    if (in < s_.C)
      time += kernel(0, 1,
                     c_.direction == Direction::grad_input ? x_bytes(s_.C) + x_bytes(in)
                                                           : read(x_bytes(s_.C), x_bytes(in)) + x_bytes(in));
    if (out < s_.K)
      time += kernel(0, 1,
                     c_.direction == Direction::forward ? y_bytes(s_.K) + y_bytes(out)
                                                        : read(y_bytes(s_.K), y_bytes(out)) + y_bytes(out));
    return time;
  }

  // Results are written at full width; operands are read in place.
  double own_bytes() const {
    const double x = read(x_bytes(s_.C), x_bytes(c_.mask.in_count()));
    const double y = read(y_bytes(s_.K), y_bytes(c_.mask.out_count()));
    switch (c_.direction) {
      case Direction::forward:
        return x + y_bytes(s_.K);
      case Direction::grad_input:
        return y + x_bytes(s_.C);
      default:
        return x + y;
    }
  }
  double own(double tensor_cores, double share) const {
    const double live = products(c_.mask[kLiveGroups], c_.mask[kOutPerGroup], c_.mask[kInPerGroup]);
    return kernel(0, 1, 2 * weight_bytes()) + kernel(live * share, rate(tensor_cores), own_bytes());
  }
  double sparse() const {
    const double live = static_cast<double>(s_.N) * s_.out_pixels() * s_.taps() * c_.mask[kLivePairs];
    return kernel(live, kSparse, own_bytes());
  }

  const DeviceCase& c_;
  const ConvShape& s_;
};

}  // namespace prunekernels
