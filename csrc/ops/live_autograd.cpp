// Gradients of the operators of live mode, and the autograd history of a live tensor.
#include <ATen/ops/index_copy.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/native_batch_norm_backward.h>
#include <ATen/ops/pow.h>
#include <ATen/ops/threshold_backward.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/library.h>

#include <atomic>

namespace prunekernels {
namespace {

using at::Tensor;
using c10::SymInt;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::Variable;
using torch::autograd::variable_list;

template <typename Signature>
auto find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

Tensor regroup(const Tensor& x, const Tensor& index, const Tensor& inverse) {
  static const auto op = find<Tensor(const Tensor&, const Tensor&, const Tensor&)>("prunekernels::regroup_channels");
  return op.call(x, index, inverse);
}

Tensor join(const Tensor& a, const Tensor& b, const Tensor& a_index, const Tensor& b_index, const Tensor& a_inverse,
            const Tensor& b_inverse, double alpha) {
  static const auto op =
      find<Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, double)>(
          "prunekernels::join_channels");
  return op.call(a, b, a_index, b_index, a_inverse, b_inverse, alpha);
}

Tensor pack(const Tensor& weight, const Tensor& mask, SymInt filters, SymInt channels) {
  static const auto op = find<Tensor(const Tensor&, const Tensor&, SymInt, SymInt)>("prunekernels::pack_weight");
  return op.call(weight, mask, std::move(filters), std::move(channels));
}

Tensor unpack(const Tensor& grad, const Tensor& mask, SymInt filters, SymInt channels, bool channels_last) {
  static const auto op =
      find<Tensor(const Tensor&, const Tensor&, SymInt, SymInt, bool)>("prunekernels::unpack_grad_weight");
  return op.call(grad, mask, std::move(filters), std::move(channels), channels_last);
}

bool is_channels_last(const Tensor& x) { return x.suggest_memory_format() == at::MemoryFormat::ChannelsLast; }

struct Regroup : Function<Regroup> {
  static constexpr bool is_traceable = true;
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& index, const Tensor& inverse) {
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({index, inverse});
    return regroup(x, index, inverse);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto s = ctx->get_saved_variables();
    const Tensor &index = s[0], &inverse = s[1];
    return {regroup(grads[0], inverse, index), Variable(), Variable()};
  }
};

// The gradient of one operand of a join. An operand with as many channels as the result has all of them.
Tensor part(const Tensor& grad, const Tensor& index, const Tensor& inverse) {
  return index.sym_numel() == inverse.sym_numel() ? grad : regroup(grad, inverse, index);
}

struct Join : Function<Join> {
  static constexpr bool is_traceable = true;
  static Tensor forward(AutogradContext* ctx, const Tensor& a, const Tensor& b, const Tensor& a_index,
                        const Tensor& b_index, const Tensor& a_inverse, const Tensor& b_inverse, double alpha) {
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({a_index, b_index, a_inverse, b_inverse});
    ctx->saved_data["alpha"] = alpha;
    return join(a, b, a_index, b_index, a_inverse, b_inverse, alpha);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto s = ctx->get_saved_variables();
    const Tensor &a_index = s[0], &b_index = s[1], &a_inverse = s[2], &b_inverse = s[3];
    const double alpha = ctx->saved_data["alpha"].toDouble();
    variable_list out(7);
    if (ctx->needs_input_grad(0)) out[0] = part(grads[0], a_index, a_inverse);
    if (ctx->needs_input_grad(1)) {
      out[1] = part(grads[0], b_index, b_inverse);
      if (alpha != 1) out[1] = out[1].mul(alpha);
    }
    return out;
  }
};

struct Pack : Function<Pack> {
  static constexpr bool is_traceable = true;
  static Tensor forward(AutogradContext* ctx, const Tensor& weight, const Tensor& mask, SymInt filters,
                        SymInt channels) {
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({mask});
    ctx->saved_data["filters"] = weight.sym_size(0);
    ctx->saved_data["channels"] = weight.sym_size(1);
    ctx->saved_data["channels_last"] = is_channels_last(weight);
    return pack(weight, mask, std::move(filters), std::move(channels));
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto& d = ctx->saved_data;
    return {unpack(grads[0], ctx->get_saved_variables()[0], d.at("filters").toSymInt(), d.at("channels").toSymInt(),
                   d.at("channels_last").toBool()),
            Variable(), Variable(), Variable()};
  }
};

struct Unpack : Function<Unpack> {
  static constexpr bool is_traceable = true;
  static Tensor forward(AutogradContext* ctx, const Tensor& grad, const Tensor& mask, SymInt filters, SymInt channels,
                        bool channels_last) {
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({mask});
    ctx->saved_data["filters"] = grad.sym_size(0);
    ctx->saved_data["channels"] = grad.sym_size(1);
    return unpack(grad, mask, std::move(filters), std::move(channels), channels_last);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto& d = ctx->saved_data;
    return {pack(grads[0], ctx->get_saved_variables()[0], d.at("filters").toSymInt(), d.at("channels").toSymInt()),
            Variable(), Variable(), Variable(), Variable()};
  }
};

using Three = std::tuple<Tensor, Tensor, Tensor>;
using OptionalTensor = std::optional<Tensor>;

OptionalTensor optional(const Variable& saved) { return saved.defined() ? OptionalTensor(saved) : std::nullopt; }

// The gradient by torch's own operator, which can be differentiated again.
Three norm_backward_of_torch(const Tensor& grad, const Tensor& x, const OptionalTensor& weight, const Tensor& mean,
                             const Tensor& invstd, const OptionalTensor& index, const SymInt& features, bool training) {
  const bool has_holes = index && index->device().is_cuda();  // maybe: of zeros, which stay zeros
  const Tensor is_live = has_holes ? index->ge(0) : Tensor();
  OptionalTensor rows = index ? OptionalTensor(index->to(at::kLong)) : std::nullopt;
  if (has_holes) rows = rows->clamp_min(0);
  if (rows && rows->sym_numel() < x.sym_size(1)) {  // x has all channels
    auto [live, grad_weight, grad_bias] = norm_backward_of_torch(grad.index_select(1, *rows), x.index_select(1, *rows),
                                                                 weight, mean, invstd, index, features, training);
    return {at::zeros_symint(x.sym_sizes(), live.options()).index_copy(1, *rows, live), grad_weight, grad_bias};
  }
  OptionalTensor gamma = weight && rows ? OptionalTensor(weight->index_select(0, *rows)) : weight;
  if (has_holes) gamma = gamma ? at::where(is_live, *gamma, at::Scalar(0)) : is_live.to(mean.scalar_type());
  // In evaluation torch's operator reads the running statistics; mean and invstd were made of them.
  const Tensor var = invstd.pow(-2);
  auto [grad_x, grad_weight, grad_bias] =
      at::native_batch_norm_backward(grad, x, gamma, mean, var, mean, invstd, training, 0, {true, true, true});
  const auto spread = [&](const Tensor& g) {
    if (!rows) return g;
    return at::zeros_symint({features}, g.options()).index_add(0, *rows, has_holes ? at::where(is_live, g, 0) : g);
  };
  return {grad_x, spread(grad_weight), spread(grad_bias)};
}

variable_list norm_backward(AutogradContext* ctx, const Tensor& grad, const Tensor& x, const OptionalTensor& weight,
                            const Tensor& mean, const Tensor& invstd, const OptionalTensor& index,
                            const OptionalTensor& relu_table) {
  static const auto op = find<Three(const Tensor&, const Tensor&, const OptionalTensor&, const Tensor&, const Tensor&,
                                    const OptionalTensor&, SymInt, bool, const OptionalTensor&)>(
      "prunekernels::masked_batch_norm_backward");
  const SymInt features = ctx->saved_data["features"].toSymInt();
  const bool training = ctx->saved_data["training"].toBool();
  variable_list out(10);
  auto [grad_x, grad_weight, grad_bias] =
      at::GradMode::is_enabled() ? norm_backward_of_torch(grad, x, weight, mean, invstd, index, features, training)
                                 : op.call(grad, x, weight, mean, invstd, index, features, training, relu_table);
  out[0] = grad_x;
  if (ctx->saved_data["has_weight"].toBool()) out[1] = grad_weight;
  if (ctx->saved_data["has_bias"].toBool()) out[2] = grad_bias;
  return out;
}

void save_norm(AutogradContext* ctx, const SymInt& features, bool training, const OptionalTensor& weight,
               const OptionalTensor& bias, const OptionalTensor& running_mean, const OptionalTensor& running_var) {
  ctx->saved_data["features"] = features;
  ctx->saved_data["training"] = training;
  ctx->saved_data["has_weight"] = weight.has_value();
  ctx->saved_data["has_bias"] = bias.has_value();
  if (training)
    for (const auto* running : {&running_mean, &running_var})
      if (*running && !(*running)->is_inference()) (*running)->unsafeGetTensorImpl()->bump_version();
}

using NormSignature = Three(const Tensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                            const OptionalTensor&, const OptionalTensor&, SymInt, bool, double, double);

struct BatchNorm : Function<BatchNorm> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const OptionalTensor& weight,
                               const OptionalTensor& bias, const OptionalTensor& running_mean,
                               const OptionalTensor& running_var, const OptionalTensor& index, const SymInt& features,
                               bool training, double momentum, double eps) {
    static const auto op = find<NormSignature>("prunekernels::masked_batch_norm");
    at::AutoDispatchBelowADInplaceOrView below;
    auto [y, mean, invstd] =
        op.call(x, weight, bias, running_mean, running_var, index, features, training, momentum, eps);
    ctx->save_for_backward({x, weight.value_or(Tensor()), mean, invstd, index.value_or(Tensor())});
    save_norm(ctx, features, training, weight, bias, running_mean, running_var);
    ctx->mark_non_differentiable({mean, invstd});
    return {y, mean, invstd};
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    if (!grads[0].defined()) return variable_list(10);
    const auto s = ctx->get_saved_variables();
    return norm_backward(ctx, grads[0], s[0], optional(s[1]), s[2], s[3], optional(s[4]), std::nullopt);
  }
};

struct Unseen {  // hides a tensor from Function, which would take it for a differentiable input
  Tensor tensor;
};

// Whether anything but the engine sees what goes from the node that runs now to the next: hooks, or a gradient that is
// asked for. Or the next does not run in this pass.
bool is_observed() {
  const auto node = torch::autograd::get_current_node();
  if (!node || node->num_outputs() == 0 || !node->next_edge(0).function) return true;
  auto& next = *node->next_edge(0).function;
  if (!node->post_hooks().empty() || !next.pre_hooks().empty() || !next.tensor_pre_hooks().empty() ||
      !next.retains_grad_hooks().empty())
    return true;
  const auto* asked = torch::autograd::get_current_graph_task_exec_info();
  if (!asked) return true;
  if (asked->empty()) return false;
  const auto found = asked->find(&next);
  return found == asked->end() || !found->second.needed_ || found->second.captures_;
}

// Who takes the gradient of a relu behind a deferred norm. The relu's backward pass, which comes first, leaves it to
// the norm where nothing but this relu has read the norm's result; in Python, what else reads it closes the gate, which
// may be in the middle of a pass, by a hook. Threads may go through one graph at a time: one pass leaves a gradient.
class Gate {
 public:
  explicit Gate(const Tensor& state) {
    int64_t* const values = state.mutable_data_ptr<int64_t>();
    static_assert(sizeof(std::atomic<int64_t>) == sizeof(int64_t));
    open_ = reinterpret_cast<std::atomic<int64_t>*>(values);
    left_in_ = reinterpret_cast<std::atomic<int64_t>*>(values + 1);
  }
  void open() { open_->store(1); }
  // In the relu's backward pass: whether the norm takes its gradient. Not where the pass is to be differentiated.
  bool leave() {
    int64_t nowhere = 0;
    return open_->load() && !at::GradMode::is_enabled() && !is_observed() &&
           left_in_->compare_exchange_strong(nowhere, pass());
  }
  // In the norm's backward pass: whether the relu left it its gradient.
  bool take() {
    int64_t here = pass();
    return left_in_->compare_exchange_strong(here, 0);
  }

 private:
  static int64_t pass() { return int64_t{torch::autograd::get_current_graph_task_id()} + 1; }

  std::atomic<int64_t>* open_;
  std::atomic<int64_t>* left_in_;  // the pass; 0: none
};

struct DeferredNorm : Function<DeferredNorm> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const OptionalTensor& weight,
                               const OptionalTensor& bias, const OptionalTensor& running_mean,
                               const OptionalTensor& running_var, const OptionalTensor& index, const SymInt& features,
                               bool training, double momentum, double eps) {
    static const auto op = find<NormSignature>("prunekernels::deferred_batch_norm");
    at::AutoDispatchBelowADInplaceOrView below;
    auto [y, table, gate] =
        op.call(x, weight, bias, running_mean, running_var, index, features, training, momentum, eps);
    ctx->save_for_backward({x, weight.value_or(Tensor()), table, index.value_or(Tensor())});
    ctx->saved_data["gate"] = gate;
    save_norm(ctx, features, training, weight, bias, running_mean, running_var);
    ctx->mark_non_differentiable({table, gate});
    return {y, table, gate};
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    if (!grads[0].defined()) return variable_list(10);
    const auto s = ctx->get_saved_variables();
    const Tensor& table = s[2];
    const bool behind_relu = Gate(ctx->saved_data["gate"].toTensor()).take();
    return norm_backward(ctx, grads[0], s[0], optional(s[1]), table.select(0, 0), table.select(0, 1), optional(s[3]),
                         behind_relu ? OptionalTensor(table) : std::nullopt);
  }
};

// What a fused relu is computed from, beside the tensor whose history goes on.
struct Fused {
  Tensor x, table;
  OptionalTensor index;
  SymInt features;
  OptionalTensor add, gate;
};

struct NormRelu : Function<NormRelu> {
  static Tensor forward(AutogradContext* ctx, const Tensor& y, const Fused& from) {
    static const auto op = find<Tensor(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, SymInt,
                                       const OptionalTensor&, const OptionalTensor&)>("prunekernels::batch_norm_relu");
    at::AutoDispatchBelowADInplaceOrView below;
    const Tensor out = op.call(y, from.x, from.table, from.index, from.features, from.add, from.gate);
    ctx->save_for_backward({out});
    if (from.gate) {
      Gate(*from.gate).open();
      ctx->saved_data["gate"] = *from.gate;
    }
    return out;
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    if (!grads[0].defined()) return variable_list(2);
    const auto gate = ctx->saved_data.find("gate");
    if (gate != ctx->saved_data.end() && Gate(gate->second.toTensor()).leave()) return {grads[0], Tensor()};
    return {at::threshold_backward(grads[0], ctx->get_saved_variables()[0], 0), Tensor()};
  }
};

struct DeferredSum : Function<DeferredSum> {
  static Tensor forward(AutogradContext*, const Tensor& a, const Tensor& b) {
    static const auto op = find<Tensor(const Tensor&, const Tensor&)>("prunekernels::deferred_sum");
    at::AutoDispatchBelowADInplaceOrView below;
    return op.call(a, b);
  }
  static variable_list backward(AutogradContext*, const variable_list& grads) { return {grads[0], grads[0]}; }
};

void apply_batch_norm_(const Tensor& y, const Tensor& x, const Tensor& table, const OptionalTensor& index,
                       SymInt features, const OptionalTensor& add, bool relu) {
  static const auto op = find<void(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, SymInt,
                                   const OptionalTensor&, bool)>("prunekernels::apply_batch_norm_");
  at::AutoDispatchBelowADInplaceOrView below;  // y has its history already, and nothing has read its values
  op.call(y, x, table, index, std::move(features), add, relu);
}

// The gradient of the compact values is the gradient of the full-width tensor, gathered. The index is kept past hooks
// that save tensors: a checkpoint counts what it saves, and a tensor may be live when it first runs and wide later.
struct Live : Function<Live> {
  static Tensor forward(AutogradContext* ctx, const Tensor& compact, const Tensor& index, const Unseen& full) {
    ctx->saved_data["index"] = index;
    ctx->saved_data["size"] = compact.sym_sizes().vec();
    return full.tensor;
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto gather = find<Tensor(const Tensor&, const Tensor&)>("prunekernels::gather_channels");
    const Tensor& grad = grads[0];
    if (!grad.defined()) return {Tensor(), Tensor(), Tensor()};
    const Tensor index = ctx->saved_data["index"].toTensor();
    const Tensor planes = grad.dim() == 4 ? grad : grad.reshape_symint({grad.sym_size(0), grad.sym_size(1), -1, 1});
    return {gather.call(planes, index).reshape_symint(ctx->saved_data["size"].toSymIntVector()), Tensor(), Tensor()};
  }
};

// Runs above the dispatch to Python that a tensor of a subclass asks for, and never goes there.
void attach_live(const Tensor& full, const Tensor& compact, const Tensor& index) {
  Live::apply(compact, index, Unseen{full});
}

}  // namespace

TORCH_LIBRARY_IMPL(prunekernels, Autograd, m) {
  m.impl("regroup_channels",
         [](const Tensor& x, const Tensor& index, const Tensor& inverse) { return Regroup::apply(x, index, inverse); });
  m.impl("join_channels", [](const Tensor& a, const Tensor& b, const Tensor& a_index, const Tensor& b_index,
                             const Tensor& a_inverse, const Tensor& b_inverse, double alpha) {
    return Join::apply(a, b, a_index, b_index, a_inverse, b_inverse, alpha);
  });
  m.impl("pack_weight", [](const Tensor& weight, const Tensor& mask, SymInt filters, SymInt channels) {
    return Pack::apply(weight, mask, std::move(filters), std::move(channels));
  });
  m.impl("unpack_grad_weight",
         [](const Tensor& grad, const Tensor& mask, SymInt filters, SymInt channels, bool channels_last) {
           return Unpack::apply(grad, mask, std::move(filters), std::move(channels), channels_last);
         });
  m.impl("masked_batch_norm",
         [](const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
            const OptionalTensor& running_mean, const OptionalTensor& running_var, const OptionalTensor& index,
            SymInt features, bool training, double momentum, double eps) -> Three {
           const auto out =
               BatchNorm::apply(x, weight, bias, running_mean, running_var, index, features, training, momentum, eps);
           return {out[0], out[1], out[2]};
         });
  m.impl("deferred_batch_norm",
         [](const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
            const OptionalTensor& running_mean, const OptionalTensor& running_var, const OptionalTensor& index,
            SymInt features, bool training, double momentum, double eps) -> Three {
           const auto out = DeferredNorm::apply(x, weight, bias, running_mean, running_var, index, features, training,
                                                momentum, eps);
           return {out[0], out[1], out[2]};
         });
  m.impl("batch_norm_relu", [](const Tensor& y, const Tensor& x, const Tensor& table, const OptionalTensor& index,
                               SymInt features, const OptionalTensor& add, const OptionalTensor& gate) {
    return NormRelu::apply(y, Fused{x, table, index, std::move(features), add, gate});
  });
  m.impl("deferred_sum", [](const Tensor& a, const Tensor& b) { return DeferredSum::apply(a, b); });
  m.impl("apply_batch_norm_", apply_batch_norm_);
  m.impl("attach_live", attach_live);
}

}  // namespace prunekernels
