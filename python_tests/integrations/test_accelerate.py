"""What Accelerate puts around a network and its optimizer."""

import pytest
import torch

import prunekernels as pk
from cases.trainers import Net, sgd

accelerate = pytest.importorskip("accelerate", reason="needs accelerate: pip install prunekernels[accelerate]")
X = torch.randn(2, 3, 8, 8)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_graph_is_that_of_the_network(precision):
    """Its autocast around the forward is no part of the network: not of its groups, and not of the small one."""
    net = Net()
    pk.convert(net)
    prepared, optimizer = accelerate.Accelerator(cpu=True, mixed_precision=precision).prepare(net, sgd(net))
    method = pk.methods.GHFP(net, optimizer, rate=0.5, epochs=1, coupling="joint", example_input=X)
    assert not method.left_out and len(method.units) == 2
    method.end_epoch()
    small = pk.shrink(net.eval(), X)
    assert [layer.out_channels for layer in small.modules() if isinstance(layer, torch.nn.Conv2d)] == [4, 3]
    assert "forward" not in vars(small) and ("forward" in vars(net)) == (precision == "bf16")
    expected = accelerate.Accelerator(cpu=True).unwrap_model(prepared, keep_fp32_wrapper=False)
    torch.testing.assert_close(small(X), expected(X))
