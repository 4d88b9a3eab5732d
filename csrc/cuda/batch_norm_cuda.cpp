// masked_batch_norm and its gradients on the device. The kernels work on channels_last activations.
#include <ATen/DeviceGuard.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "check.h"
#include "cuda/conv_call.h"
#include "cuda/host_cache.h"
#include "cuda/kernels/batch_norm.h"

namespace prunekernels {
namespace {

using Three = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

// Of each channel of x, its feature and its place among the live ones, or -1; checked once. index [live]: features of
// the channels of x, -1 for a hole, or of those that are live where x has them all.
class NormChannels : public device::DeviceBuffers {
 public:
  NormChannels(const char* op, const std::vector<int32_t>& index, int64_t channels, int64_t features,
               at::Device device) {
    const auto live = static_cast<int64_t>(index.size());
    const bool wide = live < channels;
    std::vector<int32_t> words(2 * channels, -1);  // features, then places
    for (int64_t j = 0; j < live; ++j) {
      const int32_t feature = index[j];
      PK_CHECK(feature < features && feature >= (wide ? 0 : -1), op, "index",
               "places below " + std::to_string(features), feature);
      const int64_t channel = wide ? feature : j;
      PK_CHECK(words[channels + channel] < 0, op, "index", "each place once", feature, " again");
      words[channel] = feature, words[channels + channel] = static_cast<int32_t>(j);
    }
    feature_ = keep(words, device);
    place_ = feature_ + channels;
  }
  const int32_t* feature() const { return feature_; }  // device [channels]
  const int32_t* place() const { return place_; }      // device [channels]

 private:
  const int32_t *feature_, *place_;
};

// x as the kernels take it.
struct NormInput {
  at::Tensor x;         // channels_last
  at::Tensor identity;  // int32 [channels]: lists of a norm without an index
  std::shared_ptr<const NormChannels> lists;
  int64_t live;
  NormShape shape;

  NormInput(const char* op, const at::Tensor& given, const OptionalTensor& index, int64_t features)
      : x(given.contiguous(at::MemoryFormat::ChannelsLast)), live(index ? index->numel() : features) {
    const int64_t channels = x.size(1);
    shape = {channels ? x.numel() / channels : 0, channels, element_of(x.scalar_type()), nullptr, nullptr};
    if (!index) {
      PK_CHECK(channels == features, op, "x", std::to_string(features) + " channels", x.sizes());
      identity = at::arange(channels, x.options().dtype(at::kInt).memory_format(std::nullopt));
      shape.feature = shape.place = identity.const_data_ptr<int32_t>();
      return;
    }
    PK_CHECK(index->device() == x.device() && index->scalar_type() == at::kInt && index->dim() == 1 &&
                 (live == channels || channels == features) && live <= channels,
             op, "index",
             "int32 [" + std::to_string(channels) + "], one place per channel of x, on " + x.device().str(),
             index->dtype(), " ", index->sizes(), " on ", index->device());
    const int64_t parameter = (int64_t{1} << 62) | channels << 31 | features;  // no other user gives numbers as high
    lists = std::static_pointer_cast<const NormChannels>(
        host_cache::find(op, "index", *index, parameter, [&](const std::vector<int32_t>& words) {
          return std::make_shared<const NormChannels>(op, words, channels, features, x.device());
        }));
    shape.feature = lists->feature(), shape.place = lists->place();
  }
};

void check_input(const char* op, const at::Tensor& x) {
  const at::ScalarType type = x.scalar_type();
  PK_CHECK((type == at::kFloat || type == at::kBFloat16 || type == at::kHalf) && x.dim() == 4, op, "x",
           "float32, bfloat16 or float16 [N, C, H, W]", x.dtype(), " ", x.sizes());
}

void check_parameter(const char* op, const char* name, const OptionalTensor& t, int64_t count, const at::Tensor& x) {
  if (!t) return;
  PK_CHECK(t->scalar_type() == at::kFloat && t->dim() == 1 && t->size(0) == count && t->is_contiguous() &&
               t->device() == x.device(),
           op, name, "contiguous float32 [" + std::to_string(count) + "] on " + x.device().str(), t->dtype(), " ",
           t->sizes(), " on ", t->device());
}

float* floats(const OptionalTensor& t) { return t ? t->mutable_data_ptr<float>() : nullptr; }
const float* const_floats(const OptionalTensor& t) { return t ? t->const_data_ptr<float>() : nullptr; }

// scales: two rows for those of y, and y is not written; undefined: y is.
Three normalize(const char* op, const at::Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                const OptionalTensor& running_mean, const OptionalTensor& running_var, const NormInput& input,
                int64_t features, bool training, double momentum, double eps, const at::Tensor& table) {
  check_parameter(op, "weight", weight, features, x);
  check_parameter(op, "bias", bias, features, x);
  check_parameter(op, "running_mean", running_mean, features, x);
  check_parameter(op, "running_var", running_var, features, x);
  PK_CHECK(training || (running_mean && running_var), op, "running_mean, running_var", "both, outside of training",
           "None");
  PK_CHECK(!training || input.shape.pixels > 1 || input.live == 0, op, "x",
           "more than one value per channel when training", x.sizes());
  const at::TensorOptions options = x.options().dtype(at::kFloat).memory_format(std::nullopt);
  const bool deferred = table.defined();
  const at::Tensor y = at::empty_like(input.x), mean = deferred ? table[0] : at::empty({input.live}, options),
                   invstd = deferred ? table[1] : at::empty_like(mean);
  if (x.numel() == 0) return {y.contiguous(x.suggest_memory_format()), mean.zero_(), invstd.zero_()};
  float* const rows = deferred ? table.mutable_data_ptr<float>() : nullptr;
  const at::Tensor workspace = at::empty({batch_norm_workspace(input.shape)}, options);
  const BatchNorm norm{input.shape,
                       const_floats(weight),
                       const_floats(bias),
                       floats(running_mean),
                       floats(running_var),
                       training,
                       momentum,
                       eps,
                       input.x.const_data_ptr(),
                       deferred ? nullptr : y.mutable_data_ptr(),
                       mean.mutable_data_ptr<float>(),
                       invstd.mutable_data_ptr<float>(),
                       deferred ? NormScales{rows + 2 * input.live, rows + 3 * input.live} : NormScales{},
                       workspace.mutable_data_ptr<float>()};
  PK_LAUNCH(op, launch_batch_norm, norm, device::current_stream());
  return {y.contiguous(x.suggest_memory_format()), mean, invstd};
}

Three masked_batch_norm(const at::Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                        const OptionalTensor& running_mean, const OptionalTensor& running_var,
                        const OptionalTensor& index, int64_t features, bool training, double momentum, double eps) {
  constexpr const char* op = "masked_batch_norm";
  const at::DeviceGuard guard(x.device());
  check_input(op, x);
  return normalize(op, x, weight, bias, running_mean, running_var, NormInput(op, x, index, features), features,
                   training, momentum, eps, {});
}

Three deferred_batch_norm(const at::Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                          const OptionalTensor& running_mean, const OptionalTensor& running_var,
                          const OptionalTensor& index, int64_t features, bool training, double momentum, double eps) {
  constexpr const char* op = "deferred_batch_norm";
  const at::DeviceGuard guard(x.device());
  check_input(op, x);
  const NormInput input(op, x, index, features);
  PK_CHECK(input.live == x.size(1), op, "index", "a place for each channel of x", input.live, " for ", x.sizes());
  const at::Tensor table = at::empty({4, input.live}, x.options().dtype(at::kFloat).memory_format(std::nullopt));
  if (x.numel() == 0) table.zero_();
  const at::Tensor y = std::get<0>(
      normalize(op, x, weight, bias, running_mean, running_var, input, features, training, momentum, eps, table));
  return {y, table, at::zeros({2}, at::TensorOptions(at::kCPU).dtype(at::kLong))};
}

// Rows of a table that deferred_batch_norm made.
NormScales scales_of(const char* op, const at::Tensor& table, int64_t channels, const at::Tensor& x) {
  PK_CHECK(table.scalar_type() == at::kFloat && table.dim() == 2 && table.size(0) == 4 && table.size(1) == channels &&
               table.is_contiguous() && table.device() == x.device(),
           op, "table", "contiguous float32 [4, " + std::to_string(channels) + "] on " + x.device().str(),
           table.dtype(), " ", table.sizes(), " on ", table.device());
  float* const rows = const_cast<float*>(table.const_data_ptr<float>());
  return {rows + 2 * channels, rows + 3 * channels};
}

void apply_batch_norm_(const at::Tensor& y, const at::Tensor& x, const at::Tensor& table, const OptionalTensor& index,
                       int64_t features, const OptionalTensor& add, bool relu) {
  constexpr const char* op = "apply_batch_norm_";
  const at::DeviceGuard guard(x.device());
  check_input(op, x);
  const NormInput input(op, x, index, features);
  const NormScales scales = scales_of(op, table, x.size(1), x);
  for (const at::Tensor* each : {&y, add ? &*add : &x})
    PK_CHECK(each->sizes() == x.sizes() && each->scalar_type() == x.scalar_type() && each->device() == x.device(), op,
             each == &y ? "y" : "add", c10::str(x.dtype(), " ", x.sizes(), " on ", x.device(), ", as x"), each->dtype(),
             " ", each->sizes(), " on ", each->device());
  if (x.numel() == 0) return;
  const at::Tensor to = y.is_contiguous(at::MemoryFormat::ChannelsLast) ? y : at::empty_like(input.x),
                   added = add ? add->contiguous(at::MemoryFormat::ChannelsLast) : at::Tensor();
  const BatchNormApply norm{input.shape,
                            table.const_data_ptr<float>(),
                            scales,
                            input.x.const_data_ptr(),
                            added.defined() ? added.const_data_ptr() : nullptr,
                            relu,
                            to.mutable_data_ptr()};
  PK_LAUNCH(op, launch_batch_norm_apply, norm, device::current_stream());
  if (!to.is_same(y)) y.copy_(to);
}

at::Tensor batch_norm_relu(const at::Tensor& y, const at::Tensor& x, const at::Tensor& table,
                           const OptionalTensor& index, int64_t features, const OptionalTensor& add,
                           const OptionalTensor& gate) {
  const at::DeviceGuard guard(x.device());
  const at::Tensor out = at::empty_like(y);
  apply_batch_norm_(out, x, table, index, features, add, true);
  return out;
}

at::Tensor deferred_sum(const at::Tensor& a, const at::Tensor& b) {
  PK_CHECK(a.sizes() == b.sizes() && a.scalar_type() == b.scalar_type(), "deferred_sum", "b",
           c10::str(a.dtype(), " ", a.sizes(), " as a"), b.dtype(), " ", b.sizes());
  const at::DeviceGuard guard(a.device());
  return at::empty_like(a);
}

Three masked_batch_norm_backward(const at::Tensor& grad_in, const at::Tensor& x, const OptionalTensor& weight,
                                 const at::Tensor& mean, const at::Tensor& invstd, const OptionalTensor& index,
                                 int64_t features, bool training, const OptionalTensor& relu_table) {
  constexpr const char* op = "masked_batch_norm_backward";
  const at::DeviceGuard guard(x.device());
  check_input(op, x);
  check_parameter(op, "weight", weight, features, x);
  const NormInput input(op, x, index, features);
  check_parameter(op, "mean", mean, input.live, x);
  check_parameter(op, "invstd", invstd, input.live, x);
  PK_CHECK(grad_in.sizes() == x.sizes() && grad_in.scalar_type() == x.scalar_type(), op, "grad",
           c10::str(x.dtype(), " ", x.sizes(), " as x"), grad_in.dtype(), " ", grad_in.sizes());
  const at::Tensor grad = grad_in.contiguous(at::MemoryFormat::ChannelsLast);
  const at::Tensor grad_x = at::empty_like(input.x);
  const at::Tensor grads = at::zeros({2, features}, mean.options());
  const at::Tensor grad_weight = grads[0], grad_bias = grads[1];
  if (x.numel() == 0) return {grad_x.contiguous(x.suggest_memory_format()), grad_weight, grad_bias};
  const at::Tensor workspace = at::empty({batch_norm_workspace(input.shape)}, mean.options());
  const BatchNormBackward norm{input.shape,
                               const_floats(weight),
                               mean.const_data_ptr<float>(),
                               invstd.const_data_ptr<float>(),
                               training,
                               relu_table ? scales_of(op, *relu_table, input.live, x) : NormScales{},
                               grad.const_data_ptr(),
                               input.x.const_data_ptr(),
                               grad_x.mutable_data_ptr(),
                               grad_weight.mutable_data_ptr<float>(),
                               grad_bias.mutable_data_ptr<float>(),
                               workspace.mutable_data_ptr<float>()};
  PK_LAUNCH(op, launch_batch_norm_backward, norm, device::current_stream());
  return {grad_x.contiguous(x.suggest_memory_format()), grad_weight, grad_bias};
}

}  // namespace

PK_DEVICE_OPERATORS(m) {
  m.impl("masked_batch_norm", masked_batch_norm);
  m.impl("masked_batch_norm_backward", masked_batch_norm_backward);
  m.impl("deferred_batch_norm", deferred_batch_norm);
  m.impl("apply_batch_norm_", apply_batch_norm_);
  m.impl("batch_norm_relu", batch_norm_relu);
  m.impl("deferred_sum", deferred_sum);
}

}  // namespace prunekernels
