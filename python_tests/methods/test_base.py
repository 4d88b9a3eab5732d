"""What all methods share: bad input, budgets, duty, masks, history, checkpoints."""

import pytest
import torch
from method_cases import EVERY, convs, run


@pytest.mark.parametrize("name", EVERY)
def test_every_method_reaches_its_rate(name):
    net, _, method = run(EVERY[name], epochs=10)
    assert method.finished and len(method.history) == 10
    assert [counts[:3] for counts in method.history[-1].values()] == [(4, 0, 4), (6, 0, 6), (5, 0, 5)]
    for name, conv in convs(net).items():
        assert torch.equal(conv.filter_mask, method.states[name] == 0)
        assert torch.equal(conv.hard_mask, conv.filter_mask)
        assert not conv.weight[~conv.filter_mask].any()
