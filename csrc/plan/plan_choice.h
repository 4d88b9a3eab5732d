// Which plans serve a problem, and which one runs: one procedure for all devices, which differ in what PlanDevice says.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/FunctionRef.h>

#include "plan/plan_cache.h"
#include "plan/plan_request.h"

namespace prunekernels {

struct PlanCase {
  const ConvShape& shape;
  const MaskTable& mask;
  Direction direction;
  at::ScalarType dtype;
  at::MemoryFormat format;
};

class PlanDevice {
 public:
  virtual ~PlanDevice() = default;
  // Whether the plan can compute the case at all; dense always can.
  virtual bool serves(Plan plan, const PlanCase& c) const = 0;
  // The model's opinion, in a unit of its own.
  virtual double cost(Plan plan, const PlanCase& c) const = 0;
  // Time of one run of work. Only called where can_measure(): else the model decides, until a measurement is there.
  virtual double milliseconds(c10::function_ref<void()> work) const = 0;
  virtual bool can_measure() const { return true; }
  // Fills in what the key says of the device: type, index, threads, settings.
  virtual void describe(const PlanCase& c, PlanKey& key) const = 0;
};

PlanKey plan_key(const PlanDevice& device, const PlanCase& c);

// The plan that would run now, without measuring anything.
Plan planned(const PlanDevice& device, const PlanRequest& asked, const PlanCase& c);

// The result of the plan asked for. Where it is ours to choose and the key is new, run is called several times: the
// candidates are timed, and the fastest is kept for the key.
at::Tensor with_plan(const PlanDevice& device, const PlanRequest& asked, const PlanCase& c,
                     c10::function_ref<at::Tensor(Plan)> run);

}  // namespace prunekernels
