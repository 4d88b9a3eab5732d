"""make cuda-check: what it reads from the output of ptxas, and what it reports as a problem."""

import importlib.util
import pathlib
import sys

import pytest

PATH = pathlib.Path(__file__).parents[2] / "csrc" / "cuda" / "cuda_check.py"
spec = importlib.util.spec_from_file_location("cuda_check", PATH)
cuda_check = importlib.util.module_from_spec(spec)
sys.modules["cuda_check"] = cuda_check  # dataclasses look their module up
spec.loader.exec_module(cuda_check)

LOG = """\
ptxas info    : 0 bytes gmem, 8 bytes cmem[4]
ptxas info    : Compiling entry function '_Z10add_kernelIfEvPT_' for 'sm_80'
ptxas info    : Function properties for _Z10add_kernelIfEvPT_
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 1024 bytes smem, 4320 bytes cmem[0]
ptxas info    : Compile time = 12.000 ms
ptxas info    : Compiling entry function '_Z10add_kernelIfEvPT_' for 'sm_90a'
ptxas info    : Function properties for _Z10add_kernelIfEvPT_
    24 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers
ptxas info    : Function properties for _ZN4core4slowEv
    64 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads
"""
Kernel, Row = cuda_check.Kernel, cuda_check.Row
ADD = [Row("add", "f32", "sm80"), Row("add", "bf16", "sm80")]


def kernel(name="add_kernel", arguments=("float",), arch="sm_80", **more):
    return Kernel(name, arch, arguments=arguments, **more)


def both(**more):
    return [kernel(arguments=("float",), **more), kernel(arguments=("BFloat16",), **more)]


def test_numbers_of_ptxas():
    first, second = cuda_check.parse_ptxas(LOG)
    assert first == Kernel("_Z10add_kernelIfEvPT_", "sm_80", registers=32, shared=1024)
    # the function that was not inlined counts for the kernel before it
    assert second == Kernel("_Z10add_kernelIfEvPT_", "sm_90a", registers=255, stack=64, spilled=28)


@pytest.mark.parametrize(
    ("signature", "name", "arguments"),
    [
        ("void prunekernels::(anonymous namespace)::add_kernel<float>(float*)", "add_kernel", ("float",)),
        ("prunekernels::add_finish_kernel(prunekernels::Batch<int>)", "add_finish_kernel", ()),
        (
            "void prunekernels::(anonymous namespace)::mul_kernel<prunekernels::BFloat16, (int)8, "
            "prunekernels::Tile<2, 4> >(prunekernels::Batch<int>, bool)",
            "mul_kernel",
            ("BFloat16", "(int)8", "Tile<2, 4>"),
        ),
    ],
)
def test_signature(signature, name, arguments):
    assert cuda_check.split_signature(signature) == (name, arguments)


@pytest.mark.parametrize(
    ("arguments", "element"),
    [
        (("Half", "4"), "f16"),
        (("unsigned short",), "b16"),
        (("unsigned long",), "b64"),
        (("Tile<float>", "Tf32"), "tf32"),
        (("3", "true"), None),
    ],
)
def test_element(arguments, element):
    assert kernel(arguments=arguments).element == element


def test_rows_of_the_table():
    text = "//   PK_CUDA(operation, element, arch)   a comment\n#define PK_CUDA(a, b, c)\nPK_CUDA(add, f32, sm80)\n"
    assert cuda_check.table_rows(text) == [Row("add", "f32", "sm80")]


def test_longest_operation_wins():
    rows = [Row("add", "f32", "sm80"), Row("add_up", "f32", "sm80")]
    assert cuda_check.operation_of("add_up_finish_kernel", rows) == "add_up"
    assert cuda_check.operation_of("add_kernel", rows) == "add"
    assert cuda_check.operation_of("addition_kernel", rows) is None


def test_nothing_wrong():
    assert cuda_check.problems([*both(), *both(arch="sm_100"), kernel("add_finish_kernel", ())], ADD) == []


@pytest.mark.parametrize(
    ("kernels", "problem"),
    [
        (both(stack=8), "add_kernel<float> (sm_80): 8 bytes of stack"),
        (both(spilled=4), "add_kernel<BFloat16> (sm_80): 4 bytes spilled"),
        ([*both(), kernel("sub_kernel")], "sub_kernel: no PK_CUDA row names an operation that its name begins with"),
        ([kernel()], "PK_CUDA(add, bf16, sm80): no such kernel is compiled for sm_80"),
        ([*both(), kernel(arch="sm_100")], "PK_CUDA(add, bf16, sm80): no such kernel is compiled for sm_100"),
    ],
)
def test_what_is_wrong(kernels, problem):
    assert problem in cuda_check.problems(kernels, ADD)


def test_rows_of_later_architectures():
    later = [Row("add", "f32", "sm90")]
    assert cuda_check.problems([kernel(arch="sm_90a"), kernel("add_other_kernel", ("Half",), "sm_80")], later) == []


def test_kernels_without_a_type_are_of_floats():
    plain = [kernel(arguments=("3", "3"))]
    assert cuda_check.problems(plain, [Row("add", "f32", "sm80")]) == []
    assert len(cuda_check.problems(plain, [Row("add", "bf16", "sm80")])) == 1
    assert len(cuda_check.problems([*plain, kernel(arguments=("Half",))], [Row("add", "f32", "sm80")])) == 1


def test_table():
    kernels = [kernel(arguments=("float", "1"), registers=30), kernel(arguments=("float", "2"), registers=40, stack=8)]
    kernels.append(kernel(arguments=("float", "1"), arch="sm_100", registers=20))
    head, line = (x.split() for x in cuda_check.table(kernels, each_variant=False))
    assert head == ["kernel", "element", "variants", "sm_80", "sm_100", "shared", "stack", "spills"]
    assert line == ["add_kernel", "f32", "2", "40", "20", "0", "8", "0"]
    assert [x.split()[-4] for x in cuda_check.table(kernels, each_variant=True)] == ["sm_100", "20", "-"]


@pytest.mark.parametrize(("arguments", "status", "word"), [([], 0, "skipped"), (["--require"], 1, "failed")])
def test_without_nvcc(monkeypatch, capsys, arguments, status, word):
    monkeypatch.setattr(cuda_check, "find_toolkit", lambda: None)
    monkeypatch.setattr(sys, "argv", ["cuda_check.py", *arguments])
    assert cuda_check.main() == status
    assert f"{word}: nvcc" in capsys.readouterr().out


def test_the_toolkit_of_a_wrapper(monkeypatch, tmp_path):
    """nvcc may be a script in a folder without headers; it tells where the toolkit is."""
    toolkit, folder = tmp_path / "cuda", tmp_path / "bin"
    for path in (toolkit / "include", toolkit / "bin", folder):
        path.mkdir(parents=True)
    (folder / "nvcc").write_text(f"#!/bin/sh\necho '#$ TOP={toolkit}' >&2\n")
    (folder / "nvcc").chmod(0o755)
    monkeypatch.setattr(cuda_check.find_toolkit.__globals__["shutil"], "which", lambda name, path=None: (
        str(folder / name) if path in (None, str(folder)) else None
    ))  # fmt: skip
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    assert cuda_check.find_toolkit() is None
    (toolkit / "include" / "cuda_runtime.h").touch()
    assert cuda_check.find_toolkit() == toolkit
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "elsewhere"))
    assert cuda_check.find_toolkit() == toolkit


def test_included(monkeypatch, tmp_path):
    monkeypatch.setattr(cuda_check, "CSRC", tmp_path)
    for name, text in {
        "a.cu": '#include "b.h"\n#include <c.h>',
        "b.h": '  #include "d.h"',
        "c.h": "",
        "d.h": '#include "b.h"',
    }.items():
        (tmp_path / name).write_text(text)
    assert cuda_check.included(tmp_path / "a.cu") == [tmp_path / name for name in ("a.cu", "b.h", "d.h")]


def test_only_what_changed_is_compiled(monkeypatch, tmp_path):
    monkeypatch.setattr(cuda_check, "CSRC", tmp_path)
    monkeypatch.setattr(cuda_check, "BUILD", tmp_path)
    source, ran = tmp_path / "a.cu", tmp_path / "ran"
    source.write_text("one")

    def run(program: str) -> cuda_check.Job:
        return cuda_check.Job(source, [sys.executable, "-c", program]).run("version")

    works = f"print(len(open({str(ran)!r}, 'a').write('x') * 'told'))"
    assert [run(works).log for _ in range(2)] == ["4\n", "4\n"] and ran.read_text() == "x"
    source.write_text("two")
    assert run(works).log == "4\n" and ran.read_text() == "xx"
    assert [run("raise SystemExit(1)").failed for _ in range(2)] == [True, True]
