// pack_weights and unpack_grad_weight for ctypes, which passes arrays of PackJob and UnpackJob as they are.
#include "cuda/kernels/pack_weights.h"

using namespace prunekernels;

extern "C" {

// masks: [K], [K, C / G], [C] -> the table [mask_table_words(K, C, G)] and what pack_mask() says of it
int pk_pack_mask(const bool* filter, const bool* kernel, const bool* input, int64_t K, int64_t C, int64_t G,
                 int32_t* table, void* mask) {
  build_mask_table(filter, kernel, input, K, C, G, table);
  *static_cast<PackMask*>(mask) = pack_mask(table, table);
  return cudaSuccess;
}
int pk_pack_weights(const void* jobs, int64_t count, int packed, bool tf32) {
  return launch_pack_weights(static_cast<const PackJob*>(jobs), count, static_cast<Element>(packed), tf32, nullptr);
}
int pk_unpack_grad_weight(const void* jobs, int64_t count, int full) {
  return launch_unpack_grad_weight(static_cast<const UnpackJob*>(jobs), count, static_cast<Element>(full), nullptr);
}
}
