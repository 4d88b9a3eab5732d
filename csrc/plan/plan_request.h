// What the argument `plan` of an operator asks for.
#pragma once

#include <optional>
#include <string_view>

#include "core/mask_table.h"
#include "plan/plan.h"

namespace prunekernels {

// "auto" times the candidates and remembers the fastest, "model" only estimates, a plan's name forces that plan; where
// a forced plan cannot compute the problem, it counts as "auto". "small" is "auto" for the convolution of a network's
// live part: there our own kernels may be the fastest although nothing is dead. Anywhere else nothing dead means the
// vendor's convolution, bit for bit.
struct PlanRequest {
  std::optional<Plan> forced;
  bool may_measure;
  bool small = false;

  // Whether the vendor's plain convolution runs without any choice of a plan.
  bool settled(const MaskTable& mask) const { return mask.nothing_dead() && !small; }
};

PlanRequest read_plan(const char* op, std::string_view plan);

}  // namespace prunekernels
