"""FormTrials: which of several forms of a training step is the fastest, found out on the steps of the run itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

STRETCH = 4  # steps in a form at a time: the first pays for the change, in the next ones its plans are tried
FAR_BEHIND = 3.0  # times the best: a form that takes so long in a later step of its stretch is left at once,
FIRST_FAR_BEHIND = 8.0  # and one that takes so long in the first
SLACK = (1.5, 1.15, 1.0)  # by round, times the best: what takes longer is no contender any more


class FormTrials:
    """A stretch of steps in each form, and further ones in those that are close.

    The best of a form's steps counts, without the first one of each stretch.

    Args:
        forms: Their names, the likeliest to be the fastest first.
        variants: By form, others that get a stretch only where that form is a contender after the first round.

    Attributes:
        ms: By form, milliseconds of its fastest step so far.
        reasons: By form that cannot run, why.
    """

    def __init__(self, forms: Sequence[str], variants: Mapping[str, str] | None = None) -> None:
        self.ms: dict[str, float] = {}
        self.reasons: dict[str, str] = {}
        self._left, self._variants = list(forms), dict(variants or {})
        self._round = self._at = self._steps = 0

    @property
    def now(self) -> str:
        """The form of the next step; once settled the fastest."""
        return self.best if self.settled else self._left[self._at]

    @property
    def settled(self) -> bool:
        waits = self._round == 0 and any(form in self._variants for form in self._left)
        return (len(self._left) <= 1 and not waits) or self._round == len(SLACK)

    @property
    def best(self) -> str:
        return min(self._left, key=lambda form: self.ms.get(form, float("inf")))

    def add(self, ms: float) -> None:
        """Takes the time of a step in the form `now`."""
        form = self._left[self._at]
        self._steps += 1
        best = min(self.ms.values(), default=float("inf"))
        if self._steps > 1 or ms > FIRST_FAR_BEHIND * best:
            self.ms[form] = min(ms, self.ms.get(form, ms))
            if ms > FAR_BEHIND * best or self._steps == STRETCH:
                self._next()

    def restart(self) -> None:
        """Begins the stretch anew, as masks have changed."""
        self._steps = 0

    def drop(self, reason: str) -> None:
        """Leaves the form `now` out, as it cannot run. Of the last one left nothing is dropped."""
        self.reasons[self._left[self._at]] = reason
        if len(self._left) > 1:
            del self._left[self._at]
            self._at, self._steps = self._at - 1, 0
            self._next()

    def _next(self) -> None:
        self._at, self._steps = self._at + 1, 0
        if self._at == len(self._left):
            best, slack = min(self.ms.values(), default=0.0), SLACK[self._round]
            self._left = [form for form in self._left if self.ms[form] <= slack * best]
            if self._round == 0:
                more = (self._variants[form] for form in self._left if form in self._variants)
                self._left += [form for form in more if form not in self.ms]
            self._at, self._round = 0, self._round + 1


def likeliest_first(forms: Sequence[str], nearby: Sequence[Mapping[str, float]]) -> list[str]:
    """The forms that are worth a trial, by their times under other masks.

    Args:
        forms: Their names.
        nearby: By masks, the nearest first, milliseconds of the forms that were tried under them. What was far behind
            under the nearest ones under which it was tried is left out.
    """
    behind: dict[str, float] = {}  # times the best
    for times in nearby:
        for form, ms in times.items():
            behind.setdefault(form, ms / min(times.values()))
    found = [form for form in forms if behind.get(form, 1.0) <= SLACK[0]]
    return sorted(found or forms[:1], key=lambda form: behind.get(form, 1.0))
