"""Networks inside this machine, each in a namespace of its own; they need root and the command ip."""

import contextlib
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

import prunekernels as pk

TESTS = pathlib.Path(__file__).parents[1]


def _ip(*arguments):
    ran = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if ran.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)}: {ran.stderr.strip()}")


@contextlib.contextmanager
def namespaces(count, *, linked=False):
    """The names of some; linked: of two, one cable between them, "veth0" in both, with the addresses of ADDRESSES.

    Skips the test where this machine makes none.
    """
    names, made = [f"pk-{os.getpid()}-{number}" for number in range(count)], []
    if shutil.which("ip") is None:
        pytest.skip("needs the command ip")
    try:
        for name in names:
            _ip("netns", "add", name)
            made.append(name)
            _ip("-n", name, "link", "set", "lo", "up")
        if linked:
            _ip("link", "add", "veth0", "netns", names[0], "type", "veth", "peer", "name", "veth0", "netns", names[1])
            for name, address in zip(names, ADDRESSES, strict=True):
                _ip("-n", name, "addr", "add", f"{address}/24", "dev", "veth0")
                _ip("-n", name, "link", "set", "veth0", "up")
    except RuntimeError as error:
        _remove(made)
        pytest.skip(f"needs network namespaces, which root may make: {error}")
    try:
        yield names
    finally:
        _remove(made)


ADDRESSES = ("10.77.0.1", "10.77.0.2")


def _remove(names):
    for name in names:
        subprocess.run(["ip", "netns", "del", name], check=False)


def cut(name):
    """Takes the cable out."""
    _ip("-n", name, "link", "set", "veth0", "down")


def inside(name, *arguments):
    """The command that runs Python in a namespace."""
    return ["ip", "netns", "exec", name, sys.executable, *map(str, arguments)]


def environment(**given):
    """Of processes that import the package and the folder of tests."""
    paths = os.pathsep.join([str(pathlib.Path(pk.__file__).parents[1]), str(TESTS)])
    return os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "PRUNEKERNELS_MEASURE": "0"} | given
