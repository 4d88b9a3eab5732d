// What was measured, for the life of the process: one entry for each kind of problem.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

#include "plan/plan.h"

namespace prunekernels {

// A problem as far as a plan's speed depends on it. Live counts are in sixteenths of the width, rounded up, so that a
// slowly changing mask seldom asks for a new measurement.
struct PlanKey {
  Direction direction;
  int32_t dtype, format;              // at::ScalarType, at::MemoryFormat
  int32_t device_type, device_index;  // at::DeviceType
  int32_t threads;                    // of the CPU
  int32_t settings;                   // bits of the device's own: what else its speed depends on
  int32_t N, C, H, W, K, R, S, G;
  int32_t stride[2], padding[2], dilation[2];
  int32_t live_filters, live_inputs;  // of the compact convolution
  int32_t live_kernels;               // of the kernels between those
};
static_assert(std::has_unique_object_representations_v<PlanKey>);  // compared and hashed as bytes

struct Measured {
  Plan plan;
  std::array<double, std::size(kPlans)> ms;  // NaN: not a candidate
};

namespace plan_cache {

std::optional<Plan> find(const PlanKey& key);
void keep(const PlanKey& key, const Measured& measured);
bool full();  // where every input has a size of its own, measuring would never end
std::vector<std::pair<PlanKey, Measured>> entries();
void clear();

}  // namespace plan_cache
}  // namespace prunekernels
