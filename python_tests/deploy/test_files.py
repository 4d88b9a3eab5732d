"""The files of a saved network: the safetensors format, what is refused and how, and what is overwritten."""

import json
import os
import random
import re

import pytest
import torch
from torch import nn

import prunekernels as pk
from cases.deploy import round_trip
from prunekernels.deploy.layers import LAYERS, build_layer, describe_layer
from prunekernels.deploy.operations import FUNCTIONS, TENSOR_OPERATIONS, function_of, name_of
from prunekernels.deploy.tensor_file import read_tensors, write_tensors
from prunekernels.deploy.values import DTYPES, decode, encode

# ---- tensors


def every_tensor():
    torch.manual_seed(0)
    tensors = {name: torch.randint(0, 2, (3, 5)).to(dtype) for name, dtype in DTYPES.items()}
    return tensors | {"scalar": torch.tensor(3.5), "none": torch.zeros(0, 4), "strided": torch.randn(4, 6)[:, ::2]}


def test_every_dtype(tmp_path):
    tensors = every_tensor()
    write_tensors(tmp_path / "t", tensors, {"id": "7"})
    found, metadata = read_tensors(tmp_path / "t")
    assert metadata == {"id": "7"} and found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name].float(), tensor.float()), name


def test_nothing_but_empty_tensors(tmp_path):
    write_tensors(tmp_path / "t", {"none": torch.zeros(0, 4)}, {})
    assert read_tensors(tmp_path / "t")[0]["none"].shape == (0, 4)


def test_as_the_library_of_the_format_has_it(tmp_path):
    library = pytest.importorskip("safetensors.torch")
    tensors = {name: t for name, t in every_tensor().items() if name not in ("uint16", "uint32", "uint64", "complex64")}
    write_tensors(tmp_path / "ours", tensors, {"format": "pt"})
    theirs = library.load_file(tmp_path / "ours")
    assert all(torch.equal(theirs[name].float(), tensor.float()) for name, tensor in tensors.items())
    library.save_file({name: t.contiguous() for name, t in tensors.items()}, tmp_path / "theirs")
    ours, _ = read_tensors(tmp_path / "theirs")
    assert all(torch.equal(ours[name].float(), tensor.float()) for name, tensor in tensors.items())


def test_weights_of_another_tool(tmp_path):
    """Trained elsewhere and written by the format's own library: no id, another order."""
    library = pytest.importorskip("safetensors.torch")
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    round_trip(net, tmp_path / "net", torch.randn(2, 3, 4, 4))
    state = {name: value + 1 for name, value in net.state_dict().items()}
    library.save_file(state, tmp_path / "net" / "model.safetensors")
    loaded = pk.load_small(tmp_path / "net").state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in state.items())


def with_header(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


BROKEN = {
    "claims more bytes": ({"a": entry(shape=(2**40,), offsets=(0, 2**42))}, "expected 4398046511104 bytes of tensors"),
    "claims more than it counts": ({"a": entry(shape=(2**40,))}, "expected 4398046511104 bytes for"),
    "overlaps": ({"a": entry(), "b": entry()}, "expected its bytes at 8, got 0"),
    "gap": ({"a": entry(offsets=(4, 12))}, "expected its bytes at 0, got 4"),
    "left over": ({"a": entry(shape=(1,), offsets=(0, 4))}, "more than the header tells"),
    "negative": ({"a": entry(shape=(-2,), offsets=(0, -8))}, "expected dtype, shape and data_offsets"),
    "no number": ({"a": entry(shape=("2",))}, "expected dtype, shape and data_offsets"),
    "true": ({"a": entry(shape=(True, 2))}, "expected dtype, shape and data_offsets"),
    "unknown dtype": ({"a": entry("F4")}, "expected dtype, shape and data_offsets"),
    "no entry": ({"a": 3}, "expected dtype, shape and data_offsets"),
    "a list": ([], "expected a JSON object, got list"),
    "no JSON": (b"{]", "expected JSON"),
    "no text": (b"\xff\xfe", "expected JSON"),
    "deep": (b"[" * 100_000, "expected JSON"),
    "twice": (b'{"a": 1, "a": 2}', "a key that is there twice"),
    "metadata": ({"__metadata__": {"a": 1}}, "__metadata__: expected strings"),
    "bool": ({"a": entry("BOOL", (8,))}, "expected bytes 0 and 1 in a tensor of bool, got 7"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_tensors(name, tmp_path):
    header, message = BROKEN[name]
    path = tmp_path / "model.safetensors"
    with_header(path, header, b"\x07" * 8)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        read_tensors(path)
    assert str(path) in str(error.value)


def test_truncated_anywhere(tmp_path):
    path = tmp_path / "model.safetensors"
    write_tensors(path, {"a": torch.randn(5), "b": torch.ones(3)}, {})
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="expected"):
            read_tensors(path)


def test_header_of_huge_length(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes((2**63).to_bytes(8, "little") + b"{}")
    with pytest.raises(ValueError, match=f"expected a header within the file's 10 bytes, got one of {2**63} bytes"):
        read_tensors(path)


# ---- descriptions


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(2))
    round_trip(net, tmp_path / "net", torch.randn(2, 3, 4, 4))
    return tmp_path / "net"


def edited(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def node(config, op="call_module"):
    return next(n for n in config["graphs"]["both"]["nodes"] if n["op"] == op)


def call(target, *args, op="call_function", name="bad"):
    def change(config):
        nodes = config["graphs"]["both"]["nodes"]
        nodes.insert(len(nodes) - 1, {"name": name, "op": op, "target": target, "args": list(args)})

    return change


def setting(*path, to):
    def change(config):
        for key in path[:-1]:
            config = config[key]
        config[path[-1]] = to

    return change


def without(*path):
    def change(config):
        for key in path[:-1]:
            config = config[key]
        del config[path[-1]]

    return change


INJECTED = '__import__("os").system("touch pwned")'
REFUSED = {
    "another format": (setting("format", to="else"), "expected the format 'prunekernels small network', got 'else'"),
    "newer": (setting("version", to=2), "expected version 1 at most, got 2; prunekernels"),
    "no version": (setting("version", to="1"), "expected version 1 at most, got 1"),
    "no graph": (without("graphs"), "got one without graphs"),
    "function": (call("os.system", "touch pwned"), "the function 'os.system'"),
    "builtin": (call("builtins.eval", "1"), "the function 'builtins.eval'"),
    "torch function": (call("torch.load", "x"), "the function 'torch.load'"),
    "operator that opens files": (call("aten.from_file.default", "x"), "the function 'aten.from_file.default'"),
    "attribute of a packet": (call("aten.relu.__class__"), "the function 'aten.relu.__class__'"),
    "attribute": (call("builtins.getattr", {"node": "input_1"}, "__class__"), "the attribute ('__class__',)"),
    "method": (call("__reduce__", {"node": "input_1"}, op="call_method"), "the method '__reduce__'"),
    "method with code": (call(f"add({INJECTED})", {"node": "input_1"}, op="call_method"), "the method"),
    "module with code": (call(f'0"){INJECTED}#', {"node": "input_1"}, op="call_module"), "a node call_module"),
    "unknown module": (call("9", {"node": "input_1"}, op="call_module"), "a node call_module '9'"),
    "parameter that is no tensor": (call("0", op="get_attr"), "a node get_attr '0'"),
    "placeholder with code": (call(f"x={INJECTED}", op="placeholder"), "the name"),
    "name with code": (call("torch.relu", {"node": "input_1"}, name=INJECTED), "the name"),
    "op": (call("torch.relu", op="call_code"), "a node call_code"),
    "node that is not there": (call("torch.relu", {"node": "later"}), "the node 'later' before it is computed"),
    "value": (call("torch.relu", {"python": INJECTED}), "the value {'python'"),
    "tensor": (call("torch.relu", {"tensor": ["float32", 2]}), "the value {'tensor'"),
    "dtype": (call("torch.relu", {"dtype": "load"}), "the value {'dtype'"),
    "device": (call("torch.relu", {"device": "nothing"}), "got RuntimeError"),
    "layer": (setting("layers", "0", "type", to="ModuleList"), "a layer of the class 'ModuleList'"),
    "argument": (setting("layers", "0", "arguments", "code", to=1), "arguments of Conv2d: code"),
    "wrong argument": (setting("layers", "0", "arguments", "in_channels", to="x"), "expected the description"),
    "huge layer": (setting("layers", "0", "arguments", "in_channels", to=10**12), "of [4, 3, 1, 1] in place of"),
    "path": (setting("layers", "a..b", to={"type": "ReLU", "arguments": {}}), "the name 'a..b'"),
    "special path": (setting("layers", "forward", to={"type": "ReLU", "arguments": {}}), "the name 'forward'"),
    "layer in itself": (setting("layers", "0.more", to={"as": "0"}), "the layer '0' again as '0.more'"),
    "layer that is not there": (setting("layers", "9", to={"as": "8"}), "the layer '8' again as '9'"),
    "tensor of another layer": (setting("tensors", "0.more", to=None), "the tensor 0.more of a Conv2d"),
    "no tensor": (without("tensors", "0.weight"), "a layer without the tensor 0.weight"),
    "tensor that the file lacks": (setting("tensors", "0.weight", "as", to="x"), "a network without the tensor 'x'"),
    "gradient": (setting("tensors", "1.num_batches_tracked", to={
        "as": "1.num_batches_tracked", "parameter": True, "requires_grad": True}), "gradients of 1.num_batches"),
    "no output": (lambda config: config["graphs"]["both"]["nodes"].pop(), "a graph without one output at its end"),
    "modes": (setting("graphs", to={"test": {"nodes": []}}), "got"),
    "a list": (setting("graphs", to=[]), "expected the description of a network, got"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_description_is_refused(name, saved, monkeypatch):
    change, message = REFUSED[name]
    edited(saved, change)
    monkeypatch.chdir(saved)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        pk.load_small(saved)
    assert str(error.value).startswith(f"load_small: {saved / 'config.json'}: expected")
    assert not (saved / "pwned").exists()


PARTS = [None, True, -1, 10**30, 0.5, "", "x", "0", "forward", "__class__", [], [[]], {}, {"node": "x"}, {"tuple": []}]


def mutated(value, generator):
    """A copy with one of its parts removed, doubled or replaced."""
    if isinstance(value, dict) and value and generator.random() < 0.9:
        key = generator.choice(sorted(value))
        if generator.random() < 0.1:
            return {k: v for k, v in value.items() if k != key}
        return value | {key: mutated(value[key], generator)}
    if isinstance(value, list) and value and generator.random() < 0.9:
        at = generator.randrange(len(value))
        part = [] if generator.random() < 0.1 else [mutated(value[at], generator)]
        return value[:at] + part * generator.choice([1, 1, 2]) + value[at + 1 :]
    return generator.choice(PARTS)


def test_any_description_is_a_network_or_a_value_error(saved, fuzz_seed):
    generator = random.Random(fuzz_seed)
    config = json.loads((saved / "config.json").read_text())
    refused = 0
    for _ in range(30):
        changed = config
        for _ in range(generator.choice([1, 1, 3])):
            changed = mutated(changed, generator) if isinstance(changed, dict) else changed
        (saved / "config.json").write_text(json.dumps(changed))
        try:
            pk.load_small(saved)
        except ValueError as error:
            refused += 1
            assert str(error).startswith("load_small: "), changed
    assert refused >= 5


@pytest.mark.parametrize("name", ["0.weight", "1.running_var", "1.num_batches_tracked"])
def test_tensor_of_another_size(name, saved):
    tensors, metadata = read_tensors(saved / "model.safetensors")
    tensors[name] = torch.zeros(7)
    write_tensors(saved / "model.safetensors", tensors, metadata)
    with pytest.raises(ValueError, match=rf"the tensor {name} of \[7\] in place of"):
        pk.load_small(saved)


def test_truncated_config(saved):
    whole = (saved / "config.json").read_bytes()
    for length in range(0, len(whole) - 2, 97):
        (saved / "config.json").write_bytes(whole[:length])
        with pytest.raises(ValueError, match="config.json: expected JSON"):
            pk.load_small(saved)


def test_tensors_of_another_network(saved, tmp_path):
    round_trip(nn.Conv2d(3, 4, 1), tmp_path / "other", torch.randn(2, 3, 4, 4))
    os.replace(tmp_path / "other" / "model.safetensors", saved / "model.safetensors")
    with pytest.raises(ValueError, match="expected the tensors of .*config.json, got those of another network"):
        pk.load_small(saved)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_file(name, saved):
    (saved / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"load_small: .*{name}: expected a file that save_small wrote"):
        pk.load_small(saved)


# ---- names


def test_functions_have_one_name():
    for name, function in FUNCTIONS.items():
        assert function_of(name_of(function)) is function, name


def test_every_operation_is_known_to_torch():
    rooms = (torch, torch.nn.functional, torch.Tensor, torch.ops.aten)
    assert [name for name in sorted(TENSOR_OPERATIONS) if not any(hasattr(room, name) for room in rooms)] == []


VALUES = [
    None, True, 3, 2.5, float("inf"), "a'\"", [1, [2]], (1, (2,)), slice(1, None, 2), Ellipsis, {"a": (1,)},
    torch.float32, torch.device("cpu"), torch.channels_last, torch.strided, torch.Size([1, 2]),
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=str)
def test_values(value):
    assert decode(json.loads(json.dumps(encode(value)))) == value


ARGUMENTS = {
    "Conv1d": (3, 4, 2), "Conv2d": (4, 6, (3, 1), 2, (1, 0), 1, 2, False, "reflect"), "Conv3d": (3, 4, 2),
    "ConvTranspose1d": (3, 4, 2), "ConvTranspose2d": (4, 6, 3, 2, 1, 1, 2, False, 2), "ConvTranspose3d": (3, 4, 2),
    "Linear": (3, 4, False), "Embedding": (5, 3, 1), "GroupNorm": (2, 4, 1e-3, False), "LayerNorm": ((3, 4), 1e-3),
    "BatchNorm1d": (4, 1e-3, None), "BatchNorm2d": (4, 1e-3, 0.2, False), "BatchNorm3d": (4, 1e-3, 0.1, True, False),
    "SyncBatchNorm": (4,), "InstanceNorm1d": (4,), "InstanceNorm2d": (4, 1e-3, 0.2, True, True),
    "InstanceNorm3d": (4,), "RMSNorm": ((3,), 1e-3), "LocalResponseNorm": (3, 1e-3), "PReLU": (4,),
    "Threshold": (0.1, 2.0), "MaxPool1d": (2,), "MaxPool2d": (3, 2, 1, 1, False, True), "MaxPool3d": (2,),
    "AvgPool1d": (2,), "AvgPool2d": (3, 2, 1, True, False, 5), "AvgPool3d": (2,), "LPPool2d": (2.0, 3),
    "AdaptiveAvgPool1d": (2,), "AdaptiveAvgPool2d": ((2, None),), "AdaptiveAvgPool3d": (2,),
    "AdaptiveMaxPool1d": (2,), "AdaptiveMaxPool2d": (2,), "ZeroPad2d": ((1, 2, 0, 1),), "ConstantPad2d": (1, 0.5),
    "ReflectionPad2d": (1,), "ReplicationPad2d": (1,), "CircularPad2d": (1,), "Upsample": (None, 2.0, "bilinear", True),
    "UpsamplingNearest2d": (None, 2), "UpsamplingBilinear2d": ((3, 4),), "PixelShuffle": (2,), "PixelUnshuffle": (2,),
    "ChannelShuffle": (2,), "Flatten": (2, 3), "Unflatten": (1, (2, 2)), "Fold": ((4, 4), 2), "Unfold": (2, 1, 1, 2),
    "LeakyReLU": (0.3, True), "Dropout": (0.3, True), "Hardtanh": (-2.0, 3.0, True), "GELU": ("tanh",), "ELU": (0.5,),
    "Softmax": (1,), "LogSoftmax": (1,), "Softplus": (2, 10), "GLU": (1,),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name):
    layer = LAYERS[name](*ARGUMENTS.get(name, ()))
    built = build_layer(json.loads(json.dumps(describe_layer(layer))))
    assert type(built) is type(layer) and str(built) == str(layer)
    own = {key: value for key, value in vars(layer).items() if key not in ("_parameters", "_buffers")}
    assert {key: value for key, value in vars(built).items() if key in own} == own
    assert built.state_dict().keys() == layer.state_dict().keys()


# ---- the folder


def test_nothing_is_overwritten(saved):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    with pytest.raises(FileExistsError, match="folder: expected one without .*config.json, or overwrite=True"):
        pk.save_small(nn.Conv2d(3, 4, 1), saved, torch.randn(2, 3, 4, 4))
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_overwrite_leaves_other_files(saved):
    (saved / "notes.txt").write_text("mine")
    (saved / "model.onnx").write_text("of the network before")
    net, x = nn.Conv2d(3, 4, 1), torch.randn(2, 3, 4, 4)
    pk.save_small(nn.Sequential(net), saved, x, formats=["safetensors"], overwrite=True)
    assert torch.equal(pk.load_small(saved)(x), net(x))
    names = {path.name for path in saved.iterdir()}
    assert names == {"notes.txt", "config.json", "model.safetensors", "README.md"}


def test_failure_leaves_nothing(saved, monkeypatch):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}

    def fail(*args):
        raise RuntimeError("full")

    monkeypatch.setattr("prunekernels.deploy.save.write_card", fail)
    with pytest.raises(RuntimeError, match="full"):
        pk.save_small(nn.Conv2d(3, 4, 1), saved, torch.randn(2, 3, 4, 4), overwrite=True, formats=["safetensors"])
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_folder_is_a_file(tmp_path):
    (tmp_path / "net").write_text("")
    with pytest.raises(NotADirectoryError, match="folder: expected a folder, got the file"):
        pk.save_small(nn.Conv2d(3, 4, 1), tmp_path / "net", torch.randn(2, 3, 4, 4))


# ---- the card


def test_card(tmp_path):
    torch.manual_seed(0)
    model, x = (
        nn.Sequential(pk.MaskedConv2d(3, 8, 3, bias=False), nn.ReLU(), pk.MaskedConv2d(8, 4, 1)),
        torch.randn(2, 3, 8, 8),
    )
    model[0].set_masks(filter=torch.arange(8) < 5)
    small = pk.shrink(model, x)
    options = {"model": model, "accuracy": {"top-1": 0.912, "top-5": 0.99}, "method": "GHFP, rate 0.4"}
    pk.save_small(small, tmp_path / "net", formats=["safetensors"], notes="Trained on digits.", **options)
    card = (tmp_path / "net" / "README.md").read_text()
    assert "| parameters | 159 | 252 |" in card
    assert f"| multiply-adds, [1, 3, 8, 8] | {36 * (27 * 5 + 5 * 4):,} | {36 * (27 * 8 + 8 * 4):,} |" in card
    assert "| top-1 | 0.9120 |  |" in card and "Pruned by: GHFP, rate 0.4" in card and "Trained on digits." in card
    assert "| `0` | 5 | 8 | 5 |" in card and "| `2` | 4 | 4 | 4 |" in card
    assert "model.pt2" not in card
