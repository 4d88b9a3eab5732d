"""Files that are broken, foreign or made to do harm, and a process with little memory to read them in."""

import io
import os
import pathlib
import subprocess
import sys
import zipfile

import prunekernels as pk

LIMIT = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
"""


class Marker:
    """A pickle that makes a file where it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


def archive(**entries):
    """A zip archive with packed entries."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in entries.items():
            file.writestr(name, content)
    return buffer.getvalue()


FOREIGN = {
    "empty": b"",
    "PNG": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(range(256)),
    "zip": archive(a="b" * 100),
    "text": b"not what you are looking for\n",
    "zeros": bytes(1000),
}


def damaged(whole, data):
    """Bytes of a file with some flipped, or with the end cut off. data: hypothesis draws from it."""
    from hypothesis import strategies as st

    if data.draw(st.booleans(), "cut"):
        return whole[: data.draw(st.integers(0, len(whole) - 1), "length")]
    changed = bytearray(whole)
    for at in data.draw(st.lists(st.integers(0, len(whole) - 1), min_size=1, max_size=3, unique=True), "at"):
        changed[at] ^= data.draw(st.integers(1, 255), "by")
    return bytes(changed)


def in_little_memory(code, *args):
    """What code prints in a process of 6 GiB of addresses, with the peak of its memory in MiB as the last line."""
    env = os.environ | {"PYTHONPATH": str(pathlib.Path(pk.__file__).resolve().parents[1])}
    end = "\nprint((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)\n"
    command = [sys.executable, "-c", code.replace("LIMIT\n", LIMIT) + end, *map(str, args)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()
