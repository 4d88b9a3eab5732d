"""What machine code says of a kernel: the instructions of its main loop, by kind.

Kernels are compiled for sm_90a and read with nvdisasm (of a CUDA toolkit, or of the package nvidia-cuda-nvdisasm). The
main loop is the shortest loop that has the most products of tensor cores; of a kernel without such products, the most
FFMA, or else the most accesses to global memory.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
import sysconfig
from collections import Counter
from pathlib import Path

KINDS = {  # the first part of an instruction's name -> what it counts as
    "HMMA": "mma", "IMMA": "mma", "HGMMA": "warpgroup mma", "FFMA": "ffma", "FMUL": "ffma", "FADD": "ffma",
    "LDSM": "ldmatrix", "LDS": "shared load", "STS": "shared store", "LDGSTS": "async copy",
    "LDG": "global load", "STG": "global store", "LDL": "spill", "STL": "spill",
    "BRA": "branch", "BSSY": "branch", "BSYNC": "branch", "BAR": "barrier", "WARPSYNC": "barrier",
}  # fmt: skip


def find_nvdisasm(toolkit: Path | None) -> str | None:
    """nvdisasm from PATH, the toolkit, or the Python package that carries it."""
    packages = Path(sysconfig.get_paths()["purelib"])
    candidates = [toolkit / "bin" / "nvdisasm"] if toolkit else []
    candidates += sorted(packages.glob("nvidia/cu*/bin/nvdisasm"))
    return shutil.which("nvdisasm") or next((str(path) for path in candidates if path.exists()), None)


@dataclasses.dataclass
class Code:
    """A kernel's machine code: its instructions in order, and where labels stand among them."""

    name: str  # of the kernel, mangled
    instructions: list[str]  # without predicates: "HMMA.16816.F32 R8, R80, R36, R8"
    labels: dict[str, int]  # label -> number of the instruction behind it

    def loops(self) -> list[range]:
        """The stretches that end in a jump back to their beginning."""
        found = []
        for at, text in enumerate(self.instructions):
            jump = re.match(r"BRA\b.*\((\.L_x_\d+)\)", text)
            if jump and (begin := self.labels.get(jump[1], at + 1)) <= at:
                found.append(range(begin, at + 1))
        return found

    def kinds(self, part: range) -> Counter[str]:
        return Counter(KINDS.get(_stem(self.instructions[i]), "other") for i in part)

    def main_loop(self) -> Counter[str] | None:
        """The instructions of the main loop by kind; None: there is no loop."""
        counted = [(loop, self.kinds(loop)) for loop in self.loops()]
        sums = 16  # a loop with fewer FFMA does not multiply matrices
        by_use = [(products(k), k["ffma"] * (k["ffma"] >= sums), k["global load"] + k["global store"], -len(loop), k)
                  for loop, k in counted]  # fmt: skip
        return max(by_use, key=lambda entry: entry[:4])[4] if by_use else None


def products(kinds: Counter[str]) -> int:
    """Tensor-core products of m16n8k16 that one warp's instructions make: its part of a warpgroup's is 16 of them."""
    return kinds["mma"] + 16 * kinds["warpgroup mma"]


def _stem(instruction: str) -> str:
    return re.split(r"[.\s]", instruction, maxsplit=1)[0]


def parse(text: str) -> list[Code]:
    """The kernels in the output of nvdisasm -c."""
    found: list[Code] = []
    for line in text.splitlines():
        if section := re.match(r"\s*\.section\s+\.text\.(\S+?),", line):
            found.append(Code(section[1], [], {}))
        elif not found:
            continue
        elif label := re.match(r"(\.L_x_\d+):", line):
            found[-1].labels[label[1]] = len(found[-1].instructions)
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([^;]+?)\s*;", line):
            found[-1].instructions.append(instruction[1])
    return found


def disassembled(nvcc: str, nvdisasm: str, source: Path, csrc: Path, cubin: Path) -> tuple[str, str]:
    """Compiles a kernel file for sm_90a. Returns its machine code as text, and what ptxas says of registers."""
    flags = ["-std=c++17", "-O3", f"-I{csrc}", "-arch=sm_90a", "-Xptxas", "-v", "-cubin", "-o", str(cubin)]
    done = subprocess.run([nvcc, *flags, str(source)], check=True, capture_output=True, text=True)
    text = subprocess.run([nvdisasm, "-c", str(cubin)], check=True, capture_output=True, text=True).stdout
    return text, done.stdout + done.stderr
