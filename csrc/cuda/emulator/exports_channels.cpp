// Channel copies for ctypes.
#include "cuda/kernels/channel_copy.h"

using namespace prunekernels;

extern "C" {

int pk_channel_granule(const int32_t* index, int64_t compact, int64_t full, int64_t* granule) {
  *granule = channel_granule(index, compact, full);
  return cudaSuccess;
}

int pk_gather_channels(const void* full, const int32_t* index, void* compact, int64_t images, int64_t pixels,
                       int64_t full_channels, int64_t compact_channels, int element_bytes, bool channels_last,
                       int64_t granule) {
  return launch_gather_channels(
      full, index, compact, {images, pixels, full_channels, compact_channels, element_bytes, channels_last, granule},
      nullptr);
}

int pk_scatter_channels(const void* compact, const int32_t* slot, void* full, int64_t images, int64_t pixels,
                        int64_t full_channels, int64_t compact_channels, int element_bytes, bool channels_last,
                        int64_t granule) {
  return launch_scatter_channels(
      compact, slot, full, {images, pixels, full_channels, compact_channels, element_bytes, channels_last, granule},
      nullptr);
}

int pk_join(const void* a, const int32_t* slot_a, const void* b, const int32_t* slot_b, void* out, int64_t images,
            int64_t pixels, int64_t a_channels, int64_t b_channels, int64_t out_channels, int element,
            bool channels_last, float alpha) {
  return launch_join(
      a, slot_a, b, slot_b, out,
      {images, pixels, a_channels, b_channels, out_channels, static_cast<Element>(element), channels_last, alpha},
      nullptr);
}
}
