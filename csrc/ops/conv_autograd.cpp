// Gradients of the convolution operators. In C++, because a training step calls them three times for each layer, and a
// call costs 20 us here but 100 us when it is registered from Python. A masked convolution is bilinear, so the
// gradients of each of its three operators are the other two. prunekernels/ops/autograd.py is the same in Python, used
// where this extension is missing.
#include <ATen/ops/where.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/library.h>

#include "core/mask_table.h"
#include "ops/aside.h"

namespace prunekernels {
namespace {

using at::Tensor;
using c10::SymInt;
using c10::SymIntArrayRef;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::Variable;
using torch::autograd::variable_list;
using OptionalTensor = std::optional<Tensor>;

template <typename Signature>
auto find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// What every operator ends with.
struct Geometry {
  SymIntArrayRef stride, padding, dilation;
  SymInt groups;
  std::string_view plan;

  // For the backward pass, after the operator has checked it. In one list, with what the function keeps besides: every
  // entry of saved_data costs time.
  void save(AutogradContext* ctx, SymIntArrayRef besides = {}) const {
    std::vector<SymInt> numbers;
    numbers.reserve(kNumbers + besides.size());
    for (const SymIntArrayRef& part : {stride, padding, dilation, SymIntArrayRef(groups), besides})
      numbers.insert(numbers.end(), part.begin(), part.end());
    ctx->saved_data["geometry"] = std::move(numbers);
    ctx->saved_data["plan"] = std::string(plan);
  }
  static constexpr size_t kNumbers = 7;
};

struct SavedGeometry {
  explicit SavedGeometry(AutogradContext* ctx)
      : numbers_(ctx->saved_data["geometry"].toSymIntVector()), plan_(ctx->saved_data["plan"].toStringRef()) {}

  Geometry get() const {
    const SymIntArrayRef all(numbers_);
    return {all.slice(0, 2), all.slice(2, 2), all.slice(4, 2), numbers_[6], plan_};
  }
  SymIntArrayRef besides() const { return SymIntArrayRef(numbers_).slice(Geometry::kNumbers); }

 private:
  const std::vector<SymInt> numbers_;
  const std::string plan_;
};

Tensor conv(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& mask,
            const OptionalTensor& grad_mask, const OptionalTensor& grad_scale, const Geometry& g) {
  static const auto op =
      find<Tensor(const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                  const OptionalTensor&, SymIntArrayRef, SymIntArrayRef, SymIntArrayRef, SymInt, std::string_view)>(
          "prunekernels::masked_conv2d");
  return op.call(x, weight, bias, mask, grad_mask, grad_scale, g.stride, g.padding, g.dilation, g.groups, g.plan);
}

Tensor grad_input(const Tensor& grad_out, const Tensor& weight, const OptionalTensor& mask, SymIntArrayRef x_size,
                  bool channels_last, const Geometry& g) {
  static const auto op =
      find<Tensor(const Tensor&, const Tensor&, const OptionalTensor&, SymIntArrayRef, bool, SymIntArrayRef,
                  SymIntArrayRef, SymIntArrayRef, SymInt, std::string_view)>("prunekernels::masked_conv2d_grad_input");
  return op.call(grad_out, weight, mask, x_size, channels_last, g.stride, g.padding, g.dilation, g.groups, g.plan);
}

Tensor grad_weight(const Tensor& grad_out, const Tensor& x, const Tensor& weight, const OptionalTensor& mask,
                   const OptionalTensor& grad_scale, const Geometry& g) {
  static const auto op =
      find<Tensor(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&,
                  SymIntArrayRef, SymIntArrayRef, SymIntArrayRef, SymInt, std::string_view)>(
          "prunekernels::masked_conv2d_grad_weight");
  return op.call(grad_out, x, weight, mask, grad_scale, g.stride, g.padding, g.dilation, g.groups, g.plan);
}

Tensor grad_bias(const Tensor& grad_out, const OptionalTensor& mask) {
  static const auto op = find<Tensor(const Tensor&, const OptionalTensor&)>("prunekernels::masked_conv2d_grad_bias");
  return op.call(grad_out, mask);
}

Tensor gather(const Tensor& x, const Tensor& index) {
  static const auto op = find<Tensor(const Tensor&, const Tensor&)>("prunekernels::gather_channels");
  return op.call(x, index);
}

Tensor scatter(const Tensor& x, const Tensor& index, const SymInt& channels) {
  static const auto op = find<Tensor(const Tensor&, const Tensor&, SymInt)>("prunekernels::scatter_channels");
  return op.call(x, index, channels);
}

bool is_channels_last(const Tensor& x) { return x.suggest_memory_format() == at::MemoryFormat::ChannelsLast; }

OptionalTensor optional(const Variable& saved) { return saved.defined() ? OptionalTensor(saved) : std::nullopt; }
Tensor saved(const OptionalTensor& t) { return t.value_or(Tensor()); }

variable_list with_nones(variable_list grads, size_t inputs) {
  grads.resize(inputs);
  return grads;
}

// What the forward pass has left of the weight under this name, or an undefined tensor; forgotten, unless the graph is
// kept.
Tensor take_left(AutogradContext* ctx, const char* name) {
  const auto found = ctx->saved_data.find(name);
  if (found == ctx->saved_data.end()) return {};
  Tensor left = found->second.toTensor();
  if (!torch::autograd::get_current_graph_task_keep_graph()) ctx->saved_data.erase(found);
  return left;
}

// The rounding is in the name: an entry more would cost as much time as the first.
constexpr const char *kPacked = "packed_weight", *kPackedTf32 = "packed_weight_tf32";

void leave_packed(AutogradContext* ctx, PackedCopy packed) {
  ctx->saved_data[packed.tf32 ? kPackedTf32 : kPacked] = std::move(packed.copy);
}

PackedCopy take_packed(AutogradContext* ctx) {
  if (Tensor exact = take_left(ctx, kPacked); exact.defined()) return {std::move(exact)};
  return {take_left(ctx, kPackedTf32), true};
}

struct Conv : Function<Conv> {
  static constexpr bool is_traceable = true;
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                        const OptionalTensor& mask, const OptionalTensor& grad_mask, const OptionalTensor& grad_scale,
                        const Geometry& g) {
    at::AutoDispatchBelowADInplaceOrView below;
    std::optional<Aside<MaskedCopy>> masked;
    std::optional<Aside<PackedCopy>> packed;
    if (x.requires_grad()) masked.emplace(weight), packed.emplace(weight);
    Tensor y = conv(x, weight, bias, mask, grad_mask, grad_scale, g);
    // Not among the saved variables: checkpoints count those, and another plan would save another number.
    if (masked && masked->fact.copy.defined()) ctx->saved_data["masked_weight"] = std::move(masked->fact.copy);
    if (packed && packed->fact.copy.defined()) leave_packed(ctx, std::move(packed->fact));
    const bool trains = weight.requires_grad();
    ctx->save_for_backward({trains ? x : Tensor(), weight, saved(mask), saved(grad_mask), saved(grad_scale)});
    const auto size = x.sym_sizes();
    g.save(ctx, {size[0], size[1], size[2], size[3], is_channels_last(x), bias.has_value()});
    return y;
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto s = ctx->get_saved_variables();
    const Tensor &x = s[0], &weight = s[1], &grad_out = grads[0];
    const OptionalTensor mask = optional(s[2]), grad_mask = optional(s[3]), grad_scale = optional(s[4]);
    const SavedGeometry saved(ctx);
    const Geometry g = saved.get();
    const SymIntArrayRef size = saved.besides().slice(0, 4);
    const bool channels_last = saved.besides()[4] != 0, has_bias = saved.besides()[5] != 0;
    variable_list out(3);
    const Aside<IsFinite> finite(grad_out);  // the weight's gradient tells the input's
    if (ctx->needs_input_grad(1)) out[1] = grad_weight(grad_out, x, weight, grad_mask, grad_scale, g);
    if (ctx->needs_input_grad(0)) {
      const bool takes = !at::GradMode::is_enabled();  // else the gradient is differentiated, by the weight itself
      const Tensor masked = takes ? take_left(ctx, "masked_weight") : Tensor();
      const Aside<DeadAreZero> known(masked);
      const Tensor& read = masked.defined() ? masked : weight;
      const Aside<PackedCopy> packed(read, takes ? take_packed(ctx) : PackedCopy{});
      out[0] = grad_input(grad_out, read, mask, size, channels_last, g);
    }
    // Absent optional tensors are not counted by needs_input_grad: without a bias, 2 would be a mask or nothing.
    if (has_bias && ctx->needs_input_grad(2)) out[2] = grad_bias(grad_out, mask);
    return with_nones(out, 7);
  }
};

struct GradInput : Function<GradInput> {
  static constexpr bool is_traceable = true;
  static Tensor forward(AutogradContext* ctx, const Tensor& grad_out, const Tensor& weight, const OptionalTensor& mask,
                        SymIntArrayRef x_size, bool channels_last, const Geometry& g) {
    at::AutoDispatchBelowADInplaceOrView below;
    Tensor grad_x = grad_input(grad_out, weight, mask, x_size, channels_last, g);
    ctx->save_for_backward({grad_out, weight, saved(mask)});
    g.save(ctx);
    return grad_x;
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto s = ctx->get_saved_variables();
    const Tensor &grad_out = s[0], &weight = s[1], &grad = grads[0];
    const OptionalTensor mask = optional(s[2]);
    const SavedGeometry saved(ctx);
    const Geometry g = saved.get();
    variable_list out(2);
    if (ctx->needs_input_grad(0)) out[0] = conv(grad, weight, std::nullopt, mask, mask, std::nullopt, g);
    if (ctx->needs_input_grad(1)) out[1] = grad_weight(grad_out, grad, weight, mask, std::nullopt, g);
    return with_nones(out, 6);
  }
};

struct GradWeight : Function<GradWeight> {
  static constexpr bool is_traceable = true;
  static Tensor forward(AutogradContext* ctx, const Tensor& grad_out, const Tensor& x, const Tensor& weight,
                        const OptionalTensor& mask, const OptionalTensor& grad_scale, const Geometry& g) {
    at::AutoDispatchBelowADInplaceOrView below;
    Tensor grad_w = grad_weight(grad_out, x, weight, mask, grad_scale, g);
    ctx->save_for_backward({grad_out, x, saved(mask), saved(grad_scale)});
    g.save(ctx);
    return grad_w;
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto s = ctx->get_saved_variables();
    const Tensor &grad_out = s[0], &x = s[1], &grad_scale = s[3];
    const OptionalTensor mask = optional(s[2]);
    const SavedGeometry saved(ctx);
    const Geometry g = saved.get();
    Tensor grad = grads[0];
    if (grad_scale.defined()) {
      const Tensor scale = grad_scale.to(grad.scalar_type()).view({-1, 1, 1, 1});
      grad = at::where(scale.eq(0), at::Scalar(0), grad.mul(scale));
    }
    variable_list out(2);
    if (ctx->needs_input_grad(0)) out[0] = conv(x, grad, std::nullopt, mask, mask, std::nullopt, g);
    if (ctx->needs_input_grad(1)) out[1] = grad_input(grad_out, grad, mask, x.sym_sizes(), is_channels_last(x), g);
    return with_nones(out, 6);
  }
};

struct GradBias : Function<GradBias> {
  static constexpr bool is_traceable = true;
  static Tensor forward(AutogradContext* ctx, const Tensor& grad_out, const OptionalTensor& mask) {
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({saved(mask)});
    ctx->saved_data["size"] = grad_out.sym_sizes().vec();
    return grad_bias(grad_out, mask);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const Tensor mask = ctx->get_saved_variables()[0];
    const auto size = ctx->saved_data["size"].toSymIntVector();
    Tensor grad = grads[0];
    if (mask.defined()) {
      const Tensor slots = mask.slice_symint(0, kHeaderWords + size[1], kHeaderWords + 2 * size[1]);
      grad = at::where(slots.eq(kDead), at::Scalar(0), grad);
    }
    return {grad.view_symint({1, -1, 1, 1}).expand_symint(size), Variable()};
  }
};

struct Gather : Function<Gather> {
  static constexpr bool is_traceable = true;
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& index) {
    at::AutoDispatchBelowADInplaceOrView below;
    Tensor y = gather(x, index);  // first: it checks that x has channels
    ctx->save_for_backward({index});
    ctx->saved_data["channels"] = x.sym_size(1);
    return y;
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    return {scatter(grads[0], ctx->get_saved_variables()[0], ctx->saved_data["channels"].toSymInt()), Variable()};
  }
};

struct Scatter : Function<Scatter> {
  static constexpr bool is_traceable = true;
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& index, const SymInt& channels) {
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({index});
    return scatter(x, index, channels);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    return {gather(grads[0], ctx->get_saved_variables()[0]), Variable(), Variable()};
  }
};

// Whether autograd has nothing to do: a backward pass, most often, that is not itself recorded. What its functions cost
// beside the operators is as much as a short layer's convolution.
template <typename... Tensors>
bool goes_unrecorded(const Tensors&... inputs) {
  return !at::GradMode::is_enabled() && !(inputs._fw_grad(0).defined() || ...);
}

}  // namespace

TORCH_LIBRARY_IMPL(prunekernels, Autograd, m) {
  m.impl("masked_conv2d",
         [](const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& mask,
            const OptionalTensor& grad_mask, const OptionalTensor& grad_scale, SymIntArrayRef stride,
            SymIntArrayRef padding, SymIntArrayRef dilation, SymInt groups, std::string_view plan) {
           const Geometry g{stride, padding, dilation, groups, plan};
           if (!goes_unrecorded(x, weight)) return Conv::apply(x, weight, bias, mask, grad_mask, grad_scale, g);
           at::AutoDispatchBelowADInplaceOrView below;
           return conv(x, weight, bias, mask, grad_mask, grad_scale, g);
         });
  m.impl("masked_conv2d_grad_input",
         [](const Tensor& grad_out, const Tensor& weight, const OptionalTensor& mask, SymIntArrayRef x_size,
            bool channels_last, SymIntArrayRef stride, SymIntArrayRef padding, SymIntArrayRef dilation, SymInt groups,
            std::string_view plan) {
           const Geometry g{stride, padding, dilation, groups, plan};
           if (!goes_unrecorded(grad_out, weight))
             return GradInput::apply(grad_out, weight, mask, x_size, channels_last, g);
           at::AutoDispatchBelowADInplaceOrView below;
           return grad_input(grad_out, weight, mask, x_size, channels_last, g);
         });
  m.impl("masked_conv2d_grad_weight",
         [](const Tensor& grad_out, const Tensor& x, const Tensor& weight, const OptionalTensor& mask,
            const OptionalTensor& grad_scale, SymIntArrayRef stride, SymIntArrayRef padding, SymIntArrayRef dilation,
            SymInt groups, std::string_view plan) {
           const Geometry g{stride, padding, dilation, groups, plan};
           if (!goes_unrecorded(grad_out, x)) return GradWeight::apply(grad_out, x, weight, mask, grad_scale, g);
           at::AutoDispatchBelowADInplaceOrView below;
           return grad_weight(grad_out, x, weight, mask, grad_scale, g);
         });
  m.impl("masked_conv2d_grad_bias",
         [](const Tensor& grad_out, const OptionalTensor& mask) { return GradBias::apply(grad_out, mask); });
  m.impl("gather_channels", [](const Tensor& x, const Tensor& index) { return Gather::apply(x, index); });
  m.impl("scatter_channels",
         [](const Tensor& x, const Tensor& index, SymInt channels) { return Scatter::apply(x, index, channels); });
}

}  // namespace prunekernels
