"""Networks whose forward depends on values, as that of a detector: traced on the path that the example takes."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import prunekernels as pk


class Detector(nn.Module):
    """A head that is used on two levels, and boxes of which the scores choose; several sizes depend on values."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)
        self.down = nn.Conv2d(8, 8, 3, 2, 1)
        self.tower = nn.Conv2d(8, 8, 3, padding=1)
        self.scores, self.boxes = nn.Conv2d(8, 2, 1), nn.Conv2d(8, 4, 1)

    def forward(self, images, targets=None):
        x = F.relu(self.norm(self.stem(torch.stack(images))))
        scores, boxes = [], []
        for level in (x, F.relu(self.down(x))):
            level = F.relu(self.tower(level))
            scores.append(self.scores(level).flatten(2).transpose(1, 2))
            boxes.append(self.boxes(level).flatten(2).transpose(1, 2))
        scores, boxes = torch.cat(scores, 1), torch.cat(boxes, 1)
        if self.training:
            return {"loss": scores.square().mean() + F.l1_loss(boxes, targets.expand_as(boxes))}
        found = []
        for score, box in zip(scores, boxes, strict=True):
            best, label = score.max(1)
            chosen = torch.nonzero(best > best.mean()).flatten()
            if chosen.numel() > 4 * len(images):  # a question that no symbol answers
                chosen = chosen[: 4 * len(images)]
            if best[chosen].sum() > 1e6:
                chosen = chosen[:1]
            rows = torch.div(chosen, 2, rounding_mode="floor")
            found.append({"boxes": box[chosen], "scores": best[chosen], "labels": label[chosen], "rows": rows})
        return found


def images(seed=0, size=16):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, size, size, generator=generator, dtype=torch.float64) for _ in range(2)]


@pytest.fixture
def net():
    torch.manual_seed(0)
    net = Detector().double()
    nn.init.normal_(net.norm.bias)
    pk.convert(net)
    return net.eval()


def prune(net):
    for group in pk.coupled_groups(net, images()):
        if not group.is_output:
            group.set_masks(net, torch.arange(group.width) % 2 == 0)


def assert_same(a, b):
    for one, other in zip(a, b, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_groups_of_a_detector(net):
    groups = pk.coupled_groups(net, images())
    # both levels go into the tower, so that what makes them belongs together
    assert [(g.layers, g.is_output) for g in groups] == [
        (("stem", "down"), False), (("tower",), False), (("scores",), True), (("boxes",), True)
    ]  # fmt: skip
    assert list(groups[0].norms) == ["norm"] and set(groups[1].readers) == {"scores", "boxes"}


def test_a_detector_shrinks_in_its_own_class(net):
    prune(net)
    small = pk.shrink(net, images())
    assert isinstance(small, Detector) and small.tower.weight.shape[:2] == (4, 4) and small.boxes.out_channels == 4
    for seed, size in ((1, 16), (2, 24)):
        assert_same(small(images(seed, size)), net(images(seed, size)))


def test_its_graph_form_is_refused(net):
    prune(net)
    with pytest.raises(ValueError, match="shrink: form: expected .* path .* values .*form=.module."):
        pk.shrink(net, images(), form="graph")
    with pytest.raises(ValueError, match="fold_constants"):
        pk.shrink(net, images(), fold_constants=True)


def test_a_detector_trains_in_compacted_mode_as_in_masked_mode(net):
    import copy

    prune(net)
    nets = [net, copy.deepcopy(net)]
    optimizers = [torch.optim.SGD(n.parameters(), 0.1, momentum=0.9) for n in nets]
    for step in range(2):
        given = images(step), torch.full((4,), 0.5, dtype=torch.float64)
        nets[0].train()(*given)["loss"].backward()
        optimizers[0].step()
        with pk.compacted(nets[1].train(), images(), optimizers[1]) as (small, opt):
            assert small.tower.weight.shape[0] == 4
            small(*given)["loss"].backward()
            opt.step()
        [o.zero_grad() for o in optimizers]
    for a, b in zip(nets[0].state_dict().values(), nets[1].state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_masks_of_a_detector_are_tidied(net):
    prune(net)
    net.scores.set_masks(input=torch.zeros(8, dtype=torch.bool))
    net.boxes.set_masks(input=torch.arange(8) < 2)
    assert pk.tidy_masks(net, images()).filters == {"tower": [2, 4, 6]}


def test_a_method_prunes_a_detector(net):
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    method = pk.methods.GHFP(net, optimizer, rate=0.5, epochs=1, coupling="joint", example_input=images())
    assert set(method.left_out) == {"scores", "boxes"}


def test_a_network_that_no_trace_follows_is_still_an_error():
    class Strange(nn.Conv2d):
        def forward(self, x):
            return super().forward(torch.from_numpy(x.detach().numpy() + 1))

    with pytest.raises(ValueError, match="coupled_groups: model: expected a network that torch.export can trace"):
        pk.coupled_groups(Strange(3, 4, 1), torch.randn(2, 3, 8, 8))
