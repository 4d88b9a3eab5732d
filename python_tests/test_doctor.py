"""python -m prunekernels doctor: each thing that may be wrong is found and named with what mends it."""

import importlib.metadata
import json
import pathlib
import platform
import shutil

import pytest
import torch

import prunekernels as pk
from cases.without_extension import ROOT, python
from prunekernels import cli, doctor, plan_file
from prunekernels.ops import extension

needs_extension = pytest.mark.skipif(not pk.has_extension(), reason="the compiled extension is not there")


def finding(name):
    return next(found for found in doctor.findings() if found.name == name)


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch):
    for name in ("PRUNEKERNELS_CACHE", "PRUNEKERNELS_ISA", "PRUNEKERNELS_NO_EXT"):
        monkeypatch.delenv(name, raising=False)


@needs_extension
def test_a_sound_installation(capsys, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    exists = pathlib.Path.exists
    monkeypatch.setattr(doctor.Path, "exists", lambda p: str(p) != "/proc/driver/nvidia" and exists(p))
    monkeypatch.setattr(doctor, "TESTED_TORCH", (extension.release(torch.__version__),))
    monkeypatch.setattr(doctor, "TESTED_PYTHON", (extension.release(platform.python_version()),))
    assert cli.main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"prunekernels {pk.__version__} in ") and said.endswith("nothing is wrong\n")
    assert f"ok    torch         {torch.__version__} in Python" in said
    assert f"built for {pk.build_info()['torch']}" in said and f"{pk.build_info()['isa']}, the best" in said


def test_json(capsys):
    status = cli.main(["doctor", "--json"])
    said = json.loads(capsys.readouterr().out)
    assert said["version"] == pk.__version__ and said["ok"] == (status == 0)
    assert [check["name"] for check in said["checks"]] == [
        "torch", "extension", "instructions", "threads", "CUDA", "plans", "optional",
    ]  # fmt: skip
    assert all(set(check) == {"name", "state", "found", "mend"} for check in said["checks"])
    assert said["ok"] == all(check["state"] in ("ok", "note") for check in said["checks"])


def test_something_wrong_gives_exit_code_1(monkeypatch, capsys):
    wrong = doctor.Finding("torch", "wrong", "is too old", "pip install torch")
    monkeypatch.setattr(doctor, "findings", lambda: [wrong])
    assert cli.main(["doctor"]) == 1
    said = capsys.readouterr().out.splitlines()[1:]
    assert said == [
        "wrong torch  is too old",
        "             -> pip install torch",
        "1 of 1 checks found something wrong",
    ]


def test_a_check_that_raises_is_a_finding(monkeypatch):
    def broken():
        raise RuntimeError("no such thing")

    monkeypatch.setattr(torch, "get_num_threads", broken)
    assert finding("threads") == doctor.Finding("threads", "wrong", "RuntimeError: no such thing")


# ---- torch and the extension


def test_torch_that_is_too_old(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.7.1+cpu")
    found = finding("torch")
    assert found.state == "wrong" and found.mend == 'pip install "torch>=2.8"'


@pytest.mark.parametrize(("torch_version", "python_version"), [("2.99.0+cpu", "3.11.7"), ("2.13.1", "3.99.0")])
def test_versions_that_were_not_tested(monkeypatch, torch_version, python_version):
    monkeypatch.setattr(torch, "__version__", torch_version)
    monkeypatch.setattr(platform, "python_version", lambda: python_version)
    found = finding("torch")
    assert found.state == "note" and not found.mend
    assert ("torch 2.99 was not tested, but 2.8, " in found.found) == (torch_version != "2.13.1")
    assert ("Python 3.99 was not tested, but 3.10, " in found.found) == (python_version != "3.11.7")


def test_versions_that_were_tested():
    """Those of the results file, which the table in the documentation shows."""
    rows = json.loads((ROOT / "wheels" / "versions.json").read_text())["rows"]
    for name, tested in (("torch", doctor.TESTED_TORCH), ("python", doctor.TESTED_PYTHON)):
        assert {extension.release(row[name]) for row in rows} == set(tested)


def test_an_extension_that_is_missing(monkeypatch):
    missing = extension.Missing("it was built for torch 2.0.0", '`pip install "torch==2.0.*"`')
    monkeypatch.setattr(extension, "missing", missing)
    found = finding("extension")
    assert found.state == "wrong" and "it was built for torch 2.0.0" in found.found and found.mend == missing.mend
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "no C++ compiler is on the PATH (Debian: apt-get install g++)" in finding("extension").found


def test_an_extension_that_is_not_wanted(monkeypatch):
    monkeypatch.setenv("PRUNEKERNELS_NO_EXT", "1")
    monkeypatch.setattr(extension, "missing", extension.Missing("PRUNEKERNELS_NO_EXT is set", "unset it"))
    assert finding("extension").state == "note"


@pytest.mark.slow
def test_without_the_extension():
    code = "from prunekernels import doctor; print([(f.name, f.state) for f in doctor.findings()][1:3])"
    done = python(code)
    assert done.stdout == "[('extension', 'note'), ('instructions', 'note')]\n", done.stderr


@needs_extension
def test_an_extension_of_an_older_source(monkeypatch):
    monkeypatch.setattr(extension, "outdated", ["gather_parts_"])
    found = finding("extension")
    assert found.state == "wrong" and found.found.endswith("is of an older source: without gather_parts_")
    assert found.mend == extension.build_command()


# ---- instructions and threads


@needs_extension
def test_instructions_that_are_capped(monkeypatch):
    extension.cap_isa("scalar")
    try:
        monkeypatch.setenv("PRUNEKERNELS_ISA", "scalar")
        found = finding("instructions")
        monkeypatch.delenv("PRUNEKERNELS_ISA")
        other = finding("instructions")
    finally:
        extension.cap_isa(None)
    if extension.cpu_isa() == "scalar":
        pytest.skip("this CPU has no other instructions")
    assert (found.state, found.mend) == ("note", "unset PRUNEKERNELS_ISA")
    assert found.found == f"scalar of {extension.cpu_isa()}: PRUNEKERNELS_ISA=scalar"
    assert other.found.endswith("the system does not permit more")


@needs_extension
def test_instructions_that_do_not_exist():
    code = "from prunekernels import doctor; print(*(f for f in doctor.findings() if f.name == 'instructions'))"
    done = python(code, PRUNEKERNELS_NO_EXT="", PRUNEKERNELS_ISA="sse9")
    assert "state='wrong'" in done.stdout and "got sse9" in done.stdout, done.stderr


@needs_extension
def test_the_cpu_has_what_is_used():
    order = ["scalar", "avx2", "avx512", "avx512vbmi2", "avx512bf16", "amx"]
    assert order.index(pk.build_info()["isa"]) <= order.index(extension.cpu_isa())


def test_more_threads_than_cores(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4096)
    found = finding("threads")
    assert found.state == "wrong" and found.mend.startswith("export OMP_NUM_THREADS=")


# ---- CUDA


class Gpu:
    """What torch.cuda tells of two GPUs."""

    def __init__(self, capability=(9, 0)):
        self.is_available = lambda: True
        self.device_count = lambda: 2
        self.get_device_name = lambda index: f"GPU {index}"
        self.get_device_capability = lambda index: capability


@pytest.mark.parametrize(
    ("built_for", "capability", "state", "text"),
    [
        ("13.0", (9, 0), "ok", "GPU 0, GPU 1; kernels for CUDA 13.0"),
        ("12.8", (9, 0), "wrong", "built for CUDA 12.8, torch has 13.0"),
        ("", (9, 0), "wrong", "this build has no CUDA kernels"),
        ("13.0", (7, 5), "note", "kernels are for compute capability 8.0 and later"),
    ],
)
def test_gpus(monkeypatch, built_for, capability, state, text):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch, "cuda", Gpu(capability))
    monkeypatch.setattr(extension, "build_info", lambda: {"cuda": built_for, "torch": "2.13.0", "isa": "avx2"})
    found = finding("CUDA")
    assert found.state == state and text in found.found
    assert (state == "wrong") == ("PRUNEKERNELS_CUDA=1" in found.mend)


@needs_extension
def test_a_gpu_without_kernels(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch, "cuda", Gpu((8, 0)))
    monkeypatch.setattr(extension, "build_info", lambda: {"cuda": "13.0", "torch": "2.13.0", "isa": "avx2"})
    monkeypatch.setattr(extension._C, "runs_on_gpu", lambda *capability: capability == (9, 0))
    found = finding("CUDA")
    assert found.state == "wrong" and "no kernel for compute capability 8.0" in found.found
    assert 'TORCH_CUDA_ARCH_LIST="8.0"' in found.mend


def test_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert finding("CUDA").state == "note" and "finds no GPU" in finding("CUDA").found


@pytest.mark.parametrize(("driver", "state"), [(True, "wrong"), (False, "note")])
def test_torch_without_cuda(monkeypatch, driver, state):
    monkeypatch.setattr(torch.version, "cuda", None)
    exists = pathlib.Path.exists
    monkeypatch.setattr(doctor.Path, "exists", lambda p: driver if str(p) == "/proc/driver/nvidia" else exists(p))
    assert finding("CUDA").state == state


# ---- plans and optional packages


def test_no_file_of_plans():
    assert finding("plans").state == "note" and finding("plans").mend.startswith("export PRUNEKERNELS_CACHE=")


@needs_extension
def test_a_file_of_plans(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "plans.json"
    monkeypatch.setenv("PRUNEKERNELS_CACHE", str(path))
    assert finding("plans") == doctor.Finding("plans", "ok", f"{path}: 0 plans of this machine and torch, 0 machines")
    path.parent.mkdir()
    entry = [[0] * extension._C.plan_key_words, "dense", []]
    machines = {plan_file.machine(): [entry, entry], "another": []}
    path.write_text(json.dumps({"format": plan_file.FORMAT, "version": plan_file.VERSION, "machines": machines}))
    assert "2 plans of this machine and torch, 2 machines" in finding("plans").found
    monkeypatch.setattr(doctor.os, "access", lambda *_: False)
    assert finding("plans").state == "wrong" and "cannot be written" in finding("plans").found


def test_a_damaged_file_of_plans(tmp_path, monkeypatch):
    path = tmp_path / "plans.json"
    path.write_text("{")
    monkeypatch.setenv("PRUNEKERNELS_CACHE", str(path))
    found = finding("plans")
    assert found.state == "wrong" and "expected a file of plans" in found.found and found.mend == f"rm {path}"


def test_optional_packages(monkeypatch):
    def version(name):
        if name in ("Pillow", "onnx"):
            raise importlib.metadata.PackageNotFoundError
        return "1.0"

    monkeypatch.setattr(importlib.metadata, "version", version)
    found = finding("optional")
    assert found.state == "note" and found.mend == 'pip install "prunekernels[cli,onnx]"'
    assert "no Pillow" in found.found and "matplotlib 1.0" in found.found
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.0")
    assert finding("optional").state == "ok" and not finding("optional").mend
