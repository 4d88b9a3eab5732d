"""PRUNEKERNELS_CACHE: plans that outlive the process."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

import prunekernels as pk
from prunekernels import plan_file
from prunekernels.ops import extension

pytestmark = pytest.mark.skipif(not pk.has_extension(), reason="without the extension there is one plan only")

CODE = """
import sys, torch, prunekernels as pk
known = len(pk.plan.table())
size = int(sys.argv[1])
x, w = torch.ones(2, 32, size, size), torch.ones(32, 32, 3, 3)
calls = pk.plan.settle(lambda: pk.masked_conv2d(x, w, filter_mask=torch.arange(32) < 16, padding=1))
print(known, calls, len(pk.plan.table()))
"""


def started(path, size=12, code=CODE):
    env = os.environ | {
        "PYTHONPATH": str(pathlib.Path(pk.__file__).resolve().parents[1]),
        plan_file.VARIABLE: str(path),
    }
    command = [sys.executable, "-c", code, str(size)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(process):
    out, err = process.communicate()
    assert process.returncode == 0, err
    return out.split(), err


def plans(path):
    return json.loads(path.read_text())["machines"].get(plan_file.machine(), [])


def test_the_next_process_tries_nothing(tmp_path):
    path = tmp_path / "new" / "plans.json"
    (known, calls, rows), err = ended(started(path))
    assert known == "0" and int(calls) > 2 and rows == "1" and not err
    before = path.stat().st_mtime_ns, path.read_text()
    (known, calls, rows), err = ended(started(path))
    assert (known, calls, rows) == ("1", "1", "1") and not err
    assert (path.stat().st_mtime_ns, path.read_text()) == before  # nothing new, not written
    (known, *_), _ = ended(started(path, size=14))
    assert known == "1" and len(plans(path)) in (1, 2)  # a plan that was taken over from a similar problem is not kept
    assert sorted(p.name for p in path.parent.iterdir()) == ["plans.json", "plans.json.lock"]


def test_writers_at_the_same_time_lose_nothing(tmp_path):
    path = tmp_path / "plans.json"
    sizes = (6, 20, 64)  # too far apart for one to take over another's plan
    for process in [started(path, size) for size in sizes]:
        ended(process)
    heights = {entry[0][9] for entry in plans(path)}
    assert len(plans(path)) == 3 and heights == set(sizes)


def test_plans_of_another_machine_stay(tmp_path):
    path = tmp_path / "plans.json"
    other = {"another processor": [[[1, 2], "dense", [["dense", 1.0, 2]]]]}
    path.write_text(json.dumps({"format": plan_file.FORMAT, "version": plan_file.VERSION, "machines": other}))
    (known, *_), err = ended(started(path))
    assert known == "0" and not err and len(plans(path)) == 1
    assert json.loads(path.read_text())["machines"]["another processor"] == other["another processor"]


def a_file(machines="{}", version=plan_file.VERSION):
    return f'{{"format": "{plan_file.FORMAT}", "version": {version}, "machines": {machines}}}'


WORDS = extension._C.plan_key_words if extension._C else 0
BAD = {
    "empty": ("", "expected a file of plans, got Expecting value"),
    "cut off": (a_file()[:-4], "expected a file of plans, got"),
    "foreign": ('{"plans": []}', "expected a file of plans, got another one"),
    "a list": ("[]", "expected a file of plans, got another one"),
    "newer": (a_file(version=99), "expected version 1 of the file of plans, got 99"),
    "no machines": (a_file("[]"), "expected plans by machine, got list"),
    "no entries": (a_file(json.dumps({plan_file.machine(): [[[1, 2], "dense", []]]})), "expected entries"),
    "a plan that is no word": (
        a_file(json.dumps({plan_file.machine(): [[[0] * WORDS, 5, []]]})),
        "restore_plans(): incompatible",
    ),
    "numbers that are too large": (
        a_file(json.dumps({plan_file.machine(): [[[2**40] * WORDS, "dense", []]]})),
        "restore_plans(): incompatible",
    ),
    "nested": (a_file("[" * 100_000), ""),
    "binary": ("\x00\x01", "expected a file of plans, got"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_left_alone(tmp_path, name):
    path = tmp_path / "plans.json"
    text, message = BAD[name]
    path.write_text(text)
    (known, calls, _), err = ended(started(path))
    assert known == "0" and int(calls) > 2 and path.read_text() == text
    assert f"PRUNEKERNELS_CACHE: {path}: {message}" in err


def test_a_plan_that_is_unknown_or_cannot_run(tmp_path):
    path = tmp_path / "plans.json"
    ended(started(path))
    body = json.loads(path.read_text())
    (entry,) = body["machines"][plan_file.machine()]
    entry[1] = "fast"
    path.write_text(json.dumps(body))
    _, err = ended(started(path))
    assert "expected a plan, got fast" in err
    entry[0][1], entry[1] = 7, "direct"  # of float64 [torch's number of it], which only the vendor's plans serve
    path.write_text(json.dumps(body))
    code = CODE.replace("3, 3)", "3, 3).double()").replace("size, size)", "size, size).double()")
    (known, calls, _), err = ended(started(path, code=code))
    assert (known, calls) == ("1", "1") and not err


def test_no_directory_to_write_to(tmp_path):
    (tmp_path / "file").write_text("")
    _, err = ended(started(tmp_path / "file" / "plans.json"))
    assert "PRUNEKERNELS_CACHE" in err and "plans are n" in err
