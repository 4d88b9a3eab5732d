"""make cuda-check: compiles every kernel for the architectures below with nvcc, and the device implementation in
csrc/cuda/*.cpp against the headers of torch (a CPU build of torch will do). Needs no GPU. Prints registers, shared
memory, stack and spills of each kernel.

Fails on a stack frame or a spill, on products of warpgroups that ptxas does not let run on their own, on a kernel that
no row of kernel_table.inc names, on a row without a kernel, and on compiler errors. Files that have not changed since
they last passed are not compiled again (build/cuda-check).
"""

import argparse
import concurrent.futures
import dataclasses
import hashlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

CSRC = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(CSRC))

from find_toolkit import find_toolkit  # noqa: E402

BUILD = CSRC.parent / "build" / "cuda-check"
CXX = os.environ.get("CXX", "g++")
ARCHITECTURES = ("80", "90a", "100")
SERIALIZED = "wgmma.mma_async instructions are serialized"  # as ptxas says it
ELEMENTS = {  # a kernel's template argument -> what kernel_table.inc calls it
    "float": "f32", "BFloat16": "bf16", "Half": "f16", "Tf32": "tf32",
    "unsigned short": "b16", "unsigned int": "b32", "unsigned long": "b64", "unsigned long long": "b64",
}  # fmt: skip

# Headers that torch's CUDA headers include, but that are missing from a CPU build of torch, or from a toolkit without
# the maths libraries. They declare names only: nothing that is compiled here runs.
STAND_INS = {
    "c10/cuda/impl/cuda_cmake_macros.h": "#define C10_CUDA_BUILD_SHARED_LIBS",
    "cublas_v2.h": "typedef struct cublasContext* cublasHandle_t; enum cublasStatus_t : int;",
    "cublasLt.h": "typedef struct cublasLtContext* cublasLtHandle_t;",
    "cusparse.h": "typedef struct cusparseContext* cusparseHandle_t; enum cusparseStatus_t : int;",
    "cusolver_common.h": "enum cusolverStatus_t : int;",
    "cusolverDn.h": "#include <cusolver_common.h>\ntypedef struct cusolverDnContext* cusolverDnHandle_t;",
}


# ---- reading the output of ptxas


@dataclasses.dataclass
class Kernel:
    name: str  # as mangled; then `gather_channels_pixels_kernel`
    arch: str
    registers: int = 0
    shared: int = 0
    stack: int = 0
    spilled: int = 0
    arguments: tuple[str, ...] = ()  # of its template

    @property
    def element(self) -> str | None:
        return next((ELEMENTS[a] for a in self.arguments if a in ELEMENTS), None)

    def __str__(self):
        return self.name + (f"<{', '.join(self.arguments)}>" if self.arguments else "")


def parse_ptxas(log: str) -> list[Kernel]:
    kernels: list[Kernel] = []
    for line in log.splitlines():
        if entry := re.search(r"Compiling entry function '(\S+)' for '(\w+)'", line):
            kernels.append(Kernel(*entry.groups()))
        elif not kernels:
            continue
        elif frame := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            stack, stores, loads = map(int, frame.groups())
            kernels[-1].stack = max(kernels[-1].stack, stack)  # functions that were not inlined follow their kernel
            kernels[-1].spilled += stores + loads
        elif used := re.search(r"Used (\d+) registers", line):
            kernels[-1].registers = int(used[1])
            shared = re.search(r"(\d+) bytes smem", line)
            kernels[-1].shared = int(shared[1]) if shared else 0
    return kernels


def split_signature(signature: str) -> tuple[str, tuple[str, ...]]:
    """A demangled function -> its name and template arguments, both without the namespaces of this project."""
    signature = re.sub(r"\b(prunekernels|\(anonymous namespace\))::|\(anonymous namespace\)::", "", signature)
    head = re.match(r"(?:void )?(\w+)", signature)
    if not head:
        return signature, ()
    arguments, depth = [""], 0
    for letter in signature[head.end() :]:
        if letter == ">" and depth == 1:
            return head[1], tuple(map(str.strip, arguments))
        depth += (letter == "<") - (letter == ">")
        if depth == 0:
            break
        if letter == "," and depth == 1:
            arguments.append("")
        elif not (letter == "<" and depth == 1):
            arguments[-1] += letter
    return head[1], ()


def demangled(names: list[str]) -> list[str]:
    program = shutil.which("c++filt") or shutil.which("cu++filt")
    if not program:
        sys.exit("cuda-check: neither c++filt nor cu++filt can be found")
    return subprocess.run([program], input="\n".join(names), text=True, capture_output=True).stdout.splitlines()


# ---- finding problems


@dataclasses.dataclass(frozen=True)
class Row:
    operation: str
    element: str
    arch: str

    def __str__(self):
        return f"PK_CUDA({self.operation}, {self.element}, {self.arch})"


def table_rows(text: str) -> list[Row]:
    return [Row(*row) for row in re.findall(r"^PK_CUDA\((\w+), (\w+), (\w+)\)", text, re.MULTILINE)]


def operation_of(name: str, rows: list[Row]) -> str | None:
    """The longest operation in rows that the kernel's name begins with."""
    found = [row.operation for row in rows if name.startswith(f"{row.operation}_")]
    return max(found, key=len, default=None)


def number(arch: str) -> int:
    return int(re.sub(r"\D", "", arch))


def problems(kernels: list[Kernel], rows: list[Row]) -> list[str]:
    found = [f"{k} ({k.arch}): {k.stack} bytes of stack" for k in kernels if k.stack]
    found += [f"{k} ({k.arch}): {k.spilled} bytes spilled" for k in kernels if k.spilled]
    compiled: dict[tuple[str, str], set[str]] = {}  # operation, architecture -> elements
    for kernel in kernels:
        operation = operation_of(kernel.name, rows)
        if operation is None:
            found.append(f"{kernel.name}: no PK_CUDA row names an operation that its name begins with")
        else:
            compiled.setdefault((operation, kernel.arch), set()).update({kernel.element} - {None})
    for row in rows:
        for arch in sorted({k.arch for k in kernels if number(k.arch) >= number(row.arch)}, key=number):
            elements = compiled.get((row.operation, arch))
            # if no kernel of the operation has an element type among its template arguments, they are of floats
            if elements is None or row.element not in (elements or {"f32"}):
                found.append(f"{row}: no such kernel is compiled for {arch}")
    return list(dict.fromkeys(found))


def table(kernels: list[Kernel], each_variant: bool) -> list[str]:
    """One line for each kernel and element (or template instance), with the largest numbers of its variants."""
    archs = sorted({k.arch for k in kernels}, key=number)
    merged: dict[tuple[str, str], list[Kernel]] = {}
    for kernel in kernels:
        name = str(kernel) if each_variant else kernel.name
        merged.setdefault((name, kernel.element or "-"), []).append(kernel)
    lines = [["kernel", "element", "variants", *archs, "shared", "stack", "spills"]]
    for (name, element), group in sorted(merged.items()):
        registers = [str(max((k.registers for k in group if k.arch == a), default="-")) for a in archs]
        most = [str(max(getattr(k, what) for k in group)) for what in ("shared", "stack", "spilled")]
        lines.append([name, element, str(len({str(k) for k in group})), *registers, *most])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    justify = [str.ljust, str.ljust] + [str.rjust] * (len(widths) - 2)
    return ["  ".join(j(c, w) for j, c, w in zip(justify, line, widths, strict=True)) for line in lines]


# ---- compiling what changed


def included(source: Path) -> list[Path]:
    """The source and all files of csrc that it includes, directly or not."""
    found = [source]
    for path in found:  # grows meanwhile
        names = re.findall(r'^\s*#\s*include "([^"]+)"', path.read_text(), re.MULTILINE)
        found += [p for name in names if (p := CSRC / name).exists() and p not in found]
    return found


@dataclasses.dataclass
class Job:
    source: Path
    command: list[str]
    log: str = ""
    failed: bool = False
    seconds: float = 0.0  # 0: nothing had changed

    def run(self, compiler_version: str) -> "Job":
        contents = hashlib.sha256(f"{compiler_version}\n{shlex.join(self.command)}".encode())
        for path in included(self.source):
            contents.update(path.read_bytes())
        kept = BUILD / f"{self.source.name}.log"
        head = f"{contents.hexdigest()}\n"
        if kept.exists() and kept.read_text().startswith(head):
            self.log = kept.read_text().removeprefix(head)
            return self
        started = time.monotonic()
        done = subprocess.run(self.command, capture_output=True, text=True)
        self.log, self.failed = done.stdout + done.stderr, done.returncode != 0
        self.seconds = time.monotonic() - started
        print(f"{self.seconds:5.1f} s  {self.source.relative_to(CSRC.parent)}", flush=True)
        if not self.failed:
            kept.write_text(head + self.log)
        return self


def kernel_jobs(toolkit: Path) -> list[Job]:
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    flags = ["-std=c++17", "-O3", f"-I{CSRC}", *targets, "-Xptxas", "-v", "-fatbin", "-o", os.devnull]
    nvcc = str(toolkit / "bin" / "nvcc")
    return [Job(source, [nvcc, *flags, str(source)]) for source in sorted((CSRC / "cuda" / "kernels").glob("*.cu"))]


def instructions_job(toolkit: Path) -> Job:
    """The library that a test has nvcc compile on a GPU machine; no kernel of the table."""
    source = CSRC / "cuda" / "emulator" / "instructions.cu"
    flags = ["-std=c++17", f"-I{CSRC}", "-gencode=arch=compute_90a,code=sm_90a", "-fatbin", "-o", os.devnull]
    return Job(source, [str(toolkit / "bin" / "nvcc"), *flags, str(source)])


def host_jobs(toolkit: Path, python_torch: Path) -> list[Job]:
    include = BUILD / "include"
    torch = [python_torch / "include", python_torch / "include/torch/csrc/api/include"]
    for name, text in STAND_INS.items():
        path = include / name
        if not any((folder / name).exists() for folder in (*torch, toolkit / "include")):
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists() or path.read_text() != f"#pragma once\n{text}\n":
                path.write_text(f"#pragma once\n{text}\n")
        else:
            path.unlink(missing_ok=True)
    system = [*torch, toolkit / "include", include, Path(sysconfig.get_paths()["include"])]
    flags = ["-std=c++20", "-fsyntax-only", "-Wall", '-DPRUNEKERNELS_WITH_CUDA="check"', f"-I{CSRC}"]
    command = [CXX, *flags, *(f"-isystem{folder}" for folder in system)]
    return [Job(source, [*command, str(source)]) for source in sorted((CSRC / "cuda").glob("*.cpp"))]


def find_torch() -> Path | None:
    spec = importlib.util.find_spec("torch")
    return Path(next(iter(spec.submodule_search_locations or []))) if spec else None


def compile_changed(toolkit: Path, torch: Path) -> tuple[list[Job], list[Job]]:
    """The jobs of the kernels and of the device implementation, done."""
    BUILD.mkdir(parents=True, exist_ok=True)
    kernels, host = kernel_jobs(toolkit), [*host_jobs(toolkit, torch), instructions_job(toolkit)]
    versions = [
        subprocess.run([program, "--version"], capture_output=True, text=True).stdout
        for program in (str(toolkit / "bin" / "nvcc"), CXX)
    ]
    key = "".join(versions) + (torch / "version.py").read_text()
    longest_first = sorted(kernels + host, key=lambda job: -sum(p.stat().st_size for p in included(job.source)))
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda job: job.run(key), longest_first))
    return kernels, host


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--require", action="store_true", help="fail where nvcc or torch cannot be found")
    parser.add_argument("--all", action="store_true", help="a line for each template instance")
    asked = parser.parse_args()
    started = time.monotonic()
    toolkit, torch = find_toolkit(), find_torch()
    if not toolkit or not torch:
        missing = "torch" if toolkit else "nvcc (CUDA_HOME, PATH, /usr/local/cuda)"
        print(f"cuda-check: {'failed' if asked.require else 'skipped'}: {missing} cannot be found")
        return 1 if asked.require else 0

    kernel_files, host_files = compile_changed(toolkit, torch)
    jobs = kernel_files + host_files
    for job in jobs:
        if job.failed or "warning" in job.log:
            print(job.log)
    kernels = [k for job in kernel_files if not job.failed for k in parse_ptxas(job.log)]
    for kernel, signature in zip(kernels, demangled([k.name for k in kernels]), strict=True):
        kernel.name, kernel.arguments = split_signature(signature)
    print("Registers by architecture; bytes of static shared memory, stack frames and spills.")
    print(*table(kernels, asked.all), sep="\n")
    compiled = sum(job.seconds > 0 for job in jobs)
    print(f"\n{len(kernel_files)} kernel files, {len(host_files)} host files; {compiled} compiled, ", end="")
    print(f"{time.monotonic() - started:.1f} s")
    found = [f"{job.source.relative_to(CSRC.parent)} does not compile" for job in jobs if job.failed]
    found += [f"{job.source.name}: ptxas waits for each wgmma: {SERIALIZED}" for job in jobs if SERIALIZED in job.log]
    if not any(job.failed for job in kernel_files):  # else rows miss their kernels
        found += problems(kernels, table_rows((CSRC / "kernel_table.inc").read_text()))
    for problem in found:
        print(f"cuda-check: {problem}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
