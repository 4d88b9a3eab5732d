"""The CUDA operators of csrc/cuda for CPU tensors, over kernels that run under the emulator, as
torch.ops.prunekernels_emulated. Object files are shared with the libraries of single kernels.

use() lets prunekernels itself call them, so that the tests of the operators run on them: see operators_plugin.py.
"""

import ctypes
import fcntl
import os
import pathlib
import re

import torch
from torch.utils.cpp_extension import include_paths, library_paths

from . import build

NAMESPACE = "prunekernels_emulated"
SHARED = (
    "ops/conv_args.cpp",
    "ops/optim_args.cpp",
    "ops/parameter_args.cpp",
    "ops/vendor_conv.cpp",
    "plan/plan_cache.cpp",
    "plan/plan_choice.cpp",
    "plan/plan_request.cpp",
    "plan/trials.cpp",
)  # with the CPU operators
COMPILED_ALONE = (  # operators without a fallback
    "masked_batch_norm", "masked_batch_norm_backward", "deferred_batch_norm", "apply_batch_norm_", "batch_norm_relu",
    "deferred_sum",
)  # fmt: skip
STREAM = build.CSRC / "cuda" / "kernels" / "stream.h"  # which everything includes
BOTH_PASSES = (  # csrc/cuda/both_passes_emulated.cpp
    "both_passes(Tensor x, Tensor weight, Tensor? mask, Tensor grad_out, int[] padding, int groups, str plan, "
    "str backward_plan, bool? backward_tf32=None) -> (Tensor, Tensor)"
)
_kept = []


def _headers(source: pathlib.Path) -> set[pathlib.Path]:
    """What it includes of csrc/cuda/kernels, and what that includes."""
    found = [source]
    for path in found:  # grows meanwhile
        names = re.findall(r'^#include "(cuda/kernels/\w+\.\w+)"', path.read_text(), re.MULTILINE)
        found += [build.CSRC / name for name in names if build.CSRC / name not in found]
    return set(found[1:])


def _kernels() -> list[pathlib.Path]:
    """Those whose launchers the operators call."""
    hosts = [path for path in (build.CSRC / "cuda").iterdir() if path.suffix in (".h", ".cpp")]
    called = {path for file in hosts for path in _headers(file) if path.suffix == ".h"} - {STREAM}
    return [p for p in sorted((build.CSRC / "cuda" / "kernels").glob("*.cu")) if _headers(p) & called]


def _ninja_file() -> str:
    abi = int(torch._C._GLIBCXX_USE_CXX11_ABI)
    flags = f"-std=c++20 -O0 -g0 -fPIC -fvisibility=hidden -DPK_EMULATED -D_GLIBCXX_USE_CXX11_ABI={abi} -I{build.CSRC}"
    includes = " ".join(f"-isystem {path}" for path in include_paths())
    folders = " ".join(f"-L{path} -Wl,-rpath,{path}" for path in library_paths())
    lines = [
        build._ninja_file([], ""),
        "rule compile_operators",
        f"  command = {build.CXX} {flags} {includes} -include torch.h -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule compile_header",
        f"  command = {build.CXX} {flags} {includes} -x c++-header -c $in -o $out",
        "build torch.h.gch: compile_header torch.h",  # half of the time of every file
    ]
    objects = []
    for source in [*(build.CSRC / name for name in SHARED), *sorted((build.CSRC / "cuda").glob("*.cpp"))]:
        objects.append(f"operators-{source.stem}.o")
        lines.append(f"build {objects[-1]}: compile_operators {source} | torch.h.gch")
    for source in _kernels():
        objects.append(str(source.relative_to(build.CSRC)).replace("/", "-") + ".o")
        lines += [f"build {objects[-1]}: compile {source}", "  level = -O1"]
    lines += [
        f"build liboperators.so: link {' '.join(objects)} | libmachine.so",
        f"  libraries = -L. -lmachine -Wl,-rpath,'$$ORIGIN' -Wl,-z,defs {folders} -ltorch -ltorch_cpu -lc10",
    ]
    return "\n".join(lines) + "\n"


def library() -> pathlib.Path:
    """Up to date. Raises build.Broken."""
    folder = build.ROOT / "build" / "emulated"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (header := folder / "torch.h").exists():
            header.write_text("#include <ATen/core/Tensor.h>\n#include <torch/library.h>\n")
        (folder / "operators.ninja").write_text(_ninja_file())
        if why := build._ninja(folder, "-f", "operators.ninja", "liboperators.so"):
            raise build.Broken(why)
    return folder / "liboperators.so"


def load():
    """torch.ops.prunekernels_emulated, and the library itself for what is not an operator."""
    from prunekernels.ops import fallback, fallback_steps

    if not _kept:
        library_ = ctypes.CDLL(str(library()), mode=os.RTLD_NOW | os.RTLD_LOCAL)
        library_.pk_take_events.restype = ctypes.c_char_p
        definitions = torch.library.Library(NAMESPACE, "DEF")
        for schema in fallback.SCHEMAS + fallback_steps.SCHEMAS:
            if not schema.startswith("conv_mask"):
                definitions.define(schema)
        for name in COMPILED_ALONE:
            schema = getattr(torch.ops.prunekernels, name).default._schema
            definitions.define(str(schema).removeprefix("prunekernels::"))
        definitions.define(BOTH_PASSES)
        getattr(torch.ops, NAMESPACE).attach_live = torch.ops.prunekernels.attach_live  # no device's business
        _kept.extend([definitions, library_])
    return getattr(torch.ops, NAMESPACE), _kept[1]


def register_gradients():
    """Those of prunekernels.ops.autograd, which call whatever operators it calls."""
    from prunekernels.ops import autograd

    if len(_kept) == 2:
        _kept.append("gradients")
        for name, (backward, setup) in autograd._GRADIENTS.items():
            torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=setup)


def replacements():
    """(module, name, what it calls there from now on), of all of prunekernels that calls operators."""
    from prunekernels import filter_ops, functional
    from prunekernels.live import channel_ops
    from prunekernels.live.rules import elementwise
    from prunekernels.nn import conv
    from prunekernels.ops import autograd
    from prunekernels.optim import adamw, sgd

    ops = load()[0]
    for module in (autograd, filter_ops, functional, elementwise, conv, channel_ops):
        yield module, "ops", ops
    yield sgd, "OPERATOR", ops.masked_sgd_.default
    yield adamw, "OPERATOR", ops.masked_adamw_.default


def use():
    """From now on prunekernels computes with these operators, in this process; its own conv_mask still makes tables."""
    for replacement in replacements():
        setattr(*replacement)
    register_gradients()
