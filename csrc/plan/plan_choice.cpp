#include "plan/plan_choice.h"

#include <ATen/Context.h>

#include <algorithm>
#include <array>
#include <limits>
#include <mutex>
#include <vector>

namespace prunekernels {
namespace {

constexpr double kFarBehind = 3;       // times the model's best: not worth a trial
constexpr double kDenseFarBehind = 8;  // dense is tried almost always: no plan may be slower, and the model errs
// A neighbour tells which contenders are worth a trial up to an octave away, and the plan itself if that leads by more
// than what lies between the two: twice as many per cent, and kUnaligned where the vendor's kernels get whole vectors
// of channels in one of them alone.
constexpr double kNear = 1, kUnlikely = 1.5, kLeadPerOctave = 2, kUnaligned = 0.3, kSameEnough = 0.2;

Plan modelled(const PlanDevice& device, const PlanCase& c) {
  Plan best = Plan::dense;
  double least = almost_full(c.mask) ? 0 : device.cost(Plan::dense, c) * kMargin;
  for (Plan plan : kPlans)
    if (plan != Plan::dense && device.serves(plan, c) && device.cost(plan, c) < least)
      best = plan, least = device.cost(plan, c);
  return best;
}

// Whether the choice may rest on trials, old ones or new ones. Doubles are for checks such as gradcheck, to which the
// same bits each time are worth more than speed.
bool follows_trials(const PlanRequest& asked, const PlanCase& c) {
  const bool settled = almost_full(c.mask) && !c.mask.nothing_dead();
  return asked.may_measure && !settled && c.dtype != at::kDouble && !at::globalContext().deterministicAlgorithms();
}

// The plans that may be the fastest, the likeliest first.
std::vector<Plan> contenders(const PlanDevice& device, const PlanCase& c, const std::optional<Neighbour>& near) {
  double least = std::numeric_limits<double>::infinity();
  std::array<double, std::size(kPlans)> cost{};
  std::vector<Plan> found;
  for (Plan plan : kPlans)
    if (device.serves(plan, c)) least = std::min(least, cost[static_cast<int>(plan)] = device.cost(plan, c));
  for (Plan plan : kPlans) {
    double& of = cost[static_cast<int>(plan)];
    if (!device.serves(plan, c) || of > (plan == Plan::dense ? kDenseFarBehind : kFarBehind) * least) continue;
    of /= least;
    if (near && near->distance <= kNear) {
      const Trials& trials = near->known.trials;
      const double there = trials.relative(plan);  // NaN where it was not tried
      if (there > kUnlikely * (1 + near->distance)) continue;
      if (there > 0) of = there;
    }
    found.push_back(plan);
  }
  if (found.empty()) found.push_back(modelled(device, c));  // what led nearby cannot compute this
  const auto likelier = [&](Plan a, Plan b) { return cost[static_cast<int>(a)] < cost[static_cast<int>(b)]; };
  std::stable_sort(found.begin(), found.end(), likelier);
  return found;
}

// What is known of a problem that is met for the first time.
Known first_known(const PlanDevice& device, const PlanKey& key, const PlanCase& c) {
  const std::optional<Neighbour> near = plan_cache::nearest(key);
  if (near && near->distance <= kSameEnough && device.serves(near->known.plan, c)) {
    const double between = kLeadPerOctave * near->distance + (near->is_aligned_alike ? 0 : kUnaligned);
    if (near->known.trials.lead() > between) return {near->known.plan, true, {}};
  }
  const std::vector<Plan> plans = contenders(device, c, near);
  return {plans.front(), plans.size() == 1, Trials(plans)};
}

}  // namespace

PlanKey plan_key(const PlanDevice& device, const PlanCase& c) {
  const ConvShape& s = c.shape;
  const MaskTable& m = c.mask;
  const auto word = [](int64_t value) { return static_cast<int32_t>(value); };
  const auto sixteenths = [&](int64_t live, int64_t of) {
    return word((live * 16 + of - 1) / std::max<int64_t>(1, of));
  };
  PlanKey key{};
  key.direction = c.direction;
  key.dtype = word(static_cast<int64_t>(c.dtype)), key.format = word(static_cast<int64_t>(c.format));
  device.describe(c, key);
  key.N = word(s.N), key.C = word(s.C), key.H = word(s.H), key.W = word(s.W);
  key.K = word(s.K), key.R = word(s.R), key.S = word(s.S), key.G = word(s.G);
  for (int i = 0; i < 2; ++i) {
    key.stride[i] = word(s.stride[i]);
    key.padding[i] = word(s.padding[i]);
    key.dilation[i] = word(s.dilation[i]);
  }
  key.live_filters = sixteenths(m.out_count(), s.K);
  key.live_inputs = sixteenths(m.in_count(), s.C);
  key.live_kernels = sixteenths(m[kLivePairs], m.out_count() * m[kInPerGroup]);
  return key;
}

Plan planned(const PlanDevice& device, const PlanRequest& asked, const PlanCase& c) {
  if (asked.forced && device.serves(*asked.forced, c)) return *asked.forced;
  if (follows_trials(asked, c))
    if (const auto known = plan_cache::find(plan_key(device, c))) return known->plan;
  return modelled(device, c);
}

at::Tensor with_plan(const PlanDevice& device, const PlanRequest& asked, const PlanCase& c,
                     c10::function_ref<at::Tensor(Plan)> run) {
  if (asked.forced && device.serves(*asked.forced, c)) return run(*asked.forced);
  if (!follows_trials(asked, c)) return run(modelled(device, c));
  const PlanKey key = plan_key(device, c);
  std::optional<Known> known = plan_cache::find(key);
  // A plan that was read from a file may be any.
  if (known && known->settled) return run(device.serves(known->plan, c) ? known->plan : modelled(device, c));
  if (!device.can_measure()) return run(known ? known->plan : modelled(device, c));
  if (!known) {
    known = first_known(device, key, c);
    if (plan_cache::full()) return run(known->plan);
    plan_cache::begin(key, *known);
    if (known->settled) return run(known->plan);
  }
  static std::mutex one_at_a_time;  // trials at the same time would disturb each other
  const std::unique_lock lock(one_at_a_time, std::try_to_lock);
  if (!lock) return run(known->plan);
  const Plan turn = known->trials.next();
  at::Tensor result;
  const double ms = device.milliseconds([&] { result = run(turn); });
  plan_cache::add(key, turn, ms);
  return result;
}

}  // namespace prunekernels
