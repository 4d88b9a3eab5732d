"""Checkpoints: whole or not at all, and no other files are read."""

import os
import random

import numpy as np
import pytest
import torch

from prunekernels.train import checkpoint
from prunekernels.train.checkpoint import KEYS, load, random_state, save, set_random_state, write_atomically

WHOLE = {key: None for key in KEYS}


def test_there_and_back(tmp_path):
    path = tmp_path / "c.pt"
    save(path, {**WHOLE, "epoch": 3, "model": {"w": torch.arange(3)}})
    state = load(path)
    assert state["epoch"] == 3 and torch.equal(state["model"]["w"], torch.arange(3))
    assert os.listdir(tmp_path) == ["c.pt"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "c.pt"
    save(path, WHOLE)
    before = path.read_bytes()

    def half(temporary):
        temporary.write_bytes(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, half)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["c.pt"]


def test_what_a_killed_process_left_is_removed_after_an_hour(tmp_path):
    path, old, fresh = tmp_path / "c.pt", tmp_path / ".c.pt.17.pt", tmp_path / ".c.pt.18.pt"
    others = [tmp_path / ".c.pt.mine.pt", tmp_path / ".b.pt.17.pt", tmp_path / "c.pt.17.pt"]
    for each in (old, fresh, *others):
        each.write_bytes(b"part of a checkpoint")
        os.utime(each, (0, 0))
    os.utime(fresh)  # maybe another process writes it now
    save(path, WHOLE)
    assert set(tmp_path.iterdir()) == {path, fresh, *others}


class _Foreign:
    def __reduce__(self):
        return (os.system, ("true",))


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "got a truncated or foreign file"),
        (b"no checkpoint at all", "got a truncated or foreign file"),
        (_Foreign(), "got a truncated or foreign file"),
        ([1, 2], "got something else"),
        ({"state_dict": {}}, "got something else"),
        ({"format": "another"}, "got format 'another'"),
        ({"format": checkpoint.FORMAT, "config": {}}, "got a file without epoch, model"),
    ],
)
def test_foreign_files(tmp_path, content, text):
    path = tmp_path / "c.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match=f"checkpoint: {path}: expected what `prunekernels train` wrote, {text}"):
        load(path)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_truncated_files(tmp_path, share):
    path = tmp_path / "c.pt"
    save(path, {**WHOLE, "model": {"w": torch.randn(1000)}})
    raw = path.read_bytes()
    path.write_bytes(raw[: int(len(raw) * share)])
    with pytest.raises(ValueError, match="got a truncated or foreign file"):
        load(path)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="got no such file"):
        load(tmp_path / "c.pt")


def test_random_state(tmp_path):
    def drawn():
        return torch.rand(2).tolist(), random.random(), np.random.rand(2).tolist()

    save(tmp_path / "c.pt", {**WHOLE, "random": random_state()})
    first = drawn()
    set_random_state(load(tmp_path / "c.pt")["random"])
    assert drawn() == first
