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
  // The model's estimate, in a unit of its own.
  virtual double cost(Plan plan, const PlanCase& c) const = 0;
  // Runs work once and returns its time. Called only where can_measure(); elsewhere the model decides.
  virtual double milliseconds(c10::function_ref<void()> work) const = 0;
  virtual bool can_measure() const { return true; }
  // Fills in the key's fields about the device: type, index, threads, settings.
  virtual void describe(const PlanCase& c, PlanKey& key) const = 0;
};

PlanKey plan_key(const PlanDevice& device, const PlanCase& c);

// The plan that would run now, without measuring anything.
Plan planned(const PlanDevice& device, const PlanRequest& asked, const PlanCase& c);

// Runs the plan that was asked for and returns its result. If none was forced and the problem is new, it first times
// the candidates, which calls run several times, and remembers the fastest under the problem's key.
at::Tensor with_plan(const PlanDevice& device, const PlanRequest& asked, const PlanCase& c,
                     c10::function_ref<at::Tensor(Plan)> run);

}  // namespace prunekernels
