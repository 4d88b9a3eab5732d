"""benchmarks/wire.py: what a step sends, as counted and as the masks say."""

from __future__ import annotations

import json

import pytest
import torch
import torch.distributed as dist

import wire
from harness.goals import goals
from networks.models import NETWORKS, draw, wires
from wire import GOALS, WIRE, WireRow, ring_bytes


@pytest.mark.parametrize("ranks, sent", [(1, 0), (2, 100), (4, 150), (1024, 199.8046875)])
def test_a_ring(ranks, sent):
    assert ring_bytes(100, ranks) == sent


def make_row(**changes):
    row = dict(network="resnet50", kept=0.5, form="hook", ranks=4, gradient_bytes=100, ring_bytes=150.0)
    row |= dict(
        wire_bytes=152.0,
        change_bytes=9.0,
        buffer_bytes=7,
        buffer_wire_bytes=None,
        checkpoint_bytes=300,
        check_bytes=9.0,
        filters=8,
    )
    return WireRow(**row | changes)


def test_goals_and_summary():
    rows = [make_row(form="ddp", gradient_bytes=400, ring_bytes=600.0, wire_bytes=630.0), make_row()]
    found = goals(rows, GOALS)[0]
    assert (found.rows, found.failing, found.reached, found.verdict) == (2, 1, 1.05, "missed")
    assert not goals([make_row(wire_bytes=None)], GOALS)
    rows.append(make_row(form="compacted", gradient_bytes=200))
    assert wire.summary(rows).splitlines()[1] == "- resnet50, compacted: of DDP's bytes 0.500 at 0.5"


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available(), reason="this torch is built without torch.distributed")
def test_end_to_end(tmp_path, capsys):
    """Of two processes: the hook and the small network send what is live."""
    argv = ["--networks", "tiny_resnet", "--kept", "0.5", "--ranks", "2", "--json", str(tmp_path / "w.json")]
    assert wire.main(argv) == 0
    ddp, hook, compacted = WIRE.read(tmp_path / "w.json")[0]
    network = NETWORKS["tiny_resnet"]
    with torch.device("meta"):
        full = network.build()
    live = draw(wires(full), "joint", 0.5, 0)
    convs = sum(
        int(live.filters[w.conv].sum()) * 9 * (3 if w.reads is None else int(live.inputs[w.conv].sum()))
        for w in wires(full)
    )
    norms = 2 * sum(int(mask.sum()) for mask in live.filters.values())
    assert ddp.gradient_bytes == 4 * sum(p.numel() for p in full.parameters())
    assert hook.gradient_bytes == 4 * (convs + norms + 10 * int(live.features.sum()) + 10) == compacted.gradient_bytes
    assert hook.buffer_bytes > compacted.buffer_bytes and hook.checkpoint_bytes > 8 * sum(
        p.numel() for p in full.parameters()
    )
    if hook.wire_bytes is not None:  # counted on a network of the processes' own
        assert all(r.ring_bytes < r.wire_bytes < 1.05 * r.ring_bytes + 4096 for r in (ddp, hook, compacted))
        assert 16 <= min(hook.change_bytes, hook.check_bytes) < 4096 and 0 < compacted.change_bytes < 4096
        assert ddp.buffer_wire_bytes > 0.9 * ddp.buffer_bytes / 2
    assert json.loads((tmp_path / "w.json").read_text())["header"]["ranks"] == 2
    assert "hook: of DDP's bytes 0.2" in capsys.readouterr().out


@pytest.mark.parametrize("argv", [["--networks", "vgg11"], ["--kept", "0"], ["--ranks", "0"]])
def test_bad_command_lines_are_refused(argv, capsys):
    with pytest.raises(SystemExit):
        wire.main(argv)
    assert f"argument {argv[0]}" in capsys.readouterr().err
