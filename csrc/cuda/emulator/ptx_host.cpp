#include "cuda/emulator/traffic.h"
#include "cuda/kernels/ptx.cuh"

namespace prunekernels::simt {
namespace {

template <typename T>
struct Pair {  // two elements to a register, the first in the low half
  static float get(const uint32_t* registers, int i) {
    return T{static_cast<uint16_t>(registers[i / 2] >> 16 * (i % 2))};
  }
};

// Lane l of the warp: group g = l / 4, t = l % 4.
//   a   register r: row g + 8 (r % 2), columns 2 t + 8 (r / 2) and the next
//   b   register r: rows 2 t + 8 r and the next, column g
//   d   element i: row g + 8 (i / 2), column 2 t + i % 2
template <typename T>
void mma_m16n8k16_of(void* const* lanes) {
  traffic::product();
  float a[16][16], b[8][16];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& mine = *static_cast<const Fragments*>(lanes[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 8; ++i) a[g + 8 * (i / 2 % 2)][2 * t + 8 * (i / 4) + i % 2] = Pair<T>::get(mine.a, i);
    for (int i = 0; i < 4; ++i) b[g][2 * t + 8 * (i / 2) + i % 2] = Pair<T>::get(mine.b, i);
  }
  for (int lane = 0; lane < 32; ++lane) {
    float* d = static_cast<const Fragments*>(lanes[lane])->d;
    for (int i = 0; i < 4; ++i) {
      const float* row = a[lane / 4 + 8 * (i / 2)];
      const float* column = b[2 * (lane % 4) + i % 2];
      float sum = d[i];
      for (int k = 0; k < 16; ++k) sum += row[k] * column[k];
      d[i] = sum;
    }
  }
}

// The hardware reads the upper 19 bits only.
float tf32(uint32_t bits) { return float_from_bits(bits & 0xffffe000); }

}  // namespace

void mma_m16n8k16_bf16(void* const* lanes, uint32_t) { mma_m16n8k16_of<BFloat16>(lanes); }
void mma_m16n8k16_f16(void* const* lanes, uint32_t) { mma_m16n8k16_of<Half>(lanes); }

//   a   register r: row g + 8 (r % 2), column t + 4 (r / 2)
//   b   register r: row t + 4 r, column g
//   d   as above
void mma_m16n8k8_tf32(void* const* lanes, uint32_t) {
  traffic::product();
  float a[16][8], b[8][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& mine = *static_cast<const Fragments*>(lanes[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int r = 0; r < 4; ++r) a[g + 8 * (r % 2)][t + 4 * (r / 2)] = tf32(mine.a[r]);
    for (int r = 0; r < 2; ++r) b[g][t + 4 * r] = tf32(mine.b[r]);
  }
  for (int lane = 0; lane < 32; ++lane) {
    float* d = static_cast<const Fragments*>(lanes[lane])->d;
    for (int i = 0; i < 4; ++i) {
      const float* row = a[lane / 4 + 8 * (i / 2)];
      const float* column = b[2 * (lane % 4) + i % 2];
      float sum = d[i];
      for (int k = 0; k < 8; ++k) sum += row[k] * column[k];
      d[i] = sum;
    }
  }
}

}  // namespace prunekernels::simt
