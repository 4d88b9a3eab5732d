// Which plans serve a problem on CPU, and which one runs.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/FunctionRef.h>

#include "conv_args.h"
#include "cpu/plan_cache.h"

namespace prunekernels {

struct PlanCase {
  const ConvShape& shape;
  const MaskTable& mask;
  Direction direction;
  at::ScalarType dtype;
  at::MemoryFormat format;
};

// Whether the plan can compute the case at all; dense and compact always can.
bool plan_serves(Plan plan, const ConvShape& shape, at::ScalarType dtype, at::MemoryFormat format);

PlanKey plan_key(const PlanCase& c);

// The plan that would run now, without measuring anything.
Plan planned(const PlanRequest& asked, const PlanCase& c);

// The result of the plan asked for. Where it is ours to choose and the key is new, run is called several times: the
// candidates are timed, the fastest is kept for the key, and its result returned.
at::Tensor with_plan(const PlanRequest& asked, const PlanCase& c, c10::function_ref<at::Tensor(Plan)> run);

}  // namespace prunekernels
