"""Checkpoints, settings, data sets and plans that are broken, foreign or made to do harm."""

import gzip
import json
import os
import pathlib
import re
import tracemalloc

import numpy as np
import pytest
import torch

from cases.hostile import FOREIGN, Marker, archive, damaged
from cases.idx import idx_bytes
from prunekernels import plan_file
from prunekernels.train import checkpoint, config_file, idx

hypothesis = pytest.importorskip("hypothesis")
pytestmark = pytest.mark.hostile
OPTIONS = {"out": str, "epochs": int, "lr": float, "set": dict}
SETTINGS = b"out: runs/a\nepochs: 3\nlr: 0.1\nset:\n  duty: 0.5\n"


def fuzzed(test):
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st

    fixtures = [HealthCheck.function_scoped_fixture]
    return settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=fixtures)(
        given(st.data())(test)
    )


def refused(path, read):
    """The text of the ValueError of a reader, which leaves the file as it is and names it."""
    before = path.read_bytes()
    with pytest.raises(ValueError) as error:
        read(path)
    assert str(path) in str(error.value) and "expected" in str(error.value) and path.read_bytes() == before
    return str(error.value)


# ---- checkpoints


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "c.pt"
    checkpoint.save(path, {**dict.fromkeys(checkpoint.KEYS), "epoch": 3, "model": {"w": torch.arange(40.0)}})
    return path.read_bytes()


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_checkpoint(tmp_path, name):
    path = tmp_path / "c.pt"
    path.write_bytes(FOREIGN[name])
    assert "got a truncated or foreign file" in refused(path, checkpoint.load)


@pytest.mark.parametrize("as_zip", [True, False])
def test_a_checkpoint_executes_nothing(tmp_path, as_zip):
    path, marker = tmp_path / "c.pt", tmp_path / "marker"
    torch.save({"format": checkpoint.FORMAT, "model": Marker(marker)}, path, _use_new_zipfile_serialization=as_zip)
    refused(path, checkpoint.load)
    assert not marker.exists()
    torch.load(path, weights_only=False)  # so it is a pickle that would
    assert marker.exists()


def test_a_newer_checkpoint(tmp_path):
    path = tmp_path / "c.pt"
    torch.save({"format": checkpoint.FORMAT.replace("1", "2")}, path)
    assert "got format 'prunekernels training checkpoint 2'" in refused(path, checkpoint.load)


def test_a_checkpoint_that_unpacks_to_more(tmp_path):
    path = tmp_path / "c.pt"
    path.write_bytes(archive(**{"c/data.pkl": bytes(50_000_000), "c/version": "3\n"}))
    tracemalloc.start()
    try:
        assert "an archive with packed entries" in refused(path, checkpoint.load)
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
    finally:
        tracemalloc.stop()


@fuzzed
def test_a_damaged_checkpoint(tmp_path, saved, data):
    path = tmp_path / "c.pt"
    path.write_bytes(damaged(saved, data))
    try:
        state = checkpoint.load(path)
    except ValueError as error:
        assert str(path) in str(error)
    else:
        assert state["epoch"] == 3 and torch.equal(state["model"]["w"], torch.arange(40.0))


# ---- settings


def settings_of(path):
    return config_file.read_settings(path, OPTIONS)


@pytest.mark.parametrize("suffix", [".yaml", ".json", ".toml"])
@pytest.mark.parametrize("name", ["PNG", "zip", "text"])
def test_foreign_settings(tmp_path, name, suffix):
    if suffix == ".toml":
        pytest.importorskip("tomllib")
    path = tmp_path / f"run{suffix}"
    path.write_bytes(FOREIGN[name])
    refused(path, settings_of)


BOMB = "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9))
HARMFUL = {
    "aliases": (".yaml", f"a0: &a0 [x]\n{BOMB}\nset: {{a: *a8}}\n", "more than 10,000 values"),
    "aliases of a number": (".yaml", f"a0: &a0 [x]\n{BOMB}\nepochs: *a8\n", "more than 10,000 values"),
    "a circle": (".yaml", "set: &a {a: *a}\n", "more than 10,000 values"),
    "code": (".yaml", "out: !!python/object/apply:os.system ['touch pwned']\n", "could not determine a constructor"),
    "nested": (".json", "[" * 100_000, "expected JSON, got an error"),
    "a huge integer": (".json", f'{{"lr": 1{"0" * 400}}}', "a number of 1329 bits"),
    "a huge hexadecimal": (".yaml", f"epochs: 0x{'f' * 20_000}\n", "a number of 80000 bits"),
    "long": (".yaml", "#" * (1 << 18) + "\n", "expected at most 262,144 bytes of settings"),
}


@pytest.mark.parametrize("name", HARMFUL)
def test_harmful_settings(tmp_path, monkeypatch, name):
    suffix, text, reason = HARMFUL[name]
    monkeypatch.chdir(tmp_path)
    path = tmp_path / f"run{suffix}"
    path.write_text(text)
    tracemalloc.start()
    try:
        assert reason in refused(path, settings_of)
        assert tracemalloc.get_traced_memory()[1] < 30_000_000
    finally:
        tracemalloc.stop()
    assert os.listdir(tmp_path) == [path.name]


@fuzzed
def test_damaged_settings(tmp_path, data):
    """Text has no checksum: other settings of the right kinds are read, everything else is a ValueError."""
    path = tmp_path / "run.yaml"
    path.write_bytes(damaged(SETTINGS, data))
    try:
        found = settings_of(path)
    except ValueError as error:
        assert str(path) in str(error)
    else:
        assert all(isinstance(value, OPTIONS[name]) for name, value in found.items())


# ---- data sets


@fuzzed
def test_a_damaged_data_set(tmp_path, data):
    path, values = tmp_path / "train-images-idx3-ubyte.gz", np.arange(60, dtype=np.uint8).reshape(3, 4, 5)
    path.write_bytes(damaged(gzip.compress(idx_bytes(values)), data))
    try:
        found = idx.read(path, "images")
    except ValueError as error:
        assert str(path) in str(error)
    else:
        assert np.array_equal(found, values)


def test_images_beyond_memory(tmp_path, monkeypatch):
    path = tmp_path / "train-labels-idx1-ubyte"
    path.write_bytes(idx_bytes(np.zeros(9, np.uint8)))

    def full(*args):
        raise MemoryError

    monkeypatch.setattr(idx.np, "empty", full)
    assert "expected what fits into memory, got 9 bytes" in refused(path, lambda path: idx.read(path, "labels"))


# ---- plans


def plans(machines):
    return json.dumps({"format": plan_file.FORMAT, "version": plan_file.VERSION, "machines": machines}).encode()


PLANS = FOREIGN | {"nested": b"[" * 100_000, "no list": plans({"another processor": {"a": 1}})}


@pytest.mark.parametrize("name", PLANS)
def test_foreign_plans(tmp_path, monkeypatch, name):
    path = tmp_path / "plans.json"
    path.write_bytes(PLANS[name])
    with pytest.raises(ValueError, match="expected a"):
        plan_file.known(path)
    if plan_file.extension._C is None:
        pytest.skip("without the extension no plans are written")
    monkeypatch.setattr(plan_file.extension._C, "settled_plans", lambda: [[[1], "dense", []]])
    with pytest.warns(UserWarning, match=f"{re.escape(str(path))}: .*plans are not written"):
        plan_file._write_at_exit(path, set())
    assert path.read_bytes() == PLANS[name]


def test_plans_from_what_never_ends():
    if not pathlib.Path("/dev/zero").exists():
        pytest.skip("no such device")
    with pytest.raises(ValueError, match="got no regular file"):
        plan_file.known(pathlib.Path("/dev/zero"))


@fuzzed
def test_damaged_plans(tmp_path, data):
    path = tmp_path / "plans.json"
    path.write_bytes(damaged(plans({plan_file.machine(): [], "another processor": [[[1], "dense", []]]}), data))
    try:
        here, machines = plan_file.known(path)
    except ValueError as error:
        assert "expected" in str(error)
    else:
        assert here == 0 and machines <= 2
