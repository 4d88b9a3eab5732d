"""The includes of csrc: rooms include rooms below them, kernels include no torch, and no headers include each other."""

import graphlib
import pathlib
import re

import pytest

CSRC = pathlib.Path(__file__).parents[2] / "csrc"
ALLOWED = {  # room -> the rooms it may include besides itself
    "core": set(),
    "plan": {"core"},
    "ops": {"core", "plan"},
    "cpu/kernels": {"core"},
    "cuda/kernels": {"core"},
    "cuda/emulator": {"core", "cuda/kernels"},
    "cpu": {"core", "plan", "ops", "cpu/kernels"},
    "cuda": {"core", "plan", "ops", "cuda/kernels"},
}
# Outside the rule: the emulator takes CUDA's place in the kernels.
ALSO = {
    ("cuda/kernels", "cuda/emulator/simt.h"),
    ("cuda/kernels", "cuda/emulator/ptx_host.h"),
}
SOURCES = sorted(path for path in CSRC.rglob("*") if path.suffix in (".h", ".cpp", ".cuh", ".cu", ".inc"))
INCLUDES = {
    str(path.relative_to(CSRC)): re.findall(r'^\s*#\s*include ["<]([^">]+)[">]', path.read_text(), re.MULTILINE)
    for path in SOURCES
}


def room(name):
    return str(pathlib.PurePath(name).parent)


@pytest.mark.parametrize("name", [name for name in INCLUDES if room(name) != "."])
def test_only_rooms_below(name):
    here = room(name)
    wrong = [
        other
        for other in INCLUDES[name]
        if other in INCLUDES and room(other) not in {here, "."} | ALLOWED[here] and (here, other) not in ALSO
    ]
    assert not wrong, f"csrc/{name} must not include {', '.join(wrong)}"


@pytest.mark.parametrize("name", [name for name in INCLUDES if room(name) in ("core", "cpu/kernels", "cuda/kernels")])
def test_no_torch_in_kernels(name):
    wrong = [other for other in INCLUDES[name] if re.match(r"(torch|ATen|c10|pybind11)/|check\.h", other)]
    assert not wrong, f"csrc/{name} must not include {', '.join(wrong)}"


def test_no_circle():
    graph = {name: [other for other in found if other in INCLUDES] for name, found in INCLUDES.items()}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError
