#include "plan/plan_request.h"

#include "check.h"

namespace prunekernels {

PlanRequest read_plan(const char* op, std::string_view plan) {
  for (Plan p : kPlans)
    if (plan == name_of(p)) return {p, true};
  if (plan == "small") return {std::nullopt, true, true};
  PK_CHECK(plan == "auto" || plan == "model", op, "plan", "auto, model, dense, compact, direct or sparse", plan);
  return {std::nullopt, plan == "auto"};
}

}  // namespace prunekernels
