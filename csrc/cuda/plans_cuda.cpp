#include "cuda/plans_cuda.h"

#include <ATen/DeviceGuard.h>

#include <cmath>
#include <memory>

#include "cuda/direct_conv.h"
#include "plan/cost_cuda.h"

namespace prunekernels {

bool DevicePlans::serves(Plan plan, const PlanCase& c) const {
  if (!device::runs_kernels()) return plan == Plan::dense;
  switch (plan) {
    case Plan::dense:
      return true;
    case Plan::compact:
      return c.dtype != at::kDouble;
    case Plan::direct:
      return igemm_serves_call(c.shape, c.dtype, c.format);
    default:  // with every kernel live between the lists, the tile lists would list everything
      return sparse_serves_call(c.shape, c.dtype, c.format) ||
             (!c.mask[kPairsFull] && igemm_serves_call(c.shape, c.dtype, c.format));
  }
}

bool DevicePlans::tensor_cores(const PlanCase& c) const { return c.dtype != at::kFloat || device::allows_tf32(); }

// Of what igemm_* gather as they load.
bool DevicePlans::vectors(const PlanCase& c) const {
  const Element element = element_of(c.dtype);
  const bool in = mask_.in().view(element).vectors, out = mask_.out().view(element).vectors;
  return c.direction == Direction::forward ? in : c.direction == Direction::grad_input ? out : in && out;
}

double DevicePlans::listed_share(const PlanCase& c) const {
  if (c.mask[kPairsFull] || !igemm_serves_call(c.shape, c.dtype, c.format)) return 1;
  const bool of_filters = c.direction != Direction::grad_input;
  const Element element = element_of(c.dtype);
  return mask_.listed_share(of_filters, mask_block(mask_, of_filters, element), vector_channels(element));
}

double DevicePlans::cost(Plan plan, const PlanCase& c) const {
  const bool last = c.format == at::MemoryFormat::ChannelsLast;
  const auto bytes = static_cast<int64_t>(c10::elementSize(c.dtype));
  const DeviceCase about{c.shape, c.mask, c.direction, bytes, tensor_cores(c), last, vectors(c), listed_share(c)};
  return DeviceCost(about).of(plan);
}

double DevicePlans::milliseconds(c10::function_ref<void()> work) const { return device::milliseconds(work); }

bool DevicePlans::can_measure() const { return !device::capturing(); }

// Beside the counts, speed depends on how the live ones lie.
void DevicePlans::describe(const PlanCase& c, PlanKey& key) const {
  key.device_type = static_cast<int32_t>(device_.type());
  key.device_index = device_.index();
  const auto sixteenths = static_cast<int32_t>(std::ceil(16 * listed_share(c)));
  key.settings = tensor_cores(c) | device::tunes_vendor() << 1 | vectors(c) << 2 | sixteenths << 3;
}

Plan plan_on_device(const PlanRequest& asked, const std::vector<int32_t>& table, const ConvShape& shape,
                    Direction direction, at::ScalarType dtype, at::MemoryFormat format, at::Device device) {
  const at::DeviceGuard guard(device);
  const auto mask = std::make_shared<const DeviceMask>(table, device);
  return planned(DevicePlans(*mask, device), asked, {shape, mask->table(), direction, dtype, format});
}

}  // namespace prunekernels
