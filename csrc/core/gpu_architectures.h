// Which GPUs run what nvcc has compiled.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace prunekernels {

// "sm_80,compute_80,sm_90a" in parts: machine code (sm_) and PTX (compute_).
std::vector<std::string> architectures_in(std::string_view list);

// Whether a GPU of compute capability major.minor runs one of them. True for an empty list: it is not known.
bool runs_on(std::string_view list, int major, int minor);

// Whether one of them is `oldest` ("sm80") or later.
bool has_architecture(std::string_view list, std::string_view oldest);

}  // namespace prunekernels
