// masked_batch_norm and its gradients on CPU: the live channels of a batch norm whose parameters have full width.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <cmath>
#include <cstring>
#include <vector>

#include "check.h"
#include "cpu/caching_allocator.h"
#include "cpu/norm_apply.h"
#include "cpu/norm_passes.h"
#include "cpu/tensor_access.h"

namespace prunekernels {
namespace {

using OptionalTensor = std::optional<at::Tensor>;
using Three = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

void check_parameter(const char* op, const char* name, const OptionalTensor& t, int64_t features) {
  if (!t) return;
  PK_CHECK(t->scalar_type() == at::kFloat && t->dim() == 1 && t->size(0) == features && t->is_contiguous() &&
               t->device().is_cpu(),
           op, name, "contiguous float32 [" + std::to_string(features) + "] on the CPU", t->dtype(), " ", t->sizes(),
           " on ", t->device());
}

bool is_served(at::ScalarType type) { return type == at::kFloat || type == at::kBFloat16; }

// Calls f(T{}) with T = float or BFloat16.
template <typename F>
void with_norm_element(at::ScalarType type, F f) {
  type == at::kFloat ? f(float{}) : f(BFloat16{});
}

// The channels that are normalized. x has those alone, or a channel for every feature, of which the others are dead:
// these are not looked at, and results are exactly 0 there.
class LiveChannels {
 public:
  LiveChannels(const char* op, const at::Tensor& x, const OptionalTensor& index, int64_t features) {
    PK_CHECK(is_served(x.scalar_type()) && x.dim() == 4, op, "x", "float32 or bfloat16 [N, C, H, W]", x.dtype(), " ",
             x.sizes());
    const int64_t channels = x.size(1);
    place_.resize(channels);
    if (!index) {
      PK_CHECK(channels == features, op, "x", std::to_string(features) + " channels", x.sizes());
      rows_.resize(features);
      std::iota(rows_.begin(), rows_.end(), 0), std::iota(place_.begin(), place_.end(), 0);
      return;
    }
    const bool dims =
        index->scalar_type() == at::kInt && index->dim() == 1 && index->is_contiguous() && index->device().is_cpu();
    PK_CHECK(dims && (index->size(0) == channels || channels == features), op, "index",
             "contiguous int32 [" + std::to_string(channels) + "], one place per channel of x", index->dtype(), " ",
             index->sizes());
    wide_ = index->size(0) < channels;
    if (wide_) std::fill(place_.begin(), place_.end(), -1);
    for (int64_t j = 0; j < index->size(0); ++j) {
      const int64_t row = index->const_data_ptr<int32_t>()[j];
      PK_CHECK(row >= 0 && row < features, op, "index", "places below " + std::to_string(features), row);
      PK_CHECK(!wide_ || place_[row] < 0, op, "index", "each place once", row, " again");
      rows_.push_back(row);
      place_[wide_ ? row : j] = j;
    }
  }
  int64_t count() const { return static_cast<int64_t>(rows_.size()); }
  int64_t row(int64_t j) const { return rows_[j]; }                  // its feature
  int64_t channel(int64_t j) const { return wide_ ? rows_[j] : j; }  // of x
  int64_t place(int64_t channel) const { return place_[channel]; }   // among the live ones; -1: dead

  // A parameter of the live channels, `otherwise` where there is none.
  std::vector<float> gathered(const OptionalTensor& parameter, float otherwise) const {
    std::vector<float> values(rows_.size(), otherwise);
    if (parameter)
      for (size_t j = 0; j < rows_.size(); ++j) values[j] = parameter->const_data_ptr<float>()[rows_[j]];
    return values;
  }
  // [live] -> by channel of x, 0 where dead.
  std::vector<float> spread(const float* values) const {
    std::vector<float> by_channel(place_.size(), 0);
    for (int64_t j = 0; j < count(); ++j) by_channel[channel(j)] = values[j];
    return by_channel;
  }
  std::vector<uint32_t> keep() const {
    std::vector<uint32_t> by_channel(place_.size());
    for (size_t c = 0; c < place_.size(); ++c) by_channel[c] = place_[c] < 0 ? 0 : ~0u;
    return by_channel;
  }

 private:
  bool wide_ = false;
  std::vector<int64_t> rows_, place_;
};

template <typename T>
void zero_planes(const NormShape& s, T* y, int64_t channel) {
  for (int64_t n = 0; n < s.images; ++n) std::memset(y + s.plane(n, channel), 0, s.pixels * sizeof(T));
}

// Mean and 1 / standard deviation of each live channel, of the batch or as they were learned.
struct Statistics {
  float* mean;    // [live]
  float* invstd;  // [live]
  const LiveChannels& live;
  const OptionalTensor &running_mean, &running_var;
  double momentum, eps;

  // sums about shift, of count values; running statistics move on
  void of_batch(int64_t j, const NormSums& sums, float shift, int64_t count) const {
    const double n = static_cast<double>(count), offset = sums.first / n;
    const double variance = std::max(0.0, sums.second / n - offset * offset);
    mean[j] = static_cast<float>(shift + offset);
    invstd[j] = static_cast<float>(1 / std::sqrt(variance + eps));
    const auto towards = [&](const OptionalTensor& t, double value) {
      if (!t) return;
      float& running = t->mutable_data_ptr<float>()[live.row(j)];
      running = static_cast<float>(running + momentum * (value - running));
    };
    towards(running_mean, mean[j]), towards(running_var, variance * n / (n - 1));
  }
  void as_learned(int64_t j) const {
    mean[j] = running_mean->const_data_ptr<float>()[live.row(j)];
    invstd[j] = static_cast<float>(1 / std::sqrt(running_var->const_data_ptr<float>()[live.row(j)] + eps));
  }
};

using Positions = AtPositions<float>;

// Statistics of the batch, and what they make of each channel while it is in L2. y: null where statistics are all that
// is asked for.
template <typename T>
void train_by_planes(const NormShape& s, const LiveChannels& live, const T* x, T* y, const float* gamma,
                     const float* beta, const Statistics& stats) {
  const NormKernels<T>& kernels = norm_kernels<T>();
  each_channel(s, [&](int64_t c) {
    const int64_t j = live.place(c);
    if (j < 0) return y ? zero_planes(s, y, c) : void();
    NormSums sums{0, 0};
    const float shift = static_cast<float>(x[s.plane(0, c)]);
    for (int64_t n = 0; n < s.images; ++n) kernels.sums_segment(x + s.plane(n, c), s.pixels, shift, sums);
    stats.of_batch(j, sums, shift, s.count());
    for (int64_t n = 0; y && n < s.images; ++n)
      kernels.apply_segment(x + s.plane(n, c), y + s.plane(n, c), s.pixels, stats.mean[j], gamma[j] * stats.invstd[j],
                            beta[j], {});
  });
}

template <typename T>
void statistics_by_runs(const NormShape& s, const LiveChannels& live, const T* x, const Statistics& stats) {
  const NormKernels<T>& kernels = norm_kernels<T>();
  const Runs runs(s);
  std::vector<float> shift(s.channels);
  for (int64_t c = 0; c < s.channels; ++c) shift[c] = static_cast<float>(x[runs.first_of(c)]);
  const Positions shifts(runs, shift);
  const auto sums =
      sums_by_runs(s, runs, [&](int64_t offset, const NormRows& rows, int64_t at, float* first, float* second) {
        Positions::Block block;
        kernels.sums_rows(x + offset, rows, shifts.in(block, at, rows.length), first, second);
      });
  for (int64_t j = 0; j < live.count(); ++j)
    stats.of_batch(j, sums[live.channel(j)], shift[live.channel(j)], s.count());
}

template <typename T>
void normalize(const NormShape& s, const LiveChannels& live, const T* x, T* y, const float* gamma, const float* beta,
               const Statistics& stats, bool training) {
  if (training && s.by_planes()) return train_by_planes(s, live, x, y, gamma, beta, stats);
  if (training) {
    statistics_by_runs(s, live, x, stats);
  } else {
    for (int64_t j = 0; j < live.count(); ++j) stats.as_learned(j);
  }
  if (!y) return;
  std::vector<float> scale(live.count());
  for (int64_t j = 0; j < live.count(); ++j) scale[j] = gamma[j] * stats.invstd[j];
  apply<T>(s, x, y, {live.spread(stats.mean), live.spread(scale.data()), live.spread(beta), live.keep()}, {});
}

struct Forward {
  at::Tensor y, mean, invstd;
  std::vector<float> gamma, beta;  // [live]
};

// applies: whether y is written.
Forward forward(const char* op, const at::Tensor& x_in, const OptionalTensor& weight, const OptionalTensor& bias,
                const OptionalTensor& running_mean, const OptionalTensor& running_var, const LiveChannels& live,
                int64_t features, bool training, double momentum, double eps, bool applies) {
  check_parameter(op, "weight", weight, features);
  check_parameter(op, "bias", bias, features);
  check_parameter(op, "running_mean", running_mean, features);
  check_parameter(op, "running_var", running_var, features);
  PK_CHECK(training || (running_mean && running_var), op, "running_mean", "statistics, to evaluate with", "none");
  const at::MemoryFormat format = x_in.suggest_memory_format();
  const at::Tensor x = x_in.contiguous(format), y = empty_cached(x.sizes(), x.options(), format);
  const NormShape s(x, format);
  PK_CHECK(!training || s.count() > 1 || live.count() == 0, op, "x", "more than one value per channel when training",
           x.sizes());
  const at::Tensor mean = at::empty({live.count()}, x.options().dtype(at::kFloat)), invstd = at::empty_like(mean);
  const std::vector<float> gamma = live.gathered(weight, 1), beta = live.gathered(bias, 0);
  if (x.numel() == 0) return {y, mean.zero_(), invstd.zero_(), gamma, beta};

  const Statistics stats{
      mean.mutable_data_ptr<float>(), invstd.mutable_data_ptr<float>(), live, running_mean, running_var, momentum, eps};
  with_norm_element(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    T* const to = applies ? elements<T>(y) : nullptr;
    normalize(s, live, const_elements<T>(x), to, gamma.data(), beta.data(), stats, training);
  });
  return {y, mean, invstd, gamma, beta};
}

Three masked_batch_norm(const at::Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                        const OptionalTensor& running_mean, const OptionalTensor& running_var,
                        const OptionalTensor& index, int64_t features, bool training, double momentum, double eps) {
  constexpr const char* op = "masked_batch_norm";
  const LiveChannels live(op, x, index, features);
  const Forward all =
      forward(op, x, weight, bias, running_mean, running_var, live, features, training, momentum, eps, true);
  return {all.y, all.mean, all.invstd};
}

Three deferred_batch_norm(const at::Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                          const OptionalTensor& running_mean, const OptionalTensor& running_var,
                          const OptionalTensor& index, int64_t features, bool training, double momentum, double eps) {
  constexpr const char* op = "deferred_batch_norm";
  const LiveChannels live(op, x, index, features);
  PK_CHECK(live.count() == x.size(1), op, "index", "a place for each channel of x", live.count(), " for ", x.sizes());
  const Forward all =
      forward(op, x, weight, bias, running_mean, running_var, live, features, training, momentum, eps, false);
  const int64_t count = live.count();
  const at::Tensor table = at::empty({4, count}, all.mean.options());
  float* const rows = table.mutable_data_ptr<float>();
  const float *mean = all.mean.const_data_ptr<float>(), *invstd = all.invstd.const_data_ptr<float>();
  for (int64_t j = 0; j < count; ++j) {
    rows[j] = mean[j], rows[count + j] = invstd[j];
    rows[2 * count + j] = all.gamma[j] * invstd[j], rows[3 * count + j] = all.beta[j];
  }
  return {all.y, table, at::empty({2}, x.options().dtype(at::kLong)).zero_()};
}

// The rows of a table, each [channels].
struct TableRows {
  const float *mean, *scale, *bias;

  TableRows(const char* op, const at::Tensor& table, int64_t channels) {
    PK_CHECK(table.scalar_type() == at::kFloat && table.dim() == 2 && table.size(0) == 4 && table.size(1) == channels &&
                 table.is_contiguous() && table.device().is_cpu(),
             op, "table", "contiguous float32 [4, " + std::to_string(channels) + "] on the CPU", table.dtype(), " ",
             table.sizes(), " on ", table.device());
    mean = table.const_data_ptr<float>();
    scale = mean + 2 * channels, bias = mean + 3 * channels;
  }
};

void apply_batch_norm_(const at::Tensor& y, const at::Tensor& x_in, const at::Tensor& table,
                       const OptionalTensor& index, int64_t features, const OptionalTensor& add_in, bool relu) {
  constexpr const char* op = "apply_batch_norm_";
  PK_CHECK(is_served(x_in.scalar_type()) && x_in.dim() == 4, op, "x", "float32 or bfloat16 [N, C, H, W]", x_in.dtype(),
           " ", x_in.sizes());
  const int64_t channels = x_in.size(1);
  const TableRows rows(op, table, channels);
  const at::MemoryFormat format = y.suggest_memory_format();
  for (const at::Tensor* each : {&y, add_in ? &*add_in : &x_in})
    PK_CHECK(each->sizes() == x_in.sizes() && each->scalar_type() == x_in.scalar_type(), op, each == &y ? "y" : "add",
             c10::str(x_in.dtype(), " ", x_in.sizes(), " as x"), each->dtype(), " ", each->sizes());
  PK_CHECK(y.is_contiguous(format), op, "y", "a tensor without gaps", y.strides());
  if (y.numel() == 0) return;
  const at::Tensor x = x_in.contiguous(format), add = add_in ? add_in->contiguous(format) : at::Tensor();
  const NormShape s(x, format);
  with_norm_element(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const NormEnd<T> end{add.defined() ? const_elements<T>(add) : nullptr, relu};
    const auto listed = [&](const float* row) { return std::vector<float>(row, row + channels); };
    const Scales by{listed(rows.mean), listed(rows.scale), listed(rows.bias), std::vector<uint32_t>(channels, ~0u)};
    apply<T>(s, const_elements<T>(x), elements<T>(y), by, end);
  });
}

at::Tensor batch_norm_relu(const at::Tensor& y, const at::Tensor& x, const at::Tensor& table,
                           const OptionalTensor& index, int64_t features, const OptionalTensor& add,
                           const OptionalTensor& gate) {
  const at::Tensor out = empty_cached(y.sizes(), y.options(), y.suggest_memory_format());
  apply_batch_norm_(out, x, table, index, features, add, true);
  return out;
}

at::Tensor deferred_sum(const at::Tensor& a, const at::Tensor& b) {
  PK_CHECK(a.sizes() == b.sizes() && a.scalar_type() == b.scalar_type(), "deferred_sum", "b",
           c10::str(a.dtype(), " ", a.sizes(), " as a"), b.dtype(), " ", b.sizes());
  return empty_cached(a.sizes(), a.options(), a.suggest_memory_format());
}

// grad_x = scale * (grad - mean(grad) - (x - mean) * invstd^2 * mean(grad * (x - mean)))
class Slopes {
 public:
  // bias: of a norm with a relu behind it, or null
  Slopes(const LiveChannels& live, const OptionalTensor& weight, const float* bias, const at::Tensor& mean,
         const at::Tensor& invstd, const at::Tensor& grad_weight, const at::Tensor& grad_bias, int64_t count,
         bool training)
      : mean(mean.const_data_ptr<float>()),
        bias(bias),
        scale(live.gathered(weight, 1)),
        factor(live.count(), 0),
        offset(live.count(), 0),
        live_(live),
        invstd_(invstd.const_data_ptr<float>()),
        grad_weight_(grad_weight.mutable_data_ptr<float>()),
        grad_bias_(grad_bias.mutable_data_ptr<float>()),
        count_(static_cast<double>(count)),
        training_(training) {
    for (int64_t j = 0; j < live.count(); ++j) scale[j] *= invstd_[j];
  }
  void set(int64_t j, const NormSums& sums) {
    grad_weight_[live_.row(j)] = static_cast<float>(sums.second * invstd_[j]);
    grad_bias_[live_.row(j)] = static_cast<float>(sums.first);
    if (!training_) return;
    const double square = static_cast<double>(invstd_[j]) * invstd_[j];
    factor[j] = static_cast<float>(-scale[j] * square * sums.second / count_);
    offset[j] = static_cast<float>(-scale[j] * sums.first / count_);
  }

  NormGate gate(int64_t j) const { return bias ? NormGate{true, scale[j], bias[j]} : NormGate{}; }

  const float *mean, *bias;                  // [live]
  std::vector<float> scale, factor, offset;  // [live]

 private:
  const LiveChannels& live_;
  const float* invstd_;
  float *grad_weight_, *grad_bias_;
  double count_;
  bool training_;
};

template <typename T>
void backward_by_planes(const NormShape& s, const LiveChannels& live, const T* grad, const T* x, T* grad_x,
                        Slopes& slopes) {
  const NormKernels<T>& kernels = norm_kernels<T>();
  each_channel(s, [&](int64_t c) {
    const int64_t j = live.place(c);
    if (j < 0) return zero_planes(s, grad_x, c);
    NormSums sums{0, 0};
    for (int64_t n = 0; n < s.images; ++n)
      kernels.grad_sums_segment(grad + s.plane(n, c), x + s.plane(n, c), s.pixels, slopes.mean[j], slopes.gate(j),
                                sums);
    slopes.set(j, sums);
    for (int64_t n = 0; n < s.images; ++n)
      kernels.grad_apply_segment(grad + s.plane(n, c), x + s.plane(n, c), grad_x + s.plane(n, c), s.pixels,
                                 slopes.mean[j], slopes.scale[j], slopes.factor[j], slopes.offset[j], slopes.gate(j));
  });
}

template <typename T>
void backward_by_runs(const NormShape& s, const LiveChannels& live, const T* grad, const T* x, T* grad_x,
                      Slopes& slopes) {
  const NormKernels<T>& kernels = norm_kernels<T>();
  const Runs runs(s);
  const auto positions = [&](const float* values) { return Positions(runs, live.spread(values)); };
  const Positions mean = positions(slopes.mean), scale = positions(slopes.scale.data());
  const std::optional<Positions> bias = slopes.bias ? std::optional(positions(slopes.bias)) : std::nullopt;
  const auto sums =
      sums_by_runs(s, runs, [&](int64_t offset, const NormRows& rows, int64_t at, float* first, float* second) {
        Positions::Block block[3];
        NormGates gates{};
        if (bias) gates = {scale.in(block[1], at, rows.length), bias->in(block[2], at, rows.length)};
        kernels.grad_sums_rows(grad + offset, x + offset, rows, mean.in(block[0], at, rows.length), gates, first,
                               second);
      });
  for (int64_t j = 0; j < live.count(); ++j) slopes.set(j, sums[live.channel(j)]);
  const Positions factor = positions(slopes.factor.data()), offsets = positions(slopes.offset.data());
  const AtPositions<uint32_t> keep(runs, live.keep());
  in_runs(runs, [&](int64_t offset, const NormRows& rows, int64_t at) {
    Positions::Block block[5];
    AtPositions<uint32_t>::Block kept;
    const auto in = [&](const Positions& values, int i) { return values.in(block[i], at, rows.length); };
    const NormSlopes by{in(mean, 0),
                        in(scale, 1),
                        in(factor, 2),
                        in(offsets, 3),
                        bias ? in(*bias, 4) : nullptr,
                        keep.in(kept, at, rows.length)};
    kernels.grad_apply_rows(grad + offset, x + offset, grad_x + offset, rows, by);
  });
}

Three masked_batch_norm_backward(const at::Tensor& grad_in, const at::Tensor& x_in, const OptionalTensor& weight,
                                 const at::Tensor& mean, const at::Tensor& invstd, const OptionalTensor& index,
                                 int64_t features, bool training, const OptionalTensor& relu_table) {
  constexpr const char* op = "masked_batch_norm_backward";
  const LiveChannels live(op, x_in, index, features);
  check_parameter(op, "weight", weight, features);
  check_parameter(op, "mean", mean, live.count());
  check_parameter(op, "invstd", invstd, live.count());
  PK_CHECK(grad_in.sizes() == x_in.sizes() && grad_in.scalar_type() == x_in.scalar_type(), op, "grad",
           c10::str(x_in.dtype(), " ", x_in.sizes(), " as x"), grad_in.dtype(), " ", grad_in.sizes());
  const at::MemoryFormat format = x_in.suggest_memory_format();
  const at::Tensor x = x_in.contiguous(format), grad = grad_in.contiguous(format);
  const at::Tensor grad_x = empty_cached(x.sizes(), x.options(), format);
  const at::Tensor grad_weight = at::empty({features}, mean.options()).zero_(),
                   grad_bias = at::empty_like(grad_weight).zero_();
  if (x.numel() == 0) return {grad_x, grad_weight, grad_bias};

  const NormShape s(x, format);
  const float* bias = relu_table ? TableRows(op, *relu_table, live.count()).bias : nullptr;
  Slopes slopes(live, weight, bias, mean, invstd, grad_weight, grad_bias, s.count(), training);
  with_norm_element(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const auto backward = s.by_planes() ? backward_by_planes<T> : backward_by_runs<T>;
    backward(s, live, const_elements<T>(grad), const_elements<T>(x), elements<T>(grad_x), slopes);
  });
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace

TORCH_LIBRARY_IMPL(prunekernels, CPU, m) {
  m.impl("masked_batch_norm", masked_batch_norm);
  m.impl("masked_batch_norm_backward", masked_batch_norm_backward);
  m.impl("deferred_batch_norm", deferred_batch_norm);
  m.impl("apply_batch_norm_", apply_batch_norm_);
  m.impl("batch_norm_relu", batch_norm_relu);
  m.impl("deferred_sum", deferred_sum);
}

}  // namespace prunekernels
