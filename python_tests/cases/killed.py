"""python -m cases.killed FOLDER MODE MOMENTS SEED, in python_tests: kills a training run at so many moments.

Each kill is a SIGKILL to a process that runs `prunekernels train`; the next one resumes. This process imports all that
they need once and forks, with one thread, so that no thread is lost in a fork. The last line that it prints is what it
found, as JSON.
"""

import contextlib
import glob
import json
import os
import pathlib
import random
import shutil
import signal
import sys
import time

os.environ["OMP_NUM_THREADS"] = "1"

import torch  # noqa: E402
import torch._dynamo  # noqa: E402
import torch.export  # noqa: E402

from cases.idx import write_idx  # noqa: E402
from cases.train import comparable  # noqa: E402
from prunekernels import cli  # noqa: E402
from prunekernels.train import checkpoint, finalize  # noqa: E402

NAME, LOG, EPOCHS, LONGEST = "checkpoint.pt", "log.txt", 4, 120.0


def arguments(out, mode):
    if (out / NAME).exists():
        return ["train", "--out", str(out), "--resume", "--quiet"]
    settings = {"data": f"idx:{out.parent / 'data'}", "arch": "vgg_small", "width": 0.25, "epochs": EPOCHS, "batch": 8,
                "lr": 0.05, "method": "ghfp", "duty": 0.34, "augment": "shift", "mode": mode,
                "layout": "contiguous"}  # fmt: skip
    options = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    return ["train", "--out", str(out), *options, "--deterministic", "--no-report", "--quiet"]


def started(out, mode, keep=None):
    """The id of a process that trains. keep: where it keeps every checkpoint that it writes, under its epoch."""
    sys.stdout.flush()
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        log = os.open(out.parent / LOG, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        save = checkpoint.save

        def save_and_keep(path, state):
            save(path, state)
            if keep is not None:
                shutil.copyfile(path, keep / f"{state['epoch']}.pt")

        checkpoint.save, finalize.SECONDS = save_and_keep, 0.0
        status = cli.main(arguments(out, mode))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status or 0)


def ended(process):
    """Its exit status, minus the signal that ended it; None while it runs."""
    done, status = os.waitpid(process, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def killed(process, out, rng, skip, longest):
    """Kills it: at a random moment within so many seconds if skip is None, else right behind the change to its folder
    after so many others, if it comes to that. Returns its exit status and whether it was writing."""
    until = time.monotonic() + (LONGEST if skip is not None else rng.uniform(0, longest))
    changes, before = 0, files(out)
    while (status := ended(process)) is None and time.monotonic() < until:
        now = files(out)
        changes, before = changes + (now != before), now
        if skip is not None and changes > skip:
            time.sleep(rng.uniform(0, 0.001))
            break
        time.sleep(0.0002)
    if status is not None:
        return status, False
    os.kill(process, signal.SIGSTOP)
    writing = bool(temporaries(out, process))
    os.kill(process, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), writing


def files(out):
    """Names and sizes of what is in the folder."""
    with contextlib.suppress(FileNotFoundError):
        return {(file.name, file.stat().st_size) for file in os.scandir(out)}
    return set()


def temporaries(out, process="*"):
    """Files that a process has begun to write; of any process: what those that were killed have left."""
    return glob.glob(str(out / f".*.{process}.*"))


def finished(out, mode, keep=None):
    """Trains to the end, undisturbed. Returns how long that took."""
    begun = time.monotonic()
    status = os.waitstatus_to_exitcode(os.waitpid(started(out, mode, keep), 0)[1])
    assert status == 0, f"exit status {status}: {(out.parent / LOG).read_text()}"
    return time.monotonic() - begun


def check(out, expected, least):
    """The checkpoint is that of an epoch, not before `least`, to the bit. Returns the epoch; 0: there is none."""
    if not (out / NAME).exists():
        assert least == 0, "the checkpoint is gone"
        return 0
    state = checkpoint.load(out / NAME)
    epoch = state["epoch"]
    assert least <= epoch <= EPOCHS, f"expected epoch {least} or later, got {epoch}"
    assert comparable(state) == expected[epoch], f"the checkpoint of epoch {epoch} is another"
    return epoch


def main(folder, mode, moments, seed):
    torch.set_num_threads(1)
    rng, keep, out = random.Random(seed), folder / "keep", folder / "run"
    write_idx(folder / "data", shape=(8, 8), counts=(32, 8))
    keep.mkdir()
    longest = finished(folder / "whole", mode, keep)
    expected = {int(path.stem): comparable(checkpoint.load(path)) for path in keep.iterdir()}
    assert sorted(expected) == list(range(1, EPOCHS + 1))
    found, epoch = {"moments": 0, "writing": 0, "before the first": 0, "whole runs": 0}, 0
    while found["moments"] < moments:
        skip = rng.randrange(3 * EPOCHS) if found["moments"] % 3 else None
        status, writing = killed(started(out, mode), out, rng, skip, longest)
        epoch = check(out, expected, epoch)
        if status == 0:
            assert epoch == EPOCHS
            shutil.rmtree(out)
            epoch, found["whole runs"] = 0, found["whole runs"] + 1
            continue
        assert status == -signal.SIGKILL, f"exit status {status}: {(folder / LOG).read_text()}"
        found["moments"] += 1
        found["writing"] += writing
        found["before the first"] += epoch == 0
    finished(out, mode)
    assert check(out, expected, epoch) == EPOCHS
    found["left over"] = len(temporaries(out))
    print(json.dumps(found))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
