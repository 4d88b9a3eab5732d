"""State dicts of masked networks: a plain network that loads one computes the same; ours loses nothing."""

import copy
import gc
import io
import pickle
from collections import OrderedDict

import pytest
import torch
from torch import nn

import prunekernels as pk
from cases.averages import masked_net
from prunekernels.nn import saved_state

X = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(1))
KEEP = torch.tensor([1, 0, 1, 1, 0, 1, 1, 0], dtype=torch.bool)


def pruned(seed=0):
    """Masks of every kind, over weights, biases and norms that are not zero where they are dead."""
    net = masked_net(seed=seed)
    with torch.no_grad():
        for norm in (net[1], net[4]):
            norm.bias.normal_()
            norm.running_mean.normal_()
    net[0].set_masks(filter=KEEP)
    net[1].set_mask(KEEP)
    net[3].set_masks(input=KEEP, kernel=torch.arange(48).view(6, 8) % 5 != 0)
    return net.eval()


def plain_net():
    net = masked_net(seed=9)
    pk.restore(net)
    return net.eval()


def assert_plain_computes_the_same(state, want):
    plain = plain_net()
    left = plain.load_state_dict(state, strict=False)
    assert not left.missing_keys and all(key.endswith("_mask") for key in left.unexpected_keys)
    torch.testing.assert_close(plain(X), want)


def assert_same_to_the_bit(a, b):
    """Parameters, dead entries included, and masks."""
    assert all(map(torch.equal, a.parameters(), b.parameters()))
    for one, other in zip(a.modules(), b.modules(), strict=True):
        for name in getattr(one, "_mask_names", ()):
            assert torch.equal(getattr(one, name), getattr(other, name))
    torch.testing.assert_close(a(X), b(X), rtol=0, atol=0)


def through_a_file(value, **options):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, **options)


LOSSLESS = {
    "itself": lambda state: state,
    "deepcopy": copy.deepcopy,
    "torch.save": lambda state: through_a_file(state, weights_only=True),
    "torch.save, all": lambda state: through_a_file(state, weights_only=False),
    "in a checkpoint": lambda state: through_a_file({"model": state, "epoch": 3}, weights_only=True)["model"],
}


@pytest.mark.parametrize("through", LOSSLESS.values(), ids=LOSSLESS.keys())
@pytest.mark.parametrize("assign", [False, True])
def test_a_plain_network_computes_the_same_and_ours_loses_nothing(through, assign):
    net = pruned()
    want, before = net(X), copy.deepcopy(net)
    state = through(net.state_dict())
    assert_plain_computes_the_same(state, want)
    assert_same_to_the_bit(net, before)
    again = masked_net(seed=7).eval()
    again.load_state_dict(state, strict=True, assign=assign)
    if assign:
        again = copy.deepcopy(again)
    assert_same_to_the_bit(again, before)
    assert again[0].weight[~KEEP].abs().min() > 0


def test_a_loader_that_knows_no_metadata_gets_the_same_network():
    net = pruned()
    state = {name: value.clone() for name, value in net.state_dict().items()}
    again = masked_net(seed=7).eval()
    again.load_state_dict(state, strict=True)
    torch.testing.assert_close(again(X), net(X), rtol=0, atol=0)
    assert torch.equal(again[0].filter_mask, KEEP) and not again[0].weight[~KEEP].any()


def test_dead_entries_of_every_parameter_are_zero():
    state = pruned().state_dict()
    for name in ("0.weight", "0.bias", "1.weight", "1.bias"):
        assert not state[name][~KEEP].any() and state[name][KEEP].all()
    assert not state["3.weight"][:, ~KEEP].any()
    assert not state["3.weight"][torch.arange(48).view(6, 8) % 5 == 0].any()
    assert state["1.running_mean"].all()  # statistics stay as they are
    assert (
        state["3.kernel_mask"].dtype == torch.float32
        and ((state["3.kernel_mask"] > 0) == pruned()[3].kernel_mask).all()
    )


def test_nan_in_dead_entries_stays_out():
    net = pruned()
    with torch.no_grad():
        net[0].weight[~KEEP] = torch.nan
    assert_plain_computes_the_same(net.state_dict(), net(X))


def test_keys_and_order_are_those_of_a_network_with_nothing_dead():
    assert list(pruned().state_dict()) == list(masked_net().state_dict())


def test_keep_vars_gives_the_parameters_themselves():
    net = pruned()
    state = net.state_dict(keep_vars=True)
    assert all(state[name] is parameter for name, parameter in net.named_parameters())


def test_entries_are_the_parameters_own_memory_where_dead_entries_are_zero():
    net = pruned()
    for layer in (net[0], net[1], net[3]):
        layer.zero_dead()
    state = net.state_dict()
    assert all(state[name].data_ptr() == parameter.data_ptr() for name, parameter in net.named_parameters())
    assert all(saved_state.DEAD_VALUES not in entry for entry in state._metadata.values())


def test_a_prefixed_dictionary():
    net = pruned()
    wrapped = nn.DataParallel(net).state_dict()
    assert set(wrapped) == {f"module.{name}" for name in net.state_dict()}
    nn.modules.utils.consume_prefix_in_state_dict_if_present(wrapped, "module.")
    again = masked_net(seed=7).eval()
    again.load_state_dict(wrapped)
    assert_same_to_the_bit(again, net)
    own = OrderedDict()
    net.state_dict(destination=own, prefix="net.")
    assert not own["net.0.weight"][~KEEP].any()


# ---- older checkpoints, parts of checkpoints


def test_masks_that_were_saved_as_bool():
    net = pruned()
    own = {name: value.detach() for name, value in net.state_dict(keep_vars=True).items()}
    state = {name: value.bool() if name.endswith("_mask") else value for name, value in own.items()}
    for assign in (False, True):
        again = masked_net(seed=7).eval()
        again.load_state_dict(copy.deepcopy(state), assign=assign)
        assert_same_to_the_bit(copy.deepcopy(again), net)
        assert again[0]._buffers["filter_mask"].dtype == torch.float32


def as_saved_before(net):
    """The pickled state of layers whose masks and tables were buffers."""
    old = copy.deepcopy(net)
    for layer in old.modules():
        if hasattr(layer, "_mask_names"):
            layer._buffers.update({name: getattr(layer, name).clone() for name in layer._mask_names})
            del layer.__dict__["_masks"]
            layer.__dict__["_seen"] = (0,) * len(layer._mask_names)
        if isinstance(layer, pk.MaskedConv2d):
            for name in ("_mask_table", "_grad_table", "_grad_scale"):
                layer._buffers[name] = layer.__dict__.pop(name)
                layer._non_persistent_buffers_set.add(name)
    return {name: layer.__dict__ for name, layer in old.named_modules()}


def test_a_module_that_was_pickled_with_bool_buffers():
    net, saved = pruned(), as_saved_before(pruned())
    for name, layer in list(net.named_modules()):
        if hasattr(layer, "_mask_names"):
            loaded = type(layer).__new__(type(layer))
            loaded.__setstate__(saved[name])
            setattr(net, name, loaded)
    assert_same_to_the_bit(net, pruned())
    assert {buffer.dtype for buffer in net[0].buffers()} == {torch.float32}
    net[0].set_masks(filter="all")
    assert net[0](X)[:, ~KEEP].abs().max() > 0


def test_the_checkpoint_of_a_plain_network_makes_all_live():
    net = pruned()
    net.load_state_dict(plain_net().state_dict())
    torch.testing.assert_close(net(X), plain_net()(X))


def test_the_checkpoint_of_a_plain_layer_with_one_tensor_makes_all_live():
    layer = pk.MaskedConv2d(4, 8, 3, bias=False)
    layer.set_masks(filter=KEEP)
    layer.load_state_dict(nn.Conv2d(4, 8, 3, bias=False).state_dict())
    assert layer.filter_mask.all()


def test_a_checkpoint_of_another_size_is_refused_in_the_usual_way():
    net = pruned()
    net[0] = pk.MaskedConv2d(3, 9, 3, padding=1)
    with pytest.raises(RuntimeError, match=r"size mismatch for 0\.weight.*"):
        net.load_state_dict(pruned().state_dict())


def test_a_part_of_a_checkpoint_leaves_other_masks_alone():
    net = pruned()
    net.load_state_dict({"9.weight": torch.zeros(3, 4)}, strict=False)
    net.load_state_dict({"0.bias": torch.zeros(8)}, strict=False)
    net.load_state_dict({"0.hard_mask": torch.ones(8)}, strict=False)
    assert torch.equal(net[0].filter_mask, KEEP) and torch.equal(net[1].channel_mask, KEEP)


def test_a_load_wins_over_an_edit_from_before():
    net = pruned()
    state = copy.deepcopy(net.state_dict())
    net[0].filter_mask.fill_(True)
    net.load_state_dict(state)
    assert torch.equal(net[0].filter_mask, KEEP)
    net[0].filter_mask[1] = True
    net.load_state_dict({"0.bias": torch.ones(8)}, strict=False)
    assert net[0].filter_mask[1]


def test_an_edit_is_in_the_state_dict():
    net = masked_net()
    net[0].filter_mask[1] = False
    state = net.state_dict()
    assert state["0.filter_mask"].tolist() == [1, 0, 1, 1, 1, 1, 1, 1] and not state["0.weight"][1].any()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), through_a_file])
def test_copies_of_the_network_keep_all(copied):
    net = pruned()
    state = net.state_dict()
    again = copied(net) if copied is not through_a_file else copied(net, weights_only=False)
    assert_same_to_the_bit(again, net)
    with torch.no_grad():
        state["0.weight"].fill_(1)  # stands for the first network's memory, not for the copy's
    assert not (again[0].weight[KEEP] == 1).all()


# ---- a copy stands for the parameter


def test_what_is_written_into_a_state_dict_goes_into_the_parameters():
    net = pruned()
    dead = net[0].weight[~KEEP].detach().clone()
    new = {name: torch.randn_like(p) for name, p in net.named_parameters()}
    with torch.no_grad():
        for name, value in net.state_dict().items():
            if name in new:
                value.copy_(torch.where(value != 0, new[name], value))
    gc.collect()
    state = net.state_dict()
    for name in ("0.weight", "0.bias", "1.weight", "1.bias"):
        assert torch.equal(state[name][KEEP], new[name][KEEP])
        assert not state[name][~KEEP].any()
    del state
    want = torch.nn.functional.conv2d(X, new["0.weight"], new["0.bias"], padding=1)[:, KEEP]
    torch.testing.assert_close(net[0](X)[:, KEEP], want)
    assert torch.equal(net[0].weight[~KEEP], dead)
    assert torch.equal(net[0].weight[KEEP], new["0.weight"][KEEP])


def test_live_values_written_into_dead_entries_are_kept():
    net = pruned()
    state = net.state_dict()
    with torch.no_grad():
        state["0.weight"].fill_(2.0)
    net[0].set_masks(filter="all")
    assert (net[0].weight == 2).all()
    assert net.state_dict()["0.weight"].data_ptr() == net[0].weight.data_ptr()


def test_a_state_dict_that_is_kept_follows_training():
    net = pruned()
    net.train()
    optimizer = torch.optim.SGD(net.parameters(), 0.1, weight_decay=0.1)
    state = net.state_dict()
    for _ in range(2):
        net(X).square().mean().backward()
        optimizer.step()
        for name in ("0.weight", "0.bias", "1.weight"):
            parameter = net.get_parameter(name)
            assert torch.equal(state[name][KEEP], parameter[KEEP]) and not state[name][~KEEP].any()
            assert parameter[~KEEP].abs().min() > 0
    net[0].set_masks(filter="all")
    assert torch.equal(state["0.weight"], net[0].weight)
    net[0].set_masks(filter=~KEEP)
    assert torch.equal(state["0.weight"][~KEEP], net[0].weight[~KEEP]) and not state["0.weight"][KEEP].any()
    net.load_state_dict(pruned(seed=4).state_dict())
    assert torch.equal(state["0.weight"][KEEP], net[0].weight[KEEP]) and not state["0.weight"][~KEEP].any()


def test_a_state_dict_made_in_inference_mode():
    net = pruned()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    with torch.inference_mode():
        state = net.state_dict()
    net(X).square().mean().backward()
    optimizer.step()
    assert torch.equal(state["0.weight"][KEEP], net[0].weight[KEEP]) and not state["0.weight"][~KEEP].any()
    with torch.no_grad():
        state["0.weight"].mul_(2)
    want = net[0].weight[KEEP] * 2
    net(X)
    assert torch.equal(net[0].weight[KEEP], want)


def test_copies_are_forgotten_when_nothing_holds_them():
    net = pruned()
    state = net.state_dict()
    assert net[0]._copies is not None and saved_state._hooks
    net(X)
    assert net[0]._copies is not None
    del state
    net(X)
    assert net[0]._copies is None and net[1]._copies is None
    assert not any(layer in saved_state._layers for layer in net.modules())


def test_no_copies_while_nothing_is_dead():
    net = masked_net()
    state = net.state_dict()
    assert net[0]._copies is None and state["0.weight"].data_ptr() == net[0].weight.data_ptr()


# ---- what others save


class Pretrained(nn.Module):
    """Saves and loads as transformers and safetensors do: names and contiguous tensors, nothing else."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def save_pretrained(self):
        return {name: value.contiguous().numpy().copy() for name, value in self.state_dict().items()}

    @classmethod
    def from_pretrained(cls, net, saved):
        model = cls(net)
        known = model.state_dict()
        model.load_state_dict({name: torch.from_numpy(v) for name, v in saved.items() if name in known}, strict=False)
        return model.eval()


def test_save_pretrained():
    net = pruned()
    saved = Pretrained(net).save_pretrained()
    torch.testing.assert_close(Pretrained.from_pretrained(plain_net(), saved).net(X), net(X))
    torch.testing.assert_close(Pretrained.from_pretrained(masked_net(seed=7), saved).net(X), net(X))


def test_safetensors(tmp_path):
    torch_files = pytest.importorskip("safetensors.torch")
    net = pruned()
    torch_files.save_file(net.state_dict(), tmp_path / "net.safetensors")
    state = torch_files.load_file(tmp_path / "net.safetensors")
    assert_plain_computes_the_same(state, net(X))
    again = masked_net(seed=7).eval()
    again.load_state_dict(state, strict=True)
    torch.testing.assert_close(again(X), net(X))
    torch_files.save_model(net, str(tmp_path / "model.safetensors"))
    plain = plain_net()
    torch_files.load_model(plain, str(tmp_path / "model.safetensors"), strict=False)
    torch.testing.assert_close(plain(X), net(X))


def test_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")

    class Config(transformers.PretrainedConfig):
        def __init__(self, masked=True, **options):
            super().__init__(**options)
            self.masked = masked

    class Model(transformers.PreTrainedModel):
        config_class = Config

        def __init__(self, config):
            super().__init__(config)
            self.net = nn.Sequential(*(copy.deepcopy(m) for m in plain_net()))
            if config.masked:
                pk.convert(self)
            self.post_init()

        def forward(self, x):
            return self.net(x)

    model = Model(Config())
    model.net.load_state_dict(pruned().state_dict())
    model.eval()
    model.save_pretrained(tmp_path)
    again = Model.from_pretrained(tmp_path).eval()
    assert torch.equal(again.net[0].filter_mask, KEEP) and again.net[0].weight.device.type == "cpu"
    torch.testing.assert_close(again(X), model(X))
    half = Model.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert torch.equal(half.net[0].filter_mask, KEEP)
    plain = Model.from_pretrained(tmp_path, config=Config(masked=False)).eval()
    assert type(plain.net[0]) is nn.Conv2d
    torch.testing.assert_close(plain(X), model(X))
