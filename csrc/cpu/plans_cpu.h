// Plans on CPU.
#pragma once

#include "plan/plan_choice.h"

namespace prunekernels {

const PlanDevice& cpu_plans();

inline at::Tensor with_plan(const PlanRequest& asked, const PlanCase& c, c10::function_ref<at::Tensor(Plan)> run) {
  return with_plan(cpu_plans(), asked, c, run);
}

}  // namespace prunekernels
