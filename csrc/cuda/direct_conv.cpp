#include "cuda/direct_conv.h"

#include <ATen/ops/empty.h>

#include "cuda/forced_tiles.h"
#include "cuda/kernels/igemm.h"
#include "cuda/kernels/sparse_conv.h"

namespace prunekernels {
namespace {

// ---- igemm_*, block_sparse_*

constexpr double kWideTilesMayList = 1.1;  // times as many chunks as narrow ones, and are still the better tiles

IgemmTile pick_tile(const CudaCall& call, bool forward, bool listed) {
  const ConvShape& s = call.shape;
  const int64_t pixels = s.N * (forward ? s.out_pixels() : s.in_pixels());
  const int64_t live = (forward ? call.mask.out() : call.mask.in()).live;
  const Element element = element_of(call.dtype);
  const bool vectors = (forward ? call.mask.in() : call.mask.out()).view(element).vectors;
  const int multiprocessors = forced_tiles::multiprocessors();
  const bool warpgroups = element != Element::f32 && device::multiplies_by_warpgroups();
  return forced_tiles::tile(
      listed ? block_sparse_tile(pixels, live, vectors, mask_block(call.mask, forward, element), multiprocessors)
             : igemm_tile(pixels, live, vectors, multiprocessors, warpgroups));
}

bool is_packed(const at::Tensor& copy, const CudaCall& call, const at::Tensor& weight, int64_t elements) {
  return copy.defined() && copy.dim() == 1 && copy.scalar_type() == call.dtype && copy.numel() == elements &&
         copy.device() == weight.device();
}

// The forward pass packs both passes' weights in one launch and leaves the backward pass its own: it is taken if it has
// the right size and rounding, as another plan may have left something else, or nothing.
at::Tensor igemm_weight(const CudaCall& call, bool forward, const at::Tensor& weight, bool tf32) {
  const PackMask mask = call.mask.pack();
  const int64_t filters = call.mask.out().live, channels = call.mask.in().live;
  const PackedAs of_forward{PackLayout::rows, filters, packed_count(channels)},
      of_backward{PackLayout::columns, packed_count(filters), channels};
  PackedCopy* const left = call.weight.packed_copy;
  if (!forward && left && is_packed(left->copy, call, weight, of_backward.elements(call, mask)) && left->tf32 == tf32)
    return left->copy;
  if (!forward || !left) return packed_weights(call, weight, mask, forward ? of_forward : of_backward, tf32)[0];
  std::vector<at::Tensor> both = packed_weights(call, weight, mask, {of_forward, of_backward}, tf32);
  *left = {both[1], tf32};
  return both[0];
}

at::Tensor igemm(const CudaCall& call, bool forward, const at::Tensor& operand, const at::Tensor& weight,
                 const OptionalTensor& bias, bool listed) {
  const ConvShape& s = call.shape;
  const Element element = element_of(call.dtype);
  const bool tf32 = runs_tf32(call);
  const ChannelSide &from = forward ? call.mask.in() : call.mask.out(),
                    &to = forward ? call.mask.out() : call.mask.in();
  const at::Tensor packed = igemm_weight(call, forward, weight, tf32);
  const at::Tensor result =
      forward ? call.empty({s.N, s.K, s.P, s.Q}, operand) : call.empty({s.N, s.C, s.H, s.W}, operand);
  IgemmArgs args{s, element, tf32, pick_tile(call, forward, listed)};
  args.operand = operand.const_data_ptr(), args.from = from.view(element);
  args.weight = packed.const_data_ptr();
  args.bias = bias ? bias->const_data_ptr() : nullptr;
  args.result = result.mutable_data_ptr(), args.to = to.view(element);
  if (listed) args.lists = call.mask.tile_lists(call.op, forward, tile_channels(args.tile), vector_channels(element));
  const cudaStream_t stream = device::current_stream();
  if (forward && listed)
    PK_LAUNCH(call.op, block_sparse_fwd, args, stream);
  else if (forward)
    PK_LAUNCH(call.op, igemm_fwd, args, stream);
  else if (listed)
    PK_LAUNCH(call.op, block_sparse_grad_input, args, stream);
  else
    PK_LAUNCH(call.op, igemm_grad_input, args, stream);
  return result;
}

at::Tensor igemm_weights(const CudaCall& call, const at::Tensor& grad_out, const at::Tensor& x,
                         const at::Tensor& weight, const OptionalTensor& scale, bool listed) {
  const ChannelSide &filters = call.mask.out(), &channels = call.mask.in();
  const Element element = element_of(call.dtype);
  const GradWeightPlan plan = forced_tiles::plan(
      plan_grad_weight(call.shape, element, filters.live, channels.live, forced_tiles::multiprocessors()));
  const at::Tensor partial =
      at::empty({plan.partial_floats}, x.options().dtype(at::kFloat).memory_format(at::MemoryFormat::Contiguous));
  IgemmGradWeightArgs args{call.shape, element, runs_tf32(call), plan.tile, plan.splits};
  args.grad_out = grad_out.const_data_ptr(), args.filters = filters.view(element);
  args.x = x.const_data_ptr(), args.channels = channels.view(element);
  args.partial = partial.mutable_data_ptr<float>();
  if (listed) {
    args.lists = call.mask.tile_lists(call.op, true, tile_filters(plan.tile), vector_channels(element));
    PK_LAUNCH(call.op, block_sparse_grad_weight, args, device::current_stream());
  } else {
    PK_LAUNCH(call.op, igemm_grad_weight, args, device::current_stream());
  }
  return unpack_grad_weight(call, partial, Element::f32, weight, scale,
                            {PackLayout::rows, filters.live, packed_count(channels.live), plan.splits});
}

// ---- sparse_*

SparseConv sparse_conv(const CudaCall& call, const at::Tensor& weight) {
  const WeightStrides strides = strides_of(weight);
  SparseConv conv{
      call.shape, nullptr, nullptr, strides.row, strides.channel, strides.tap, forced_tiles::multiprocessors()};
  conv.lists = &call.mask.sparse_lists(call.op, &conv.device_words);
  return conv;
}

}  // namespace

int64_t mask_block(const DeviceMask& mask, bool of_filters, Element element) {
  const int64_t chunk = vector_channels(element);
  return mask.listed_share(of_filters, 64, chunk) <= kWideTilesMayList * mask.listed_share(of_filters, 32, chunk) ? 64
                                                                                                                  : 32;
}

bool igemm_serves_call(const ConvShape& shape, at::ScalarType dtype, at::MemoryFormat format) {
  return format == at::MemoryFormat::ChannelsLast && dtype != at::kDouble && igemm_serves(shape);
}

bool sparse_serves_call(const ConvShape& shape, at::ScalarType dtype, at::MemoryFormat format) {
  return format == at::MemoryFormat::Contiguous && dtype == at::kFloat && sparse_serves(shape);
}

at::Tensor direct_forward(const CudaCall& call, const at::Tensor& x, const at::Tensor& weight,
                          const OptionalTensor& bias, bool sparse) {
  if (call.channels_last()) return igemm(call, true, x, weight, bias, sparse);
  const ConvShape& s = call.shape;
  const at::Tensor full = even_weight(weight), y = call.empty({s.N, s.K, s.P, s.Q}, x);
  PK_LAUNCH(call.op, launch_sparse_fwd, x.const_data_ptr<float>(), full.const_data_ptr<float>(),
            bias ? bias->const_data_ptr<float>() : nullptr, y.mutable_data_ptr<float>(), sparse_conv(call, full),
            device::current_stream());
  return y;
}

at::Tensor direct_grad_input(const CudaCall& call, const at::Tensor& grad_out, const at::Tensor& weight, bool sparse) {
  if (call.channels_last()) return igemm(call, false, grad_out, weight, std::nullopt, sparse);
  const ConvShape& s = call.shape;
  const at::Tensor full = even_weight(weight), grad_x = call.empty({s.N, s.C, s.H, s.W}, grad_out);
  PK_LAUNCH(call.op, launch_sparse_grad_input, grad_out.const_data_ptr<float>(), full.const_data_ptr<float>(),
            grad_x.mutable_data_ptr<float>(), sparse_conv(call, full), device::current_stream());
  return grad_x;
}

at::Tensor direct_grad_weight(const CudaCall& call, const at::Tensor& grad_out, const at::Tensor& x,
                              const at::Tensor& weight, const OptionalTensor& scale, bool sparse) {
  if (call.channels_last()) return igemm_weights(call, grad_out, x, weight, scale, sparse);
  const at::Tensor grad = at::empty(weight.sizes(), weight.options().memory_format(weight.suggest_memory_format()));
  const SparseConv conv = sparse_conv(call, grad);
  const at::Tensor workspace =
      at::empty({sparse_grad_weight_workspace(conv)}, x.options().memory_format(at::MemoryFormat::Contiguous));
  PK_LAUNCH(call.op, launch_sparse_grad_weight, x.const_data_ptr<float>(), grad_out.const_data_ptr<float>(),
            call.mask.pairs(), scale ? scale->const_data_ptr<float>() : nullptr, workspace.mutable_data_ptr<float>(),
            grad.mutable_data_ptr<float>(), conv, device::current_stream());
  return grad;
}

}  // namespace prunekernels
