// Weight gradients as implicit matrix products, and plan_grad_weight(), for ctypes.
#include "cuda/emulator/exports_shape.h"
#include "cuda/kernels/igemm.h"

using namespace prunekernels;

extern "C" {

int pk_igemm_grad_weight(const int64_t* sizes, int element, bool tf32, int tile, int64_t splits, const void* grad_out,
                         int64_t filter_channels, int64_t filters, const int32_t* filter_index, bool filter_vectors,
                         const void* x, int64_t x_channels, int64_t channels, const int32_t* channel_index,
                         bool channel_vectors, float* partial, const int32_t* list_first, const int32_t* list_chunks,
                         int64_t longest) {
  const IgemmGradWeightArgs args{shape_of(sizes),
                                 static_cast<Element>(element),
                                 tf32,
                                 static_cast<GradWeightTile>(tile),
                                 splits,
                                 grad_out,
                                 {filter_channels, filters, filter_index, nullptr, filter_vectors},
                                 x,
                                 {x_channels, channels, channel_index, nullptr, channel_vectors},
                                 partial,
                                 {list_first, list_chunks, longest}};
  return list_first ? block_sparse_grad_weight(args, nullptr) : igemm_grad_weight(args, nullptr);
}

// plan: tile, splits, floats
int pk_plan_grad_weight(const int64_t* sizes, int element, int64_t filters, int64_t channels, int multiprocessors,
                        int64_t* plan) {
  const GradWeightPlan p =
      plan_grad_weight(shape_of(sizes), static_cast<Element>(element), filters, channels, multiprocessors);
  plan[0] = static_cast<int64_t>(p.tile), plan[1] = p.splits, plan[2] = p.partial_floats;
  return cudaSuccess;
}
}
