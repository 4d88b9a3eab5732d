// Plans on CPU.
#pragma once

#include "plan/plan_choice.h"

namespace prunekernels {

const PlanDevice& cpu_plans();

}  // namespace prunekernels
