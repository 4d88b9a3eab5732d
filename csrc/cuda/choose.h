// The plan of a problem on the device, for those who only ask.
#pragma once

#include <c10/core/Device.h>

#include <vector>

#include "ops/conv_args.h"

namespace prunekernels {

// table: a mask table's words in which something is dead and something live.
Plan plan_on_device(const PlanRequest& asked, const std::vector<int32_t>& table, const ConvShape& shape,
                    Direction direction, at::ScalarType dtype, at::MemoryFormat format, at::Device device);

}  // namespace prunekernels
