"""The main loops of the kernels with tensor-core products, and the committed table that they may not fall behind.

As a script: compares the kernels with loops.txt (--write: writes it). Part of make cuda-check.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import hashlib
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import sass

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import cuda_check

TABLE = Path(__file__).with_name("loops.txt")
BUILD = cuda_check.BUILD.parent / "cuda-model"
HEAD = """\
# Main loops of the kernels with tensor-core products, for sm_90a: instructions, products among them, registers.
# make cuda-check fails where a kernel does worse; `python csrc/cuda/model/loops.py --write` writes this anew.
"""


@dataclasses.dataclass(frozen=True)
class Kernel:
    loop: Counter[str]  # the instructions of its main loop by kind
    registers: int

    @property
    def per_product(self) -> float:
        return self.loop.total() / sass.products(self.loop)


Kernels = dict[str, Kernel]  # by name and template arguments: "igemm_fwd_kernel<BFloat16, BlockTile<...>, true>"


def of_file(source: Path, nvcc: str, nvdisasm: str) -> Kernels:
    """The kernels of a file, compiled if it has changed."""
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    contents = hashlib.sha256(version.encode())
    for path in cuda_check.included(source):
        contents.update(path.read_bytes())
    kept = [BUILD / f"{source.stem}-{contents.hexdigest()[:16]}.{kind}" for kind in ("sass", "log")]
    if not all(path.exists() for path in kept):
        BUILD.mkdir(parents=True, exist_ok=True)
        for old in BUILD.glob(f"{source.stem}-*"):
            old.unlink()
        made = sass.disassembled(nvcc, nvdisasm, source, cuda_check.CSRC, BUILD / f"{source.stem}.cubin")
        for path, text in zip(kept, made, strict=True):
            path.write_text(text)
    codes, log = sass.parse(kept[0].read_text()), cuda_check.parse_ptxas(kept[1].read_text())
    registers = {each.name: each.registers for each in log}
    found: Kernels = {}
    for code, signature in zip(codes, cuda_check.demangled([code.name for code in codes]), strict=True):
        loop = code.main_loop()
        if loop is not None:
            name, arguments = cuda_check.split_signature(signature)
            full = name + (f"<{', '.join(arguments)}>" if arguments else "")
            found[full] = Kernel(loop, registers.get(code.name, 0))
    return found


def compiled(toolkit: Path, nvdisasm: str, names: Iterable[str] | None = None) -> Kernels:
    """The kernels of some files (None: of all that have tensor-core products)."""
    nvcc, folder = str(toolkit / "bin" / "nvcc"), cuda_check.CSRC / "cuda" / "kernels"
    sources = sorted(folder.glob("*.cu"))
    if names is None:
        sources = [path for path in sources if path.stem.startswith(("igemm", "block_sparse"))]
    else:
        sources = [path for path in sources if path.stem in set(names)]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        each = pool.map(lambda source: of_file(source, nvcc, nvdisasm), sources)
        return {name: kernel for found in each for name, kernel in found.items()}


def with_products(kernels: Mapping[str, Kernel]) -> Kernels:
    return {name: kernel for name, kernel in sorted(kernels.items()) if sass.products(kernel.loop)}


def release(nvcc: str) -> str:
    """ "13.0": another compiler makes other loops."""
    told = re.search(r"release ([\d.]+)", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout)
    return told[1] if told else "unknown"


def table(kernels: Mapping[str, Kernel], made_by: str) -> str:
    rows = [
        f"{k.loop.total()} {sass.products(k.loop)} {k.registers} {name}\n" for name, k in with_products(kernels).items()
    ]
    return f"{HEAD}# nvcc {made_by}\n" + "".join(rows)


def read_table(text: str) -> dict[str, tuple[float, int]]:
    """By kernel: instructions for each product, and registers."""
    found = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            instructions, products, registers, name = line.split(" ", 3)
            found[name] = int(instructions) / int(products), int(registers)
    return found


def problems(kernels: Mapping[str, Kernel], known: Mapping[str, tuple[float, int]]) -> list[str]:
    """What is worse than in the table, and what the table lacks or has too much."""
    ours, found = with_products(kernels), []
    for name, kernel in ours.items():
        if name not in known:
            found.append(f"{name}: not in loops.txt")
            continue
        each, registers = known[name]
        if kernel.per_product > each + 1e-9:
            found.append(f"{name}: {kernel.per_product:.2f} instructions a product, {each:.2f} in loops.txt")
        if kernel.registers > registers:
            found.append(f"{name}: {kernel.registers} registers, {registers} in loops.txt")
    return found + [f"{name}: in loops.txt, but not compiled" for name in sorted(known.keys() - ours.keys())]


def tools() -> tuple[Path, str] | str:
    """The toolkit and nvdisasm; a text: what is missing."""
    toolkit = cuda_check.find_toolkit()
    if toolkit is None:
        return "nvcc (CUDA_HOME, PATH, /usr/local/cuda)"
    nvdisasm = sass.find_nvdisasm(toolkit)
    return (toolkit, nvdisasm) if nvdisasm else "nvdisasm (pip install nvidia-cuda-nvdisasm)"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="write loops.txt")
    asked, found = parser.parse_args(), tools()
    if isinstance(found, str):
        print(f"main loops: skipped: {found} cannot be found")
        return 0
    kernels, compiler = compiled(*found), release(str(found[0] / "bin" / "nvcc"))
    if asked.write:
        TABLE.write_text(table(kernels, compiler))
    if f"# nvcc {compiler}\n" not in TABLE.read_text():
        print(f"main loops: not compared: loops.txt is of another nvcc than {compiler}")
        return 0
    worse = problems(kernels, read_table(TABLE.read_text()))
    print(f"main loops: {len(with_products(kernels))} kernels with products, {len(worse)} worse than loops.txt")
    for problem in worse:
        print(f"main loops: {problem}")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
