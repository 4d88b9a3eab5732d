"""progress: a bar on a terminal, nothing elsewhere."""

import io
import re

import pytest

from prunekernels import cli
from prunekernels.train import finalize, progress
from prunekernels.train.progress import Progress, clock_text, say


class Terminal(io.StringIO):
    def isatty(self):
        return True

    @property
    def lines(self):
        """What it showed, one line after the other."""
        return [line for line in re.split(r"\r\x1b\[K", self.getvalue()) if line]


@pytest.fixture(autouse=True)
def _columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "xterm")


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_bar_and_the_time_that_is_left():
    terminal, clock = Terminal(), Clock()
    with Progress(20, "epoch 1/3", more=40, stream=terminal, clock=clock) as bar:
        clock.now = 50
        bar.update(5, "loss 2.5")
    assert terminal.lines == [
        "epoch 1/3 [--------------------] 0/20",
        "epoch 1/3 [#####---------------] 5/20  2:30 left, 9:10 in all  loss 2.5",
    ]
    assert terminal.getvalue().endswith("\r\x1b[K")


def test_it_is_drawn_ten_times_a_second_and_at_the_end():
    terminal, clock = Terminal(), Clock()
    with Progress(100, "", stream=terminal, clock=clock) as bar:
        for i in range(1, 101):
            clock.now = i / 100
            bar.update(i)
    assert 10 <= len(terminal.lines) <= 12 and terminal.lines[-1].endswith("100/100  0:00 left")


def test_a_total_that_is_known_later_and_none_at_all():
    terminal, clock = Terminal(), Clock()
    with Progress(1, "a", stream=terminal, clock=clock) as bar:
        clock.now = 1
        bar.update(1, total=4)
    assert terminal.lines[-1].startswith("a [#####---------------] 1/4  0:03 left")
    assert Progress(0, "b").line(80) == "b [####################] 0/0"


def test_a_narrow_terminal_cuts_the_line():
    assert Progress(10, "a long name").line(12) == "a long name"
    assert Progress(10, "a").line(0) == ""


@pytest.mark.parametrize("why", ["no terminal", "dumb", "disabled"])
def test_nothing_elsewhere(monkeypatch, why):
    stream = io.StringIO() if why == "no terminal" else Terminal()
    if why == "dumb":
        monkeypatch.setenv("TERM", "dumb")
    with Progress(2, "a", stream=stream, enabled=why != "disabled") as bar:
        bar.update(2, "b")
    assert stream.getvalue() == ""


def test_a_bar_inside_another_is_not_drawn():
    outer, inner = Terminal(), Terminal()
    with Progress(2, "a", stream=outer), Progress(2, "b", stream=inner) as bar:
        bar.update(2)
    assert outer.lines and not inner.lines
    with Progress(2, "c", stream=inner):
        pass
    assert inner.lines == ["c [--------------------] 0/2"]


def test_lines_stand_above_it(capsys):
    terminal = Terminal()
    with pytest.raises(KeyError), Progress(2, "a", stream=terminal):
        say("a line")
        raise KeyError
    assert capsys.readouterr().out == "a line\n" and len(terminal.lines) == 2
    say("another")
    assert capsys.readouterr().out == "another\n" and len(terminal.lines) == 2


@pytest.mark.parametrize(("seconds", "text"), [(-1, "0:00"), (59.6, "1:00"), (245, "4:05"), (3845, "1:04:05")])
def test_clock_text(seconds, text):
    assert clock_text(seconds) == text


@pytest.mark.slow
def test_commands_show_it(tmp_path, monkeypatch, capsys):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(finalize, "SECONDS", 0.0)
    monkeypatch.setattr(progress, "EVERY", 0.0)
    given = ["--arch", "vgg_small", "--width", "0.25", "--size", "8", "--batch", "512", "--epochs", "2", "--no-report"]
    commands = {
        "train": (["--out", str(tmp_path), *given], ["epoch 1/2 ", "epoch 2/2 ", "small network "]),
        "shrink": ([str(tmp_path)], ["shrink "]),
        "sensitivity": ([str(tmp_path), "--images", "64"], ["sensitivity "]),
        "report": ([str(tmp_path), "--out", str(tmp_path / "page.html")], ["report "]),
    }
    for command, (arguments, names) in commands.items():
        terminal = Terminal()
        monkeypatch.setattr(progress.sys, "stderr", terminal)
        assert cli.main([command, *arguments]) == 0
        assert all(any(line.startswith(name) for line in terminal.lines) for name in names), command
    assert "in all" in terminal.getvalue() or command != "train"
    assert "epoch 2/2  loss " in capsys.readouterr().out
