// Plans of our own kernels: nothing is copied before or after.
//   direct   igemm_*: channels_last, one group; live channels are gathered as they are loaded, zeros written as results
//            are stored. Floats on tensor cores where torch allows tf32
//   sparse   block_sparse_*, where igemm_* serve: steps of the reduction that hold dead kernels alone are skipped.
//            sparse_*: NCHW floats, single dead kernels are skipped
#pragma once

#include "cuda/conv_call.h"

namespace prunekernels {

bool igemm_serves_call(const ConvShape& shape, at::ScalarType dtype, at::MemoryFormat format);
bool sparse_serves_call(const ConvShape& shape, at::ScalarType dtype, at::MemoryFormat format);

// sparse: the plan; else direct.
at::Tensor direct_forward(const CudaCall& call, const at::Tensor& x, const at::Tensor& weight,
                          const OptionalTensor& bias, bool sparse);
at::Tensor direct_grad_input(const CudaCall& call, const at::Tensor& grad_out, const at::Tensor& weight, bool sparse);
at::Tensor direct_grad_weight(const CudaCall& call, const at::Tensor& grad_out, const at::Tensor& x,
                              const at::Tensor& weight, const OptionalTensor& scale, bool sparse);

// Result channels that share their live kernels, as far as the tile lists of block_sparse_* can tell: 32 or 64.
int64_t mask_block(const DeviceMask& mask, bool of_filters, Element element);

}  // namespace prunekernels
