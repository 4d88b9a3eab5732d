// What was found out about plans, for the life of the process: one entry for each kind of problem.
#pragma once

#include <cstdint>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

#include "plan/plan.h"
#include "plan/trials.h"

namespace prunekernels {

// A problem as far as a plan's speed depends on it. Live counts are in sixteenths of the width, rounded up, so that a
// slowly changing mask seldom asks for new trials.
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

// What is known of a problem. Without trials its plan is that of a problem nearby.
struct Known {
  Plan plan = Plan::dense;
  bool settled = false;
  Trials trials;
};

// A problem that differs in its batch, widths and live counts alone, and by how much: log2 of what differs most.
struct Neighbour {
  Known known;
  double distance;
  bool is_aligned_alike;  // the vendor's kernels get whole vectors of channels in both, or in neither
};

namespace plan_cache {

std::optional<Known> find(const PlanKey& key);
// The nearest problem whose plan trials have settled, if there is one.
std::optional<Neighbour> nearest(const PlanKey& key);
// Unless the problem is known already.
void begin(const PlanKey& key, const Known& known);
void add(const PlanKey& key, Plan plan, double ms);
bool full();       // where every input has a size of its own, trials would never end
int64_t trials();  // runs that were timed, in all
std::vector<std::pair<PlanKey, Known>> entries();
void clear();

}  // namespace plan_cache
}  // namespace prunekernels
