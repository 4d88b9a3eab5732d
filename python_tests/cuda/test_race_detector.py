"""The emulator's race detector against vector clocks, on random programs."""

import numpy as np
import pytest

from cases.emulated import arrays, build

NOTHING, READ, WRITE, SYNCWARP, BARRIER = range(5)
PLACES = 12


class Model:
    """Vector clocks. An access is allowed if barriers order it after all earlier ones of the same place (of two
    accesses one must write), whatever the order of threads; and, for a read, if there was a write."""

    def __init__(self, threads):
        self.clocks = np.eye(threads, dtype=int)  # [i, j]: how far of thread j thread i knows
        self.accesses = [[] for _ in range(PLACES)]

    def allows(self, thread, place, writes) -> bool:
        known = [(self.clocks[thread, other] >= time, wrote) for other, time, wrote in self.accesses[place]]
        race = any(not before and (wrote or writes) for before, wrote in known)
        return not race and (writes or any(wrote for _, wrote in known))

    def access(self, thread, place, writes):
        self.accesses[place].append((thread, self.clocks[thread, thread], writes))

    def meet(self, threads):
        self.clocks[threads] = self.clocks[threads].max(0)
        self.clocks[threads, threads] += 1


def random_program(rng, threads, rounds=16, wrong=0.01):
    """Steps and operands [threads, count], and whether they are free of races. Of the accesses that would race, only a
    share `wrong` is kept. A round ends with a barrier of the block, or of parts of its warps."""
    model, sound, columns = Model(threads), True, []
    warp, lane = np.divmod(np.arange(threads), 32)
    for _ in range(rounds):
        for _ in range(12):
            thread, place, writes = rng.integers(threads), rng.integers(PLACES), rng.random() < 0.4
            allowed = model.allows(thread, place, writes)
            if not allowed and rng.random() > wrong:
                continue
            sound = sound and allowed
            model.access(thread, place, writes)
            columns.append((np.where(np.arange(threads) == thread, WRITE if writes else READ, NOTHING), place))
        if rng.random() < 0.3:
            model.meet(np.arange(threads))
            columns.append((np.full(threads, BARRIER), 0))
            continue
        group = warp * 3 + rng.integers(0, rng.integers(1, 4), threads)
        masks = np.array([(1 << lane[group == g]).sum() for g in group])
        for g in set(group):
            model.meet(np.flatnonzero(group == g))
        columns.append((np.full(threads, SYNCWARP), masks))
    steps = np.stack([step for step, _ in columns], 1)
    return steps, np.stack([np.broadcast_to(operand, threads) for _, operand in columns], 1), sound


@pytest.mark.parametrize("threads", [5, 32, 45, 100])
def test_race_detector(threads):
    """No false race is reported, and hardly any is missed (some may be: see shared_memory.cpp)."""
    lib, rng = build.load("emulator"), np.random.default_rng(threads)
    programs, sound, missed = 80, 0, 0
    for _ in range(programs):
        steps, operands, fine = random_program(rng, threads)
        words = [arrays.guarded(each, np.uint32) for each in (steps, operands)]
        _, report = lib.status("pk_program", *words, threads, steps.shape[1], PLACES)
        assert not (fine and report)
        sound += fine
        missed += not fine and not report
    assert programs / 4 < sound < programs * 3 / 4 and missed <= 1, (sound, missed)
