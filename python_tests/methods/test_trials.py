"""Which candidate has the fewest errors: on all images, and by successive halving."""

import pytest
import torch

from prunekernels.methods.trials import FINALISTS, Trials


class Coins:
    """Candidates that miss each image with a probability of their own; images are their numbers."""

    def __init__(self, shares, images=1024, batch=100, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.wrong = torch.rand(len(shares), images, generator=generator) < torch.tensor(shares)[:, None]
        numbers = torch.arange(images)
        self.data = [(x, torch.zeros_like(x)) for x in numbers.split(batch)]
        self.tried = []  # (candidate, images) of each pass

    def put(self, i):
        self.now = i

    def answer(self, x):
        self.tried.append((self.now, x.tolist()))
        return self.wrong[self.now, x].long()

    def run(self, halving, data=None):
        trials = Trials("op", self.data if data is None else data, self.answer, lambda x: None, torch.device("cpu"))
        return trials.run(len(self.wrong), self.put, halving=halving)


def test_all_on_all():
    coins = Coins([0.5, 0.3, 0.4])
    best, errors, labels = coins.run(halving=False)
    assert (best, labels) == (1, [1024] * 3) and errors == coins.wrong.sum(1).tolist()


@pytest.mark.parametrize("seed", range(20))
def test_a_clear_winner_wins_either_way(seed):
    shares = [0.8] * 100
    shares[seed * 5] = 0.4
    assert (
        Coins(shares, seed=seed).run(halving=True).best == Coins(shares, seed=seed).run(halving=False).best == seed * 5
    )


def test_halving_costs_an_eighth():
    coins = Coins(torch.linspace(0.9, 0.7, 100).tolist())
    best, errors, labels = coins.run(halving=True)
    assert sorted(set(labels)) == [32, 64, 128, 256, 512, 1024]
    assert [labels.count(n) for n in sorted(set(labels))] == [50, 25, 12, 6, 3, FINALISTS]
    assert sum(labels) == sum(len(images) for _, images in coins.tried) < 100 * 1024 / 8
    assert labels[best] == 1024 and errors[best] == min(e for e, n in zip(errors, labels, strict=True) if n == 1024)


def test_no_image_is_tried_twice_and_batches_are_mixed():
    coins = Coins([0.5] * 10)
    labels = coins.run(halving=True).labels
    for i, count in enumerate(labels):
        images = [n for now, numbers in coins.tried if now == i for n in numbers]
        assert len(images) == len(set(images)) == count
    first = coins.tried[0][1]
    assert len({n // 256 for n in first}) == 4  # of every quarter


@pytest.mark.parametrize("halving", [False, True])
def test_of_equal_candidates_the_first_wins(halving):
    coins = Coins([0.5] * 30)
    coins.wrong[:] = coins.wrong[7]
    coins.wrong[[3, 4]] = True
    assert coins.run(halving).best == 0
    coins.wrong[:3] = True
    assert coins.run(halving).best == 5


@pytest.mark.parametrize("images", [1, 63, 64, 100])
def test_few_images(images):
    coins = Coins([0.9] * 10 + [0.0], images=images)
    best, errors, labels = coins.run(halving=True)
    assert (best, errors[best], labels[best]) == (10, 0, images) and min(labels) >= min(images, 24)


def test_few_candidates_are_tried_on_all():
    assert Coins([0.5] * FINALISTS).run(halving=True).labels == [1024] * FINALISTS


def test_images_of_several_sizes():
    """As one batch has smaller images than another; each share has of both."""
    sizes = [(torch.randn(40, 1, n, n), torch.zeros(40, dtype=torch.long)) for n in (4, 6)]
    seen = []
    trials = Trials(
        "op", sizes, lambda x: (seen.append(x.shape[2]), x.new_zeros(len(x)).long())[1], lambda x: None,
        torch.device("cpu"),
    )  # fmt: skip
    assert trials.run(9, lambda i: None, halving=True).labels.count(80) == 5
    assert seen[:2] == [4, 6]


def test_only_the_best_of_a_part_are_tried_on_the_next_ones(monkeypatch):
    monkeypatch.setattr("prunekernels.methods.trials.PART_BYTES", 256 * 8)
    coins = Coins(torch.linspace(0.9, 0.7, 16).tolist(), batch=256)
    best, errors, labels = coins.run(halving=True)
    assert sorted(labels) == [64] * 8 + [128] * 4 + [1024] * 4
    assert errors[best] == int(coins.wrong[best].sum())


def test_no_images():
    with pytest.raises(ValueError, match="op: data: expected batches with images in every pass .* got none"):
        Coins([0.5] * 9).run(halving=True, data=[])
