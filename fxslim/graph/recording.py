# SPDX-License-Identifier: Apache-2.0
"""One real forward, written down operator by operator.

A dispatch mode sees every ATen operator that runs, so Python control flow and data-dependent sizes are
resolved by the real values. Parameters and buffers are known by identity. Nothing of the model is
changed: mode, buffers and random state are restored.
"""

import contextlib
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from fxslim.errors import TraceError
from fxslim.graph.function_calls import CalledFunctions, users_line
from fxslim.graph.inputs import Inputs, output_tensors
from fxslim.graph.masked_states import masked_state
from fxslim.graph.model_state import HookState, ModelState
from fxslim.graph.tagged_attributes import TaggedAttributes
from fxslim.graph.tagged_sizes import NumbersRead, TaggedInt, noting_numbers
from fxslim.graph.torch_switches import plain_forwards
from fxslim.graph.weight_norms import find_weight_norms

# Arguments that are written down as they are.
_PLAIN = (int, float, str)


class _Recorder(TorchDispatchMode):
    """Writes each executed operator into an fx.Graph."""

    def __init__(self, model: nn.Module, module_stack: list[str]) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self._nodes: dict[int, tuple[ReferenceType[Tensor], fx.Node]] = {}
        self.states = {id(t): name for name, t in named_states(model)}
        # The weight that each mask was put on.
        self.masks: dict[str, str] = {}
        # What stands for weights under weight norm.
        self.weights: set[fx.Node] = set()
        self.norms = {(norm.direction, norm.gain) for norm in find_weight_norms(model)}
        self.functions = CalledFunctions(self.node_of, self.take_whole)
        self.inside_whole = False
        self.module_stack = module_stack

    def known_node(self, value: Tensor) -> fx.Node | None:
        """The node that made a tensor; a dead tensor's id may have been given to another one."""
        reference, node = self._nodes.get(id(value), (None, None))
        return node if reference is not None and reference() is value else None

    def node_of(self, value: Tensor) -> fx.Node:
        """The node that made a tensor; else it is a parameter, a buffer or a constant."""
        node = self.known_node(value)
        if node is None:
            name = self.states.get(id(value))
            node = self._new_node("get_attr", name, name) if name else self._new_node("placeholder", "constant")
            if name is None and value.dim() == 0 and not (value.is_meta or value.is_complex()):
                node.meta["number"] = value.item()
            self._remember(node, value)
        return node

    def _new_node(self, op: str, target: Any, name: str = "") -> fx.Node:
        """A node without arguments: create_node would search them for symbolic sizes, and names for capitals."""
        return self.graph.create_node(op, target, name=name.replace(".", "_") or target)

    def _written_down(self, value: Any) -> Any:
        """An argument with nodes for tensors."""
        if isinstance(value, Tensor):
            return self.node_of(value)
        if isinstance(value, list | tuple):
            items = [self._written_down(item) for item in value]
            return items if isinstance(value, list) else tuple(items)
        return value if value is None or isinstance(value, _PLAIN) else repr(value)

    def _remember(self, node: fx.Node, value: Tensor) -> None:
        node.meta["shape"] = tuple(value.shape)
        node.meta["is_mask"] = value.dtype in (torch.bool, torch.uint8)
        node.meta["stride"] = value.stride() if value.layout == torch.strided else ()
        self._nodes[id(value)] = ref(value), node

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.inside_whole:
            return func(*args, **kwargs)
        found = masked_state(func, args, self.states)
        if found is not None:
            return self._masked(func(*args, **kwargs), *found)
        is_view = func._schema.is_mutable and any(value._is_view() for value in _written(func, args, kwargs))
        inputs = self._written_down(args), {key: self._written_down(value) for key, value in kwargs.items()}
        result = func(*args, **kwargs)
        self._write(func, inputs, result, mutates_view=bool(is_view))
        return result

    def _masked(self, result: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
        """A masked weight stands for the weight."""
        self.masks[self.states[id(mask)]] = self.states[id(weight)]
        self._nodes[id(result)] = ref(result), self.node_of(weight)
        return result

    def _is_normed(self, func: Any, args: Any) -> bool:
        """Whether a function computes a weight under weight norm that is known by its layer."""
        names = (self.states.get(id(value)) for value in args[:2])
        return func is torch._weight_norm and tuple(names) in self.norms

    def take_whole(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Write one operator for a function and nothing of what it runs; a direction stands for the weight."""
        if self._is_normed(func, args):
            with _disable_current_modes():
                result = func(*args, **kwargs)
            name = self.states[id(args[0])]
            self._remember(self._new_node("get_attr", name, name), result)
            self.weights.add(self._nodes[id(result)][1])
            return result
        inputs = self._written_down(args), {key: self._written_down(value) for key, value in kwargs.items()}
        self.inside_whole = True
        try:
            result = func(*args, **kwargs)
        finally:
            self.inside_whole = False
        self._write(func, inputs, result, mutates_view=False)
        return result

    def _write(self, func: Any, inputs: Any, result: Any, *, mutates_view: bool) -> None:
        node = self._new_node("call_function", func, getattr(func, "__name__", "function"))
        node.args, node.kwargs = inputs
        node.meta["call"] = self.functions.current
        node.meta["module"] = self.module_stack[-1] if self.module_stack else ""
        node.meta["mutates_view"] = mutates_view
        if isinstance(result, Tensor):
            self._remember(node, result)
        else:
            # Several results, or a number.
            node.meta["shape"] = None if isinstance(result, tuple | list) else ()
        if isinstance(result, tuple | list):
            for i, item in enumerate(result):
                if isinstance(item, Tensor):
                    taken = self._new_node("call_function", operator.getitem, "getitem")
                    taken.args = (node, i)
                    self._remember(taken, item)


def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The arguments that an operator writes to."""
    values = []
    for i, argument in enumerate(func._schema.arguments):
        value = args[i] if i < len(args) else kwargs.get(argument.name)
        if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, Tensor):
            values.append(value)
    return values


@dataclass(frozen=True, kw_only=True, eq=False)
class ModuleCall:
    """One call of a module: the nodes of the tensors that it was given and that it gave back, in order."""

    name: str
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]


class Recording:
    """The graph of one forward, the nodes of the model's inputs and outputs, and sizes that were used as numbers.

    ``masks``: the weight that each mask was put on. ``weights``: directions that stand for a weight under weight norm.
    ``calls``: those of the modules, in the order in which they ended.
    ``again`` runs the same forward with other answers where it uses
    sizes as numbers.
    """

    def __init__(
        self,
        graph: fx.Graph,
        inputs: list[fx.Node],
        outputs: list[fx.Node],
        numbers: list[TaggedInt],
        masks: dict[str, str],
        weights: set[fx.Node],
        calls: list[ModuleCall],
        again: Callable[[tuple[int, ...]], "Recording"],
    ) -> None:
        self.graph = graph
        self.inputs = inputs
        self.outputs = outputs
        self.numbers = numbers
        self.masks = masks
        self.weights = weights
        self.calls = calls
        self.again = again

    @property
    def nodes(self) -> list[fx.Node]:
        return list(self.graph.nodes)


def named_states(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and buffers by their first name, tied ones once."""
    return [*model.named_parameters(), *model.named_buffers()]


@contextlib.contextmanager
def undisturbed(model: nn.Module, training: bool) -> Iterator[None]:
    """Set train or eval mode; afterwards modes, buffers, attributes and random state are as they were."""
    before, hooks = ModelState(model), HookState(model)
    try:
        plain_forwards()
        model.train(training)
        with torch.random.fork_rng():
            yield
    finally:
        before.restore()
        hooks.restore()


@contextlib.contextmanager
def _tracked_modules(model: nn.Module, recorder: _Recorder, calls: list[ModuleCall]) -> Iterator[None]:
    stack, given = recorder.module_stack, list[tuple[fx.Node, ...]]()

    def nodes(values: Any) -> tuple[fx.Node, ...]:
        known = (recorder.known_node(value) for value in tree_leaves(values) if isinstance(value, Tensor))
        return tuple(node for node in known if node is not None)

    def enter(name: str, args: Any, kwargs: Any) -> None:
        stack.append(name)
        given.append(nodes((args, kwargs)))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        calls.append(ModuleCall(name=stack.pop(), inputs=given.pop(), outputs=nodes(output)))

    handles = []
    for name, module in model.named_modules():
        entering = module.register_forward_pre_hook(
            lambda module, args, kwargs, name=name: enter(name, args, kwargs), with_kwargs=True
        )
        handles += [entering, module.register_forward_hook(leave, always_call=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def record(model: nn.Module, inputs: Inputs, *, training: bool = False, answers: tuple[int, ...] = ()) -> Recording:
    """Run the model once and write down what it executes; again where it wrote to an object that modules share."""
    untouched = set[int]()
    while True:
        tags = TaggedAttributes(model, untouched)
        try:
            made = _recorded(model, inputs, training, answers, tags)
        except TraceError:
            if not tags.written:
                raise
        else:
            if not tags.written:
                return made
        untouched |= tags.written


def _recorded(
    model: nn.Module, inputs: Inputs, training: bool, answers: tuple[int, ...], tags: TaggedAttributes
) -> Recording:
    example, inputs = inputs, inputs.copied()
    numbers = NumbersRead(answers, users_line)
    calls = list[ModuleCall]()
    recorder = _Recorder(model, [])
    given = [value for value in tree_leaves((inputs.args, inputs.kwargs)) if isinstance(value, Tensor)]
    input_nodes = []
    for value in given:
        node = recorder._new_node("placeholder", "input")
        recorder._remember(node, value)
        input_nodes.append(node)
    with undisturbed(model, training), torch.no_grad(), _tracked_modules(model, recorder, calls):
        try:
            with noting_numbers(numbers), tags, recorder.functions, recorder:
                outputs = inputs.run(model)
        except Exception as error:
            mode = "train" if training else "eval"
            raise TraceError(
                f"the model's own forward failed while it was recorded in {mode} mode with {inputs}: "
                f"{type(error).__name__}: {error}"
            ) from error
    leaves = output_tensors(outputs)
    if not leaves:
        raise TraceError(f"the model returned no tensor for {inputs}, but {type(outputs).__name__}")
    made = [recorder.known_node(leaf) for leaf in leaves]
    return Recording(
        recorder.graph,
        input_nodes,
        [found for found in made if found is not None],
        numbers.sizes,
        recorder.masks,
        recorder.weights,
        calls,
        lambda other: record(model, example, training=training, answers=other),
    )
