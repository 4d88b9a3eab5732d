"""Traces a network into a graph of ATen operators, which tidy_masks, coupled_groups and shrink read."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from ..nn.adapted import computed_layers
from ..nn.convert import bake_all
from ..nn.example import Example
from ..nn.lost_masks import check_no_mask_lost
from ..nn.masked_filters import MaskedFilters
from ..nn.masked_norm import MaskedNorm
from ..nn.norm_over_channels import NormOverChannels
from ..nn.reparametrized import deep_copy
from .by_values import asks_for_values, export_by_values, quiet


@dataclass
class Traced:
    """A traced network. The graph writes nothing in place, except to the nodes in exposed and the views of them."""

    model: nn.Module  # the plain copy that was traced
    graph: fx.Graph
    inputs: Example  # the example, its batch doubled if it was 1 and the trace allows any
    in_spec: Any  # pytree of the arguments
    out_spec: Any  # pytree of the output
    names: dict[fx.Node, str] = field(default_factory=dict)  # of parameters, buffers and constants
    tensors: dict[str, Tensor] = field(default_factory=dict)  # the same, by name
    guards: list[str] = field(default_factory=list)  # Python expressions that hold for all sizes which it serves
    exposed: set[fx.Node] = field(default_factory=set)  # written in place while another view of the memory is read
    computed: list[str] = field(default_factory=list)  # names of the layers whose weight was computed, now stored
    by_values: bool = False  # the forward asks for values: this is the path on which those of the example lead
    norm_masks: dict[str, Tensor] = field(default_factory=dict)  # of norms over channels: bool [C], where some are dead

    def __post_init__(self) -> None:
        self.modules = dict(self.model.named_modules())

    @property
    def placeholders(self) -> list[fx.Node]:
        """The inputs of the network, one for each leaf of the example, without its parameters."""
        return [node for node in self.graph.nodes if node.op == "placeholder" and node not in self.names]

    def is_parameter(self, node: Any) -> bool:
        return node in self.names

    def module_of(self, node: fx.Node) -> str:
        """Qualified name of the innermost module whose forward ran the node, "" for the network itself."""
        stack = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
        known = [path.split("@")[0] for path in stack if not path.startswith("_empty_nn_module_stack")]
        return known[-1].removeprefix("L['self'].") if known else ""

    def owner_of(self, node: fx.Node, weight: Any, attribute: str = "weight") -> str:
        """A name for a node that is a layer: that of the module with the weight, or one made of the weight's name."""
        module, name = self.module_of(node), self.names[weight]
        if getattr(self.modules.get(module), attribute, None) is self.tensors[name]:
            return module or node.name
        return name.removesuffix(f".{attribute}") if name.endswith(f".{attribute}") else f"{name}_{node.name}"

    def attribute_of(self, node: fx.Node, number: int) -> tuple[str, str] | None:
        """The module that ran the node, and its only attribute with this number; None if none or several have it."""
        name = self.module_of(node)
        attributes = vars(self.modules.get(name, nn.Identity()))
        found = [key for key, value in attributes.items() if type(value) is int and value == number]
        return (name, found[0]) if len(found) == 1 and number else None

    def describe(self, node: fx.Node) -> str:
        return f"{self.module_of(node) or 'forward'} ({node.target})"


def read_example(op: str, example_input: Any) -> Example:
    example = Example.of(op, example_input).map(torch.detach)
    if not example.tensors:
        raise TypeError(f"{op}: example_input: expected arguments with a tensor among them, got {example}")
    return example


def check_forward(op: str, model: nn.Module, inputs: Example) -> None:
    """Runs a private copy of a network once; a failure raises ValueError with the name of the innermost module."""
    stack: list[str] = []
    handles = []
    for name, module in model.named_modules():
        about = f"{name or 'forward'} ({type(module).__name__})"
        handles.append(module.register_forward_pre_hook(lambda *_, about=about: stack.append(about), prepend=True))
        handles.append(module.register_forward_hook(lambda *_: stack.pop() and None))
    try:
        with torch.no_grad():
            inputs.call(model)
    except Exception as error:
        where = stack[-1] if stack else f"forward ({type(model).__name__})"
        raise ValueError(
            f"{op}: example_input: expected an input that the network takes, got an error in {where}: {error}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()


def check_shared(op: str, model: nn.Module) -> None:
    """Raises ValueError if layers that share a parameter have different masks: one tensor has one set of zeros."""
    first: dict[int, tuple[str, list[Tensor]]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            dead = _dead_entries(module)
            other, its_dead = first.setdefault(id(parameter), (name, dead))
            if len(dead) != len(its_dead) or not all(map(torch.equal, dead, its_dead)):
                raise ValueError(f"{op}: {other} and {name}: expected the same masks on layers that share parameters")


def _dead_entries(module: nn.Module) -> list[Tensor]:
    if isinstance(module, MaskedFilters):
        masks = [module.filter_mask & module.hard_mask, module.kernel_mask, module.input_mask]
    else:
        masks = [module.channel_mask] if isinstance(module, MaskedNorm) else []
    return [torch.nonzero(~mask) for mask in masks] if not all(bool(mask.all()) for mask in masks) else []


def plain_copy(model: nn.Module, op: str = "plain_copy") -> nn.Module:
    """An independent network of plain layers, in eval mode, with zeros for everything that is dead.

    Norms over several channels have dead channels in their statistics: see norm_masks and narrow.keep_live_alone.
    """
    plain = deep_copy(model)
    if plain.__dict__.pop("_original_forward", None) is not None:  # Accelerate's autocast, around the class's forward
        plain.__dict__.pop("forward", None)
    return make_plain(plain, op)


def make_plain(plain: nn.Module, op: str = "plain_copy") -> nn.Module:
    """Turns a network into one of plain layers, in eval mode, with zeros for everything that is dead, in place.

    A layer that computes its weight stores it from then on. op: the caller, for errors.
    """
    plain.eval()
    for module in plain.modules():
        if isinstance(module, MaskedNorm) and module.weight is None and not bool(module.channel_mask.all()):
            # A plain norm can only give zeros by a weight and a bias of zero.
            _give_factors(module, next(plain.parameters(), torch.ones(())))
    bake_all(plain, op)
    return plain


def _give_factors(norm: Any, like: Tensor) -> None:
    like = next((t for t in (norm._buffers.get("running_var"),) if t is not None), like)
    norm.__dict__["elementwise_affine" if isinstance(norm, nn.LayerNorm) else "affine"] = True
    norm.weight = nn.Parameter(torch.ones(norm._channel_count(), dtype=like.dtype, device=like.device))
    norm.bias = nn.Parameter(torch.zeros_like(norm.weight))


def norm_masks(model: nn.Module) -> dict[str, Tensor]:
    """By name of a norm over several channels with dead ones: which channels its statistics are of, bool [C]."""
    found = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, NormOverChannels) and not bool(module.channel_mask.all()):
            found[name] = module.channel_mask.detach().cpu().clone()
    return found


Freedom = Literal["images", "batch", "none"]


def trace(op: str, model: nn.Module, example_input: Any, free: Freedom = "batch") -> Traced:
    """Traces a plain copy of model. op: the caller, for errors.

    free: which sizes are symbols: those of images and the batch; the batch, if the network allows that; or none. With
    "batch" the forward may depend on values, see Traced.by_values.
    """
    inputs = read_example(op, example_input)
    check_no_mask_lost(op, model)
    check_shared(op, model)
    plain = plain_copy(model, op)
    check_forward(op, plain, inputs)
    by_values = False
    try:
        exported, inputs = export_network(op, plain, inputs, free)
    except ValueError as error:
        found = export_by_values(plain, inputs) if free == "batch" and asks_for_values(error.__cause__) else None
        if found is None:
            raise
        exported, by_values = found, True
    specs = exported.call_spec
    traced = Traced(plain, exported.graph_module.graph, inputs, specs.in_spec, specs.out_spec, by_values=by_values)
    traced.computed, traced.norm_masks = computed_layers(model), norm_masks(model)
    held = {**exported.constants, **dict(plain.named_buffers(remove_duplicate=False))}
    held |= dict(plain.named_parameters(remove_duplicate=False))
    targets = {spec.arg.name: spec.target for spec in exported.graph_signature.input_specs if spec.target is not None}
    for node in traced.graph.nodes:
        if node.op == "placeholder" and node.name in targets:
            traced.names[node] = targets[node.name]
            traced.tensors[targets[node.name]] = held[targets[node.name]]
    if free == "images":
        if not hasattr(exported, "_guards_code"):
            raise ValueError(f"{op}: torch: expected an exporter that tells its guards, got {torch.__version__}")
        traced.guards = [guard for guard in exported._guards_code if set(_SIZE.findall(guard)) - {"0"}]
    _make_functional(traced)
    return traced


_SIZE = re.compile(r"size\(\)\[(\d+)\]")


def export_network(op: str, plain: nn.Module, inputs: Example, free: Freedom) -> tuple[Any, Example]:
    # The exporter takes a size of 1 for a constant, so a batch of one image is doubled.
    doubled = inputs.map(lambda x: torch.cat([x, x]) if x.dim() and x.shape[0] == 1 else x)
    errors = []
    attempts: dict[Freedom, list[tuple[Example, Freedom]]] = {
        "images": [(doubled, "images")], "batch": [(doubled, "batch"), (inputs, "none")], "none": [(inputs, "none")]
    }  # fmt: skip
    for given, freedom in attempts[free]:
        try:
            with quiet(), torch.no_grad():
                copies = given.map(torch.clone)
                shapes = None if freedom == "none" else _free_sizes(plain, copies, freedom)
                exported = torch.export.export(plain, copies.args, copies.kwargs, dynamic_shapes=shapes, strict=False)
        except Exception as error:
            errors.append(error)
            continue
        is_doubled = any(x is not y for x, y in zip(given.tensors, inputs.tensors, strict=True))
        if freedom == "none" or _takes_any_batch(plain, exported, given, is_doubled):
            return exported, given
    raise ValueError(
        f"{op}: model: expected a network that torch.export can trace, got: {errors[-1]}\n"
        "A part of the network can be given instead, such as model.backbone with an input of its own"
    ) from errors[0]


def _takes_any_batch(plain: nn.Module, exported: Any, inputs: Example, is_doubled: bool) -> bool:
    """Whether the network takes other first sizes where the exporter left them free (it may leave channels free)."""
    nodes = [node for node in exported.graph.nodes if node.op == "placeholder"][-len(inputs.leaves) :]
    free = [has_free_batch(node) for node in nodes]
    if not any(free):
        return not is_doubled
    more = [torch.cat([x, x[:1]]) if is_free else x for x, is_free in zip(inputs.leaves, free, strict=True)]
    try:
        with torch.no_grad():
            inputs.with_leaves(more).call(plain)
    except Exception:
        return False
    return True


def _free_sizes(plain: nn.Module, inputs: Example, free: Freedom) -> Any:
    """Tells the exporter which sizes are free: the first one of every tensor, and maybe those of images."""
    auto, static = torch.export.Dim.AUTO, torch.export.Dim.STATIC
    image = auto if free == "images" else static
    shapes = torch.export.ShapesCollection()
    for x in inputs.tensors:
        if x.dim():
            shapes[x] = (auto, *((static, image, image) if x.dim() == 4 else (static,) * (x.dim() - 1)))
    return shapes.dynamic_shapes(plain, inputs.args, inputs.kwargs)


def op_name(node: fx.Node) -> str:
    """ "relu" for aten.relu.default and aten.relu_.default."""
    schema = getattr(node.target, "_schema", None)
    return "" if schema is None or not schema.name.startswith("aten::") else schema.name.removeprefix("aten::")


def argument(node: fx.Node, i: int, default: Any = None) -> Any:
    return node.args[i] if len(node.args) > i else default


def apply(node: fx.Node, *args: Any, **kwargs: Any) -> Any:
    """The node's operator on other arguments."""
    target: Any = node.target
    return target(*args, **kwargs)


def value_of(node: Any) -> Any:
    """The fake tensor that a node gave in the trace (shape, dtype, storage); None if it gave no tensor."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value if isinstance(value, Tensor) else None


def has_free_batch(node: fx.Node) -> bool:
    """Whether the trace took the first size of a node for any size."""
    value = value_of(node)
    return value is not None and value.dim() > 0 and fixed_size(value.shape[0]) is None


def fixed_size(size: Any) -> int | None:
    """A size in the trace, None if it is any size; the trace may have come to one number for a symbol, too."""
    return size if type(size) is int else size.node.maybe_as_int()


def sizes_of(node: Any) -> tuple[int, ...]:
    """Shape in the trace; a free batch size as it was in the example."""
    return tuple(size if type(size) is int else _hint(size) for size in value_of(node).shape)


def _hint(size: Any) -> int:
    node = size.node
    if node.hint is not None:
        return int(node.hint)
    return int(node.expr.xreplace(node.shape_env.real_tensor_prop_unbacked_vals))  # it depends on values


def _storages(graph: fx.Graph) -> dict[fx.Node, int]:
    """A number for each node; nodes of equal number share memory.

    Dropout in eval mode returns its argument itself, although the trace gives it memory of its own.
    """
    storages: dict[fx.Node, int] = {}
    same: dict[int, int] = {}
    for node in graph.nodes:
        value = value_of(node)
        if value is not None:
            own = value.untyped_storage()._cdata
            if "dropout" in str(node.target) and argument(node, 2) is False:
                same.setdefault(own, storages[argument(node, 0)])
            storages[node] = same.get(own, own)
    return storages


def _written(node: fx.Node) -> fx.Node | None:
    """The argument that the operator writes in place."""
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None or not schema.is_mutable or not node.args:
        return None
    info = schema.arguments[0].alias_info
    return node.args[0] if info is not None and info.is_write and isinstance(node.args[0], fx.Node) else None


def _make_functional(traced: Traced) -> None:
    """Replaces relu_ by relu and so on, in place, unless a view that is read later shows the write."""
    order = {node: i for i, node in enumerate(traced.graph.nodes)}
    storages = _storages(traced.graph)
    for node in list(traced.graph.nodes):
        base = _written(node)
        if base is None:
            continue
        aliases = {other for other in storages if storages[other] == storages[base]}
        later = {other for other in order if order[other] > order[node]}
        seen_through_view = {a for a in aliases - {base, node} - later if later & set(a.users)}
        functional = _functional_form(node.target)
        if seen_through_view or traced.is_parameter(base) or functional is None:
            traced.exposed |= aliases
            continue
        node.target = functional
        for user in later & set(base.users):
            user.replace_input_with(base, node)


def _functional_form(target: Any) -> Any:
    name = target._schema.name.split("::")[1]
    packet = getattr(torch.ops.aten, name.removesuffix("_"), None) if name.endswith("_") else None
    return getattr(packet, target._overloadname, None)
