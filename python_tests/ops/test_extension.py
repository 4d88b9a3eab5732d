"""What an import says that finds no extension, or one that does not fit."""

import pathlib
import shutil
import subprocess
import sys

import pytest
import torch

import prunekernels as pk
from cases.without_extension import python
from prunekernels.ops import extension

PACKAGE = pathlib.Path(pk.__file__).parent
SCRIPT = """
import sys
sys.path.insert(1, {site!r})  # where pip puts packages; the script's own directory comes first
import prunekernels as pk
print(pk.has_extension(), pk.__file__)
"""


@pytest.fixture
def checkout(tmp_path):
    """A source tree that is not built, with a script in its root."""
    root = tmp_path / "checkout"
    shutil.copytree(PACKAGE, root / "prunekernels", ignore=shutil.ignore_patterns("_C*", "__pycache__"))
    (root / "setup.py").touch()
    return root


def install(site, extension="_C.abi3.so"):
    """What pip leaves in site-packages, as far as an import looks at it."""
    (site / "prunekernels").mkdir(parents=True)
    (site / "prunekernels" / extension).touch()
    (site / "prunekernels-0.1.0.dist-info").mkdir()
    (site / "prunekernels-0.1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: prunekernels\n")


def run(root, site):
    """The script's output and what it warned of. Without editable installs, which have an importer of their own."""
    (root / "script.py").write_text(SCRIPT.format(site=str(site)))
    finders = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in str(f).lower()]; "
    run_path = "import runpy; sys.path[0] = '.'; runpy.run_path('script.py')"
    command = [sys.executable, "-c", finders + run_path]
    env = {"PATH": "", "PYTHONPATH": "", "PRUNEKERNELS_NO_EXT": ""}
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("prunekernels: the compiled extension is not in use") == 1
    return done.stdout, done.stderr


def test_a_script_in_the_root_of_a_checkout(checkout, tmp_path):
    install(tmp_path / "site")
    out, warned = run(checkout, tmp_path / "site")
    assert out.startswith("False ") and str(checkout) in out
    assert f"Python found the source tree {checkout}, in which it is not built" in warned
    assert "`python setup.py build_ext --inplace` there builds it" in warned
    assert f"from another directory Python finds the installed package {tmp_path / 'site' / 'prunekernels'}" in warned
    assert "circular" not in warned and "No module named" not in warned


def test_a_checkout_and_no_installed_package(checkout, tmp_path):
    warned = run(checkout, tmp_path / "site")[1]
    assert "in which it is not built: `python setup.py build_ext --inplace` there builds it);" in warned


def test_an_installed_package_without_the_extension(checkout, tmp_path):
    (checkout / "setup.py").unlink()
    warned = run(checkout, tmp_path / "site")[1]
    assert f"{checkout / 'prunekernels'} is without it, as the wheel for any machine is: `pip install " in warned
    assert "--no-build-isolation --no-binary prunekernels prunekernels` where there is a C++ compiler" in warned


def test_an_extension_that_does_not_load(checkout, tmp_path):
    (checkout / "prunekernels" / "_C.abi3.so").write_text("not a library")
    warned = run(checkout, tmp_path / "site")[1]
    assert "if it was built for another version of torch, build it again" in warned


def test_an_extension_for_another_torch(checkout, tmp_path):
    """It is not even loaded: torch keeps no ABI, so what it registers might stop the process."""
    content = b"\x7fELF, in which stands: prunekernels built for torch=1.13.0+cpu\0"
    (checkout / "prunekernels" / "_C.abi3.so").write_bytes(content)
    out, warned = run(checkout, tmp_path / "site")
    assert out.startswith("False ")
    assert f"it was built for torch 1.13.0+cpu, and this is torch {torch.__version__}: " in warned
    assert f'`pip install "torch==1.13.*"`, or `cd {checkout} && python setup.py build_ext --inplace`' in warned
    (checkout / "setup.py").unlink()
    warned = run(checkout, tmp_path / "site")[1]
    assert "or `pip install --force-reinstall --no-deps --no-build-isolation --no-binary prunekernels" in warned


@pytest.mark.skipif(not pk.has_extension(), reason="the compiled extension is not there")
def test_an_extension_says_which_torch_it_is_for():
    assert extension.torch_of(pathlib.Path(extension._C.__file__)) == pk.build_info()["torch"]
    assert extension.release(pk.build_info()["torch"]) == extension.release(torch.__version__)


@pytest.mark.parametrize(
    ("version", "release"),
    [("2.13.0", "2.13"), ("2.13.1+cpu", "2.13"), ("2.14.0.dev20261101+cu130", "2.14"), ("2.13.0a0+git1", "2.13")],
)
def test_the_release_of_a_version(version, release):
    assert extension.release(version) == release


def test_an_extension_of_another_tree(checkout, tmp_path):
    """As where an editable install of one checkout meets a script in the root of another."""
    other = tmp_path / "other"
    other.mkdir()
    (other / "_C.abi3.so").write_text("not a library")
    package = checkout / "prunekernels" / "__init__.py"
    package.write_text(f"__path__.append({str(other)!r})\n" + package.read_text())
    warned = run(checkout, tmp_path / "site")[1]
    assert f"the one in {other / '_C.abi3.so'} is of another tree than {checkout / 'prunekernels'}" in warned


NEWER = """
import torch
from prunekernels.ops import extension

def halve_(xs):
    for x in xs:
        x.mul_(0.5)

extension.register(("halve_(Tensor(a!)[] xs) -> ()",), (halve_,))
x = torch.ones(3)
extension.ops.halve_([x])
print(x.tolist())
"""


@pytest.mark.slow
@pytest.mark.parametrize("without", ["", "1"])
def test_an_operator_that_the_extension_does_not_have(without):
    """As one built from an older source: pure torch takes its place."""
    done = python(NEWER, PRUNEKERNELS_NO_EXT=without)
    assert done.stdout == "[0.5, 0.5, 0.5]\n", done.stderr
