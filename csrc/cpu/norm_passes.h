// Passes over an activation for batch norm, divided among torch's threads: channel by channel, or run by run.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "cpu/denormals.h"
#include "cpu/kernels/batch_norm.h"

namespace prunekernels {

constexpr int64_t kNormGrain = 16 << 10;  // elements; less per thread is not worth waking it

struct NormShape {
  // Shorter planes of NCHW are worked on many at a time: what is summed, and what is applied alone.
  static constexpr int64_t kPlane = 512, kAppliedPlane = 32, kFewImages = 2;

  int64_t images, channels, pixels;
  at::MemoryFormat format;

  NormShape(const at::Tensor& x, at::MemoryFormat format)
      : images(x.size(0)), channels(x.size(1)), pixels(x.size(2) * x.size(3)), format(format) {}
  int64_t count() const { return images * pixels; }  // of values per channel
  int64_t total() const { return count() * channels; }
  // NCHW, of planes long enough to be worked on one by one. What is set up for many at a time does not pay for few
  // images.
  bool by_planes() const { return applies_by_planes() && (pixels >= kPlane || images <= kFewImages); }
  bool applies_by_planes() const { return format == at::MemoryFormat::Contiguous && pixels >= kAppliedPlane; }
  int64_t plane(int64_t image, int64_t channel) const { return (image * channels + channel) * pixels; }
};

// An activation as runs of positions, each position of one channel: some pixels of NHWC, or some images of NCHW, as
// many as fill whole vectors.
class Runs {
 public:
  explicit Runs(const NormShape& s) : shape_(s) {
    constexpr int64_t kVector = 16, kLeast = 128;
    inner_ = s.format == at::MemoryFormat::Contiguous ? s.pixels : 1;
    const int64_t unit = inner_ * s.channels, whole = kVector / std::gcd(kVector, unit);
    length_ = unit * (unit >= kLeast ? 1 : (kLeast / (whole * unit) + 1) * whole);
  }
  int64_t count() const { return (shape_.total() + length_ - 1) / length_; }
  int64_t length() const { return length_; }
  int64_t first_of(int64_t channel) const { return channel * inner_; }  // where its first value lies

  // visit(channel, begin, end): positions begin..end, counted from `at` on, of the `length` from there, are of a
  // channel.
  template <typename Visit>
  void by_channel(int64_t at, int64_t length, Visit visit) const {
    int64_t channel = at / inner_ % shape_.channels, begin = 0, end = inner_ - at % inner_;
    for (; begin < length; begin = end, end += inner_) {
      visit(channel, begin, std::min(end, length));
      if (++channel == shape_.channels) channel = 0;
    }
  }

  // visit(offset, rows, position): runs begin..end in blocks of at most kNormRows rows and kNormPositions positions;
  // the last run of all may be shorter.
  template <typename Visit>
  void each(int64_t begin, int64_t end, Visit visit) const {
    const auto blocks = [&](int64_t first, int64_t rows, int64_t length) {
      for (int64_t at = 0; at < length; at += kNormPositions)
        visit(first * length_ + at, NormRows{rows, std::min(kNormPositions, length - at), length_}, at);
    };
    const int64_t whole = shape_.total() / length_;
    for (int64_t first = begin; first < std::min(end, whole); first += kNormRows)
      blocks(first, std::min({end, whole, first + kNormRows}) - first, length_);
    if (end > whole) blocks(whole, 1, shape_.total() % length_);
  }

 private:
  const NormShape& shape_;
  int64_t inner_, length_;
};

// A value of every channel, at each position of a run. Of a long run (all of an image) only at those of a block: it
// takes a pass over an image to write them all, and as much memory.
template <typename V>
class AtPositions {
 public:
  struct Block {
    alignas(64) V values[kNormPositions];
  };

  AtPositions(const Runs& runs, const std::vector<V>& by_channel)
      : runs_(runs), values_(by_channel), is_long_(runs.length() > kLong) {
    if (is_long_) return;
    values_.resize(runs.length());
    write(by_channel, 0, runs.length(), values_.data());
  }
  // At `length` positions from `at` on, maybe in the block.
  const V* in(Block& block, int64_t at, int64_t length) const {
    if (!is_long_) return values_.data() + at;
    write(values_, at, length, block.values);
    return block.values;
  }

 private:
  static constexpr int64_t kLong = 4096;

  void write(const std::vector<V>& by_channel, int64_t at, int64_t length, V* to) const {
    runs_.by_channel(at, length, [&](int64_t channel, int64_t begin, int64_t end) {
      std::fill(to + begin, to + end, by_channel[channel]);
    });
  }

  const Runs& runs_;
  std::vector<V> values_;  // of a run, or of the channels where it is long
  bool is_long_;
};

// Sums per channel: block(offset, rows, position, first, second) adds a block's values to float sums by position,
// which are then added up.
template <typename Block>
std::vector<NormSums> sums_by_runs(const NormShape& s, const Runs& runs, Block block) {
  const int64_t tasks = std::clamp<int64_t>(s.total() / kNormGrain, 1, at::get_num_threads());
  std::vector<NormSums> partial(tasks * s.channels, {0, 0});
  at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    const FlushDenormals flush;
    std::vector<float> first(kNormPositions), second(kNormPositions);
    for (int64_t task = begin; task < end; ++task) {
      NormSums* sums = partial.data() + task * s.channels;
      runs.each(runs.count() * task / tasks, runs.count() * (task + 1) / tasks,
                [&](int64_t offset, const NormRows& rows, int64_t at) {
                  std::fill_n(first.data(), rows.length, 0.f), std::fill_n(second.data(), rows.length, 0.f);
                  block(offset, rows, at, first.data(), second.data());
                  runs.by_channel(at, rows.length, [&](int64_t channel, int64_t from, int64_t to) {
                    for (int64_t i = from; i < to; ++i)
                      sums[channel].first += first[i], sums[channel].second += second[i];
                  });
                });
    }
  });
  for (int64_t task = 1; task < tasks; ++task)
    for (int64_t c = 0; c < s.channels; ++c) {
      partial[c].first += partial[task * s.channels + c].first;
      partial[c].second += partial[task * s.channels + c].second;
    }
  partial.resize(s.channels);
  return partial;
}

template <typename Block>
void in_runs(const Runs& runs, Block block) {
  at::parallel_for(0, runs.count(), std::max<int64_t>(1, kNormGrain / runs.length()), [&](int64_t begin, int64_t end) {
    const FlushDenormals flush;
    runs.each(begin, end, block);
  });
}

// Calls visit(channel) for all channels, divided among the threads. visit reads a channel's planes twice; the second
// time they are in L2.
template <typename Visit>
void each_channel(const NormShape& s, Visit visit) {
  at::parallel_for(0, s.channels, std::max<int64_t>(1, kNormGrain / std::max<int64_t>(1, s.count())),
                   [&](int64_t begin, int64_t end) {
                     const FlushDenormals flush;
                     for (int64_t c = begin; c < end; ++c) visit(c);
                   });
}

}  // namespace prunekernels
