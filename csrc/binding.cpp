// Module _C. Importing it registers the operators with torch; its own functions only tell about the build and about
// plans. No tensor passes through it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "core/gpu_architectures.h"
#include "cpu/kernels/isa.h"

// setup.py names what nvcc compiles: sm_80,compute_80,sm_90a
#if !defined(PRUNEKERNELS_CUDA_ARCHITECTURES)
#define PRUNEKERNELS_CUDA_ARCHITECTURES ""
#endif

namespace py = pybind11;

namespace prunekernels {

void bind_plans(py::module_& m);  // plan_binding.cpp

namespace {

// extension.py reads it in the file, before the library is loaded: torch keeps no ABI from one release to the next.
[[gnu::used]] const char kBuiltFor[] = "prunekernels built for torch=" PRUNEKERNELS_TORCH_VERSION;

std::map<std::string, std::string> build_info() {
  return {
#if defined(__VERSION__)
      {"compiler", __VERSION__},
#endif
      {"torch", PRUNEKERNELS_TORCH_VERSION},
#if defined(PRUNEKERNELS_WITH_CUDA)
      {"cuda", PRUNEKERNELS_WITH_CUDA},
#else
      {"cuda", ""},
#endif
      {"cuda_architectures", PRUNEKERNELS_CUDA_ARCHITECTURES},
      {"isa", isa_name(isa())},
  };
}

#if defined(PRUNEKERNELS_WITH_CUDA)
constexpr bool kWithCuda = true;
#else
constexpr bool kWithCuda = false;
#endif

// Whether a CUDA row of the table is in this build. Where it does not know its architectures, it has them all.
bool has_kernel(const char* oldest) {
  constexpr std::string_view all = PRUNEKERNELS_CUDA_ARCHITECTURES;
  return kWithCuda && (all.empty() || has_architecture(all, oldest));
}

// One dict for each row of kernel_table.inc. CPU rows name the instruction set that they need, CUDA rows the oldest
// architecture, and those that this build has them for. Every build lists the CUDA rows; "compiled" says whether it has
// them.
std::vector<py::dict> kernels() {
  std::vector<py::dict> rows;
  const auto add = [&](const char* name, const char* operation, const char* device, const char* element,
                       const char* needs, const char* what, bool compiled) {
    py::dict row;
    row["name"] = name, row["operation"] = operation, row["device"] = device, row["element"] = element;
    row[needs] = what, row["compiled"] = compiled;
    if (std::string_view(device) == "cuda") row["architectures"] = architectures_in(PRUNEKERNELS_CUDA_ARCHITECTURES);
    rows.push_back(row);
  };
#define PK_CHANNEL_COPY(operation, element, isa) \
  add(#operation "_" #element "_" #isa, #operation, "cpu", #element, "isa", #isa, true);
#define PK_MICROKERNELS(isa) add("microkernels_" #isa, "microkernels", "cpu", "f32", "isa", #isa, true);
#define PK_DEPTHWISE(isa) add("depthwise_" #isa, "depthwise", "cpu", "f32", "isa", #isa, true);
#define PK_OPTIM(isa) add("optim_" #isa, "optim", "cpu", "f32", "isa", #isa, true);
#define PK_MASK_GRAD(isa) add("mask_grad_" #isa, "mask_grad", "cpu", "f32", "isa", #isa, true);
#define PK_NORM(element, isa) add("norm_" #element "_" #isa, "norm", "cpu", #element, "isa", #isa, true);
#define PK_CAST(isa) add("cast_" #isa, "cast", "cpu", "bf16", "isa", #isa, true);
#define PK_PIXELS(isa) add("pixels_" #isa, "pixels", "cpu", "bf16", "isa", #isa, true);
#define PK_QUADS(isa) add("quads_" #isa, "quads", "cpu", "bf16", "isa", #isa, true);
#define PK_CUDA(operation, element, arch) \
  add(#operation "_" #element "_" #arch, #operation, "cuda", #element, "arch", #arch, has_kernel(#arch));
#include "kernel_table.inc"
  return rows;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled part of prunekernels: registers torch.ops.prunekernels.*";
  m.def("build_info", build_info,
        "Compiler, torch version, CUDA version ('' without), its architectures, and the CPU instruction set in force.");
  m.def(
      "runs_on_gpu",
      [](int major, int minor, const std::string& architectures) { return runs_on(architectures, major, minor); },
      py::arg("major"), py::arg("minor"), py::arg("architectures") = PRUNEKERNELS_CUDA_ARCHITECTURES,
      "Whether a GPU of this compute capability runs CUDA kernels for these architectures, those of this build.");
  m.def("kernels", kernels, "The rows of the kernel table.");
  m.def("cpu_isa", [] { return std::string(isa_name(cpu_isa())); }, "The best instruction set that this CPU has.");
  m.def("cap_isa", cap_isa, py::arg("name"), "Caps the instruction set of the CPU kernels; '' lifts the cap.");
  bind_plans(m);
}

}  // namespace prunekernels
