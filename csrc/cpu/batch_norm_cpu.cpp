// masked_batch_norm and its gradients on CPU: the live channels of a batch norm whose parameters have full width.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "check.h"
#include "cpu/caching_allocator.h"
#include "cpu/denormals.h"
#include "cpu/kernels/batch_norm.h"

namespace prunekernels {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

constexpr int64_t kGrainFloats = 16 << 10;  // less than this per thread is not worth waking it
constexpr int64_t kPlane = 512;             // shorter planes of NCHW are worked on many at a time

struct NormShape {
  int64_t images, channels, pixels;
  bool planes;  // NCHW, of planes long enough to be worked on one by one

  int64_t count() const { return images * pixels; }  // of values per channel
  int64_t total() const { return count() * channels; }
};

NormShape shape_of(const at::Tensor& x, at::MemoryFormat format) {
  const int64_t pixels = x.size(2) * x.size(3);
  return {x.size(0), x.size(1), pixels, format == at::MemoryFormat::Contiguous && pixels >= kPlane};
}

// An activation as runs of positions, each position of one channel: some pixels of NHWC, or some images of NCHW, as
// many as fill whole vectors.
class Runs {
 public:
  Runs(const NormShape& s, at::MemoryFormat format) : shape_(s) {
    constexpr int64_t kVector = 16, kLeast = 128;
    const int64_t inner = format == at::MemoryFormat::Contiguous ? s.pixels : 1, unit = inner * s.channels;
    const int64_t whole = kVector / std::gcd(kVector, unit);
    length_ = unit * (unit >= kLeast ? 1 : (kLeast / (whole * unit) + 1) * whole);
    channel_.resize(length_);
    for (int64_t i = 0; i < length_; ++i) channel_[i] = static_cast<int32_t>(i / inner % s.channels);
    first_of_.resize(s.channels);
    for (int64_t c = 0; c < s.channels; ++c) first_of_[c] = c * inner;
  }
  int64_t count() const { return (shape_.total() + length_ - 1) / length_; }
  int64_t length() const { return length_; }
  int32_t channel(int64_t position) const { return channel_[position]; }
  int64_t first_of(int64_t channel) const { return first_of_[channel]; }  // where its first value lies

  // A parameter of every channel, at each of its positions.
  std::vector<float> repeated(const float* parameter) const {
    std::vector<float> run(length_);
    for (int64_t i = 0; i < length_; ++i) run[i] = parameter[channel_[i]];
    return run;
  }

  // visit(offset, rows, position, length): runs begin..end in blocks of at most kNormRows rows and kNormPositions
  // positions; the last run of all may be shorter.
  template <typename Visit>
  void each(int64_t begin, int64_t end, Visit visit) const {
    const int64_t whole = shape_.total() / length_;
    for (int64_t first = begin; first < std::min(end, whole); first += kNormRows) {
      const int64_t rows = std::min({end, whole, first + kNormRows}) - first;
      for (int64_t at = 0; at < length_; at += kNormPositions)
        visit(first * length_ + at, rows, at, std::min(kNormPositions, length_ - at));
    }
    if (end > whole)
      for (int64_t at = 0; at < shape_.total() % length_; at += kNormPositions)
        visit(whole * length_ + at, 1, at, std::min(kNormPositions, shape_.total() % length_ - at));
  }

 private:
  const NormShape& shape_;
  int64_t length_;
  std::vector<int32_t> channel_;
  std::vector<int64_t> first_of_;
};

// Sums per channel: block(offset, rows, position, length, first, second) adds a block's values to float sums by
// position, which are then added up.
template <typename Block>
std::vector<NormSums> sums_by_runs(const NormShape& s, const Runs& runs, Block block) {
  const int64_t tasks = std::clamp<int64_t>(s.total() / kGrainFloats, 1, at::get_num_threads());
  std::vector<NormSums> partial(tasks * s.channels, {0, 0});
  at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    const FlushDenormals flush;
    std::vector<float> first(kNormPositions), second(kNormPositions);
    for (int64_t task = begin; task < end; ++task) {
      NormSums* sums = partial.data() + task * s.channels;
      runs.each(runs.count() * task / tasks, runs.count() * (task + 1) / tasks,
                [&](int64_t offset, int64_t rows, int64_t at, int64_t length) {
                  std::fill_n(first.data(), length, 0.f), std::fill_n(second.data(), length, 0.f);
                  block(offset, rows, at, length, first.data(), second.data());
                  for (int64_t i = 0; i < length; ++i) {
                    NormSums& sum = sums[runs.channel(at + i)];
                    sum.first += first[i], sum.second += second[i];
                  }
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
void in_runs(const NormShape& s, const Runs& runs, Block block) {
  at::parallel_for(0, runs.count(), std::max<int64_t>(1, kGrainFloats / runs.length()),
                   [&](int64_t begin, int64_t end) {
                     const FlushDenormals flush;
                     runs.each(begin, end, block);
                   });
}

// Calls visit(channel) for all channels, divided among the threads. visit reads a channel's planes twice; the second
// time they are in L2.
template <typename Visit>
void each_channel(const NormShape& s, Visit visit) {
  at::parallel_for(0, s.channels, std::max<int64_t>(1, kGrainFloats / std::max<int64_t>(1, s.count())),
                   [&](int64_t begin, int64_t end) {
                     const FlushDenormals flush;
                     for (int64_t c = begin; c < end; ++c) visit(c);
                   });
}

// One parameter per live channel, gathered from full width; `otherwise` where there is none.
std::vector<float> gathered(const OptionalTensor& parameter, const std::vector<int64_t>& rows, float otherwise) {
  std::vector<float> values(rows.size(), otherwise);
  if (parameter)
    for (size_t j = 0; j < rows.size(); ++j) values[j] = parameter->const_data_ptr<float>()[rows[j]];
  return values;
}

void check_parameter(const char* op, const char* name, const OptionalTensor& t, int64_t features) {
  if (!t) return;
  PK_CHECK(t->scalar_type() == at::kFloat && t->dim() == 1 && t->size(0) == features && t->is_contiguous() &&
               t->device().is_cpu(),
           op, name, "contiguous float32 [" + std::to_string(features) + "] on the CPU", t->dtype(), " ", t->sizes(),
           " on ", t->device());
}

// The feature that each channel of x belongs to.
std::vector<int64_t> live_rows(const char* op, const at::Tensor& x, const OptionalTensor& index, int64_t features) {
  PK_CHECK(x.scalar_type() == at::kFloat && x.dim() == 4, op, "x", "float32 [N, C, H, W]", x.dtype(), " ", x.sizes());
  std::vector<int64_t> rows(x.size(1));
  if (!index) {
    PK_CHECK(x.size(1) == features, op, "x", std::to_string(features) + " channels", x.sizes());
    std::iota(rows.begin(), rows.end(), 0);
    return rows;
  }
  PK_CHECK(index->scalar_type() == at::kInt && index->dim() == 1 && index->size(0) == x.size(1) &&
               index->is_contiguous() && index->device().is_cpu(),
           op, "index", "contiguous int32 [" + std::to_string(x.size(1)) + "], one place per channel of x",
           index->dtype(), " ", index->sizes());
  for (size_t j = 0; j < rows.size(); ++j) {
    rows[j] = index->const_data_ptr<int32_t>()[j];
    PK_CHECK(rows[j] >= 0 && rows[j] < features, op, "index", "places below " + std::to_string(features), rows[j]);
  }
  return rows;
}

// Mean and 1 / standard deviation of each channel, of the batch or as they were learned.
struct Statistics {
  float* mean;    // [channels]
  float* invstd;  // [channels]
  double eps;

  // sums about shift, of count values; returns the variance that the running one learns from
  double of_batch(int64_t c, const NormSums& sums, float shift, int64_t count) const {
    const double n = static_cast<double>(count), offset = sums.first / n;
    const double variance = std::max(0.0, sums.second / n - offset * offset);
    mean[c] = static_cast<float>(shift + offset);
    invstd[c] = static_cast<float>(1 / std::sqrt(variance + eps));
    return variance * n / (n - 1);
  }
};

std::tuple<at::Tensor, at::Tensor, at::Tensor> masked_batch_norm(const at::Tensor& x_in, const OptionalTensor& weight,
                                                                 const OptionalTensor& bias,
                                                                 const OptionalTensor& running_mean,
                                                                 const OptionalTensor& running_var,
                                                                 const OptionalTensor& index, int64_t features,
                                                                 bool training, double momentum, double eps) {
  constexpr const char* op = "masked_batch_norm";
  const std::vector<int64_t> rows = live_rows(op, x_in, index, features);
  check_parameter(op, "weight", weight, features);
  check_parameter(op, "bias", bias, features);
  check_parameter(op, "running_mean", running_mean, features);
  check_parameter(op, "running_var", running_var, features);
  PK_CHECK(training || (running_mean && running_var), op, "running_mean", "statistics, to evaluate with", "none");
  const at::MemoryFormat format = x_in.suggest_memory_format();
  const at::Tensor x = x_in.contiguous(format), y = empty_cached(x.sizes(), x.options(), format);
  const NormShape s = shape_of(x, format);
  PK_CHECK(!training || s.count() > 1 || s.channels == 0, op, "x", "more than one value per channel when training",
           x.sizes());
  const at::Tensor mean = at::empty({s.channels}, x.options().memory_format(std::nullopt)),
                   invstd = at::empty_like(mean);
  if (x.numel() == 0) return {y, mean.zero_(), invstd.zero_()};

  const Statistics stats{mean.mutable_data_ptr<float>(), invstd.mutable_data_ptr<float>(), eps};
  const std::vector<float> gamma = gathered(weight, rows, 1), beta = gathered(bias, rows, 0);
  const float* from = x.const_data_ptr<float>();
  float* to = y.mutable_data_ptr<float>();
  const NormKernels kernels = norm_kernels();
  const auto learn = [&](int64_t c, double variance) {
    const auto towards = [&](const OptionalTensor& t, double value) {
      float& running = t->mutable_data_ptr<float>()[rows[c]];
      running = static_cast<float>(running + momentum * (value - running));
    };
    if (running_mean) towards(running_mean, stats.mean[c]);
    if (running_var) towards(running_var, variance);
  };
  const auto recall = [&](int64_t c) {
    stats.mean[c] = running_mean->const_data_ptr<float>()[rows[c]];
    stats.invstd[c] = static_cast<float>(1 / std::sqrt(running_var->const_data_ptr<float>()[rows[c]] + eps));
  };
  if (s.planes) {
    each_channel(s, [&](int64_t c) {
      const auto plane = [&](int64_t n) { return (n * s.channels + c) * s.pixels; };
      if (training) {
        NormSums sums{0, 0};
        const float shift = from[plane(0)];
        for (int64_t n = 0; n < s.images; ++n) kernels.sums_segment(from + plane(n), s.pixels, shift, sums);
        learn(c, stats.of_batch(c, sums, shift, s.count()));
      } else {
        recall(c);
      }
      for (int64_t n = 0; n < s.images; ++n)
        kernels.apply_segment(from + plane(n), to + plane(n), s.pixels, stats.mean[c], gamma[c] * stats.invstd[c],
                              beta[c]);
    });
    return {y, mean, invstd};
  }
  const Runs runs(s, format);
  if (training) {
    std::vector<float> shift(s.channels);
    for (int64_t c = 0; c < s.channels; ++c) shift[c] = from[runs.first_of(c)];
    const std::vector<float> shifts = runs.repeated(shift.data());
    const auto sums =
        sums_by_runs(s, runs, [&](int64_t at, int64_t count, int64_t position, int64_t length, float* a, float* b) {
          kernels.sums_rows(from + at, count, length, runs.length(), shifts.data() + position, a, b);
        });
    for (int64_t c = 0; c < s.channels; ++c) learn(c, stats.of_batch(c, sums[c], shift[c], s.count()));
  } else {
    for (int64_t c = 0; c < s.channels; ++c) recall(c);
  }
  std::vector<float> scale(s.channels);
  for (int64_t c = 0; c < s.channels; ++c) scale[c] = gamma[c] * stats.invstd[c];
  const auto means = runs.repeated(stats.mean), scales = runs.repeated(scale.data()),
             betas = runs.repeated(beta.data());
  in_runs(s, runs, [&](int64_t offset, int64_t count, int64_t at, int64_t length) {
    kernels.apply_rows(from + offset, to + offset, count, length, runs.length(), means.data() + at, scales.data() + at,
                       betas.data() + at);
  });
  return {y, mean, invstd};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> masked_batch_norm_backward(
    const at::Tensor& grad_in, const at::Tensor& x_in, const OptionalTensor& weight, const at::Tensor& mean,
    const at::Tensor& invstd, const OptionalTensor& index, int64_t features, bool training) {
  constexpr const char* op = "masked_batch_norm_backward";
  const std::vector<int64_t> rows = live_rows(op, x_in, index, features);
  check_parameter(op, "weight", weight, features);
  check_parameter(op, "mean", mean, x_in.size(1));
  check_parameter(op, "invstd", invstd, x_in.size(1));
  PK_CHECK(grad_in.sizes() == x_in.sizes() && grad_in.scalar_type() == at::kFloat, op, "grad",
           c10::str("float32 ", x_in.sizes()), grad_in.dtype(), " ", grad_in.sizes());
  const at::MemoryFormat format = x_in.suggest_memory_format();
  const at::Tensor x = x_in.contiguous(format), grad = grad_in.contiguous(format);
  const at::Tensor grad_x = empty_cached(x.sizes(), x.options(), format);
  const at::Tensor grad_weight = at::empty({features}, mean.options()).zero_(),
                   grad_bias = at::empty_like(grad_weight).zero_();
  if (x.numel() == 0) return {grad_x, grad_weight, grad_bias};

  const NormShape s = shape_of(x, format);
  const NormKernels kernels = norm_kernels();
  const std::vector<float> gamma = gathered(weight, rows, 1);
  const float *from = x.const_data_ptr<float>(), *slope = grad.const_data_ptr<float>();
  const float *means = mean.const_data_ptr<float>(), *invstds = invstd.const_data_ptr<float>();
  float* to = grad_x.mutable_data_ptr<float>();
  std::vector<float> scale(s.channels), factor(s.channels, 0), offset(s.channels, 0);
  // grad_x = scale * (grad - mean(grad) - (x - mean) * invstd^2 * mean(grad * (x - mean)))
  const auto finish = [&](int64_t c, const NormSums& sums) {
    grad_weight.mutable_data_ptr<float>()[rows[c]] = static_cast<float>(sums.second * invstds[c]);
    grad_bias.mutable_data_ptr<float>()[rows[c]] = static_cast<float>(sums.first);
    scale[c] = gamma[c] * invstds[c];
    if (!training) return;
    const double n = static_cast<double>(s.count()), square = static_cast<double>(invstds[c]) * invstds[c];
    factor[c] = static_cast<float>(-scale[c] * square * sums.second / n);
    offset[c] = static_cast<float>(-scale[c] * sums.first / n);
  };
  if (s.planes) {
    each_channel(s, [&](int64_t c) {
      const auto plane = [&](int64_t n) { return (n * s.channels + c) * s.pixels; };
      NormSums sums{0, 0};
      for (int64_t n = 0; n < s.images; ++n)
        kernels.grad_sums_segment(slope + plane(n), from + plane(n), s.pixels, means[c], sums);
      finish(c, sums);
      for (int64_t n = 0; n < s.images; ++n)
        kernels.grad_apply_segment(slope + plane(n), from + plane(n), to + plane(n), s.pixels, means[c], scale[c],
                                   factor[c], offset[c]);
    });
    return {grad_x, grad_weight, grad_bias};
  }
  const Runs runs(s, format);
  const std::vector<float> run_means = runs.repeated(means);
  const auto sums = sums_by_runs(
      s, runs, [&](int64_t at, int64_t count, int64_t position, int64_t length, float* first, float* second) {
        kernels.grad_sums_rows(slope + at, from + at, count, length, runs.length(), run_means.data() + position, first,
                               second);
      });
  for (int64_t c = 0; c < s.channels; ++c) finish(c, sums[c]);
  const auto scales = runs.repeated(scale.data()), factors = runs.repeated(factor.data()),
             offsets = runs.repeated(offset.data());
  in_runs(s, runs, [&](int64_t at, int64_t count, int64_t position, int64_t length) {
    kernels.grad_apply_rows(slope + at, from + at, to + at, count, length, runs.length(), run_means.data() + position,
                            scales.data() + position, factors.data() + position, offsets.data() + position);
  });
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace

TORCH_LIBRARY_IMPL(prunekernels, CPU, m) {
  m.impl("masked_batch_norm", masked_batch_norm);
  m.impl("masked_batch_norm_backward", masked_batch_norm_backward);
}

}  // namespace prunekernels
