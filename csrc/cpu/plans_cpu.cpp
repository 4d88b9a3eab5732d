#include "cpu/plans_cpu.h"

#include <ATen/Parallel.h>

#include <chrono>
#include <cmath>

#include "cpu/depthwise.h"
#include "cpu/direct_pixels.h"
#include "cpu/kernels/depthwise_conv.h"
#include "cpu/kernels/microkernels.h"
#include "cpu/kernels/pixel_kernels.h"
#include "cpu/sparse_pixels.h"
#include "ops/vendor_conv.h"

namespace prunekernels {
namespace {

// What a call costs whatever its size, in multiply-adds of the vendor's convolution, of which a core does some 50 in a
// nanosecond: by plan. Where there are few pixels this is all that counts.
constexpr double kCallCost[] = {0.8e6, 1e6, 0.3e6, 0.3e6}, kProductCallCost = 0.2e6;
constexpr double kScalarCost = 50;  // of the pixel kernels without instructions for them, in those with

// What the sparse plan's 3x3 windows take, in the vendor's multiply-adds: one of a live kernel, and, whatever is dead,
// this share of those of the live filters and channels.
constexpr double kWindowCost = 1.15, kWindowShare = 0.1;

bool has_windows(const PlanCase& c) {
  const ConvShape& s = c.shape;
  const auto fits = [&](int axis) { return s.stride[axis] == s.stride[0] && s.dilation[axis] == 1; };
  return c.dtype == at::kFloat && s.R == 3 && s.S == 3 && s.stride[0] <= 2 && fits(0) && fits(1) &&
         microkernels().window[1][1];
}

double windows_cost(const PlanCase& c) {
  const MaskTable& mask = c.mask;
  const double pixels = static_cast<double>(c.shape.N) * c.shape.out_pixels() * c.shape.taps();
  return pixels * (kWindowCost * mask[kLivePairs] + kWindowShare * mask.out_count() * mask[kInPerGroup]) +
         elements_copied(c.shape, mask, c.direction) * kMultiplyAddsPerElement / 2;
}

// The plane kernels: floats, NCHW, offsets that fit 32 bits. A tensor dense in both formats is NCHW to them.
bool planes_serve(const PlanCase& c) {
  constexpr int64_t kMost = 1 << 30;
  return c.dtype == at::kFloat && c.format == at::MemoryFormat::Contiguous && c.shape.C * c.shape.in_pixels() < kMost &&
         c.shape.K * c.shape.out_pixels() < kMost;
}

class CpuPlans : public PlanDevice {
  bool serves(Plan plan, const PlanCase& c) const override {
    if (plan == Plan::compact) return !c.mask.nothing_dead();  // or else it is dense
    if (is_depthwise(c.shape)) return plan == Plan::dense || (plan == Plan::direct && depthwise_serves(c));
    return plan == Plan::dense || planes_serve(c) || (plan == Plan::direct ? pixels_serve(c) : sparse_pixels_serve(c));
  }
  double cost(Plan plan, const PlanCase& c) const override {
    if (is_depthwise(c.shape)) return depthwise_cost(plan, c);
    const bool own = c.dtype == at::kBFloat16 && (plan == Plan::direct || plan == Plan::sparse);
    const double slower = own && !has_pixel_kernels() ? kScalarCost : 1;
    const bool is_product = plan == Plan::dense && vendor::is_product(c.shape, c.dtype, at::kCPU);
    const double call = is_product ? kProductCallCost : kCallCost[static_cast<int>(plan)];
    if (own && plan == Plan::sparse) return call + slower * sparse_pixels_cost(c);
    if (plan == Plan::sparse && has_windows(c)) return call + windows_cost(c);
    return call + slower * prunekernels::cost(plan, c.shape, c.mask, c.direction);
  }
  double milliseconds(c10::function_ref<void()> work) const override {
    const auto start = std::chrono::steady_clock::now();
    work();
    return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
  }
  void describe(const PlanCase& c, PlanKey& key) const override {
    key.device_index = -1;
    key.threads = at::get_num_threads();
    if (sparse_pixels_serve(c)) key.settings = static_cast<int32_t>(std::ceil(16 * listed_share(c)));
  }
};

}  // namespace

const PlanDevice& cpu_plans() {
  static const CpuPlans plans;
  return plans;
}

}  // namespace prunekernels
