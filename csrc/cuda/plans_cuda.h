// Plans on the device: which serve a call, and what the choice between them has to know.
#pragma once

#include "cuda/conv_call.h"
#include "plan/plan_choice.h"

namespace prunekernels {

class DevicePlans : public PlanDevice {
 public:
  explicit DevicePlans(const DeviceMask& mask, at::Device device) : mask_(mask), device_(device) {}

  bool serves(Plan plan, const PlanCase& c) const override;
  double cost(Plan plan, const PlanCase& c) const override;
  double milliseconds(c10::function_ref<void()> work) const override;
  bool can_measure() const override;
  void describe(const PlanCase& c, PlanKey& key) const override;

 private:
  bool tensor_cores(const PlanCase& c) const;
  bool vectors(const PlanCase& c) const;
  double listed_share(const PlanCase& c) const;

  const DeviceMask& mask_;
  at::Device device_;
};

// The plan that would run now, without measuring anything. table: a mask table's words in which something is dead and
// something live.
Plan plan_on_device(const PlanRequest& asked, const std::vector<int32_t>& table, const ConvShape& shape,
                    Direction direction, at::ScalarType dtype, at::MemoryFormat format, at::Device device);

}  // namespace prunekernels
