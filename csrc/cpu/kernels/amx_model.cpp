// The pixel kernels for AMX over a model of its instructions, for tests (cap_isa).
#include "cpu/kernels/amx_model.h"

#include "cpu/kernels/amx_pixels.h"

namespace prunekernels {
namespace {

struct AmxModel {
  static TileModel& state() {
    static thread_local TileModel model;
    return model;
  }
  static void configure(const TileConfig& config) { state().configure(config); }
  static void release() { state().release(); }
  template <int kTile>
  static void load(const void* from, int64_t stride) {
    state().load(kTile, from, stride);
  }
  template <int kTile>
  static void store(void* to, int64_t stride) {
    state().store(kTile, to, stride);
  }
  template <int kSums, int kA, int kB>
  static void dot() {
    state().dot(kSums, kA, kB);
  }
  template <int kVectors>
  static void narrow(const float* sums, uint32_t lanes, uint16_t* y) {
    for (int i = 0; i < 16 * kVectors; ++i) y[i] = lanes >> i & 1 ? narrowed_to_bfloat16(sums[i]) : 0;
  }
};

}  // namespace

PixelKernels pixel_kernels_amx_model() { return AmxPixels<AmxModel>::table(); }

}  // namespace prunekernels
