"""Calls of a compiled graph again, as long as nothing has changed that the first call looked at.

``torch.compile`` checks at every call that its graph still holds, by some 10,000 guards for a model of 30 layers, and
collects 1000 packed tensors for the graph anew: a quarter of a token's time in a small model. What a guard can find is
a change: of a module or of something that it refers to, of an argument, of torch's settings. So after a call with all
guards, :class:`Repeated` keeps what the graph was given, and shallow copies of the dictionaries, lists and sets that
can be reached from the model and from the arguments. Later calls compare them, which is one comparison in C, and hand
the same tensors to the same graph. Any difference leads back to the call with all guards, which compiles again if it
has to, and is remembered in its turn.

A call is remembered only if nothing else happened in it than the graph: no container changed, and the result is made of
the graph's outputs and of arguments. Left out: calls with gradients, and functions and classes that are replaced while
a model is in use, which are not looked at.
"""

import functools
import operator
import threading
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import eval_frame
from torch.nn.modules.module import _has_any_global_hook

from .packed import PackedMixin

ATTEMPTS = 8  # to remember a call, without one that could be repeated; then it is not tried any more
_PLAIN = (str, bytes, int, float, complex, type(None), torch.dtype, torch.device, torch.Size)
_NOT_ENTERED = (*_PLAIN, type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.MethodType)
_CONTAINERS = (dict, list, set)
_SEQUENCES = (list, tuple, set, frozenset)
_MEMBERS = ("_parameters", "_buffers", "_modules")
_ASIDE = vars(nn.Module()).keys() - {"training"} | {"hf_quantizer", "generation_config"}  # what no call looks at
_OF_PACKED = ("training", "spec", "activations", "backend", "streamed", "low_rank")  # the others never change


class Picture:
    """Everything that can be reached from some objects through attributes and containers, as it is now.

    What is compared at every token has left the processor's caches since the last one: so of a module's attributes
    those are taken that a call can look at, and of empty containers only that they are. Hooks are left out, as torch
    leaves them out of its guards.
    """

    def __init__(self, *roots: object):
        self.tensors: set[int] = set()  # by id; they stay alive in the copies
        self._containers: list[Any] = []
        self._empty: list[Any] = []
        self._modules: list[dict] = []  # their attributes
        self._getters: list[Callable] = []
        self._seen: set[int] = set()
        waiting = list(roots)
        while waiting:
            waiting += self._enter(waiting.pop())
        self._copies = [dict(c) if isinstance(c, dict) else c.copy() for c in self._containers]
        self._sizes = list(map(len, self._modules))
        self._values = self._attributes()

    def _enter(self, found: object) -> Iterable:
        """Notes an object; what it holds."""
        if isinstance(found, _NOT_ENTERED) or id(found) in self._seen:
            return ()
        self._seen.add(id(found))
        if isinstance(found, Tensor):
            self.tensors.add(id(found))
            return ()
        if isinstance(found, nn.Module):
            return self._enter_module(found)
        if isinstance(found, _CONTAINERS):
            (self._containers if found else self._empty).append(found)
        inside = found.values() if isinstance(found, dict) else found if isinstance(found, _SEQUENCES) else ()
        attributes = getattr(found, "__dict__", None)
        return inside if attributes is None else [*inside, attributes]

    def _enter_module(self, module: nn.Module) -> Iterable:
        attributes, packed = vars(module), isinstance(module, PackedMixin)
        names = tuple(name for name in (_OF_PACKED if packed else attributes.keys() - _ASIDE) if name in attributes)
        self._modules.append(attributes)
        self._getters.append(_getter(names))
        inside = [attributes[name] for name in _MEMBERS if attributes[name]]
        return inside if packed else [*inside, *(attributes[name] for name in names)]

    def _attributes(self) -> list:
        return [get(attributes) for get, attributes in zip(self._getters, self._modules, strict=True)]

    def holds(self) -> bool:
        """Whether all is as it was: the same objects in the same places, or equal ones."""
        try:
            return (
                not any(self._empty)
                and list(map(len, self._modules)) == self._sizes
                and self._attributes() == self._values
                and self._containers == self._copies
            )
        except (KeyError, RuntimeError, ValueError, TypeError):  # deleted; two tensors or arrays have no single answer
            return False


@functools.cache
def _getter(names: tuple[str, ...]) -> Callable:
    return operator.itemgetter(*names)


def _settings() -> tuple:
    """What of torch's state a graph depends on."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_num_threads(),
        torch.get_default_dtype(),
        torch.is_autocast_enabled("cpu"),
        torch.are_deterministic_algorithms_enabled(),
        torch._C._len_torch_dispatch_stack(),
        torch._C._len_torch_function_stack(),
        torch._C._functorch.peek_interpreter_stack(),
        torch._C._get_tracing_state(),
        _has_any_global_hook(),
        eval_frame._stance,
    )


def _form(tensor: Tensor) -> tuple:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad


def _place(tensor: Tensor) -> tuple:
    return tensor.data_ptr(), tensor.dtype


class _Call:
    """A call that can be repeated: its arguments, what the graph got, and how its result is made."""

    def __init__(self, arguments: dict, pictures: list[Picture], settings: tuple, run: Callable, flat: list, own: set):
        self.pictures, self.settings, self.run, self.flat = pictures, settings, run, flat
        self.names = arguments.keys()
        self.tensors = {name: value for name, value in arguments.items() if type(value) is Tensor}
        self.others = {name: value for name, value in arguments.items() if type(value) is not Tensor}
        self.forms = {name: _form(tensor) for name, tensor in self.tensors.items()}
        given = {id(tensor): name for name, tensor in self.tensors.items()}
        self.where = {given[id(t)]: i for i, t in enumerate(flat) if id(t) in given}
        # Of codes the library knows where they lie, and asks if they lie elsewhere.
        self.fixed = [t for t in flat if id(t) not in given and id(t) not in own]
        self.places = [_place(tensor) for tensor in self.fixed]

    def again(self, arguments: dict) -> bool:
        """Whether a call with these arguments is the same to the graph."""
        if arguments.keys() != self.names or _settings() != self.settings:
            return False
        seen = set()
        for name, form in self.forms.items():
            tensor = arguments[name]
            if type(tensor) is not Tensor or _form(tensor) != form:
                return False
            seen.add(id(tensor))
        if len(seen) != len(self.forms):
            return False
        for name, value in self.others.items():
            new = arguments[name]
            if new is not value and not (type(new) is type(value) and isinstance(new, _PLAIN) and new == value):
                return False
        return all(p.holds() for p in self.pictures) and [_place(t) for t in self.fixed] == self.places

    def repeat(self, arguments: dict) -> object:
        flat = self.flat.copy()
        for name, position in self.where.items():
            flat[position] = arguments[name]
        outputs = self.run(*flat)
        return self.kind(**{k: outputs[v] if type(v) is int else arguments.get(v) for k, v in self.made.items()})

    def explains(self, result: object, outputs: tuple | list, arguments: dict) -> bool:
        """Whether the result is a mapping of outputs of the graph, arguments and None; remembers of which."""
        if not isinstance(result, Mapping):
            return False
        numbers = {id(output): i for i, output in enumerate(outputs)}
        names = {id(value): name for name, value in arguments.items()}
        self.kind = type(result)
        self.made = {k: numbers.get(id(v), "" if v is None else names.get(id(v))) for k, v in result.items()}
        return None not in self.made.values()


def _remembering(backend: Callable, ran: threading.local) -> Callable:
    """``backend`` with graphs that note their calls in ``ran``. torch keeps it for ever, so it knows of no model."""

    def remembering(graph, inputs):
        run = backend(graph, inputs)

        def remembered(*flat):
            outputs = run(*flat)
            if (calls := getattr(ran, "calls", None)) is not None:
                calls.append((run, flat, outputs))
            return outputs

        return remembered

    return remembering


class Repeated:
    """A function of a model, compiled with ``backend``, whose calls are repeated where nothing has changed.

    Args:
        model: What the function computes with.
        compile: Given a backend of ``torch.compile``, returns the compiled function, which takes keyword arguments.
        backend: The backend that makes the graph.
    """

    def __init__(self, model: nn.Module, compile: Callable, backend: Callable):
        self._model = model
        self._ran = threading.local()  # what ran in the call of a thread: graph, inputs, outputs
        self._call: _Call | None = None
        self._picture: Picture | None = None
        self._left = ATTEMPTS
        self._compiled = compile(_remembering(backend, self._ran))

    def __call__(self, **arguments):
        call = self._call
        if call is not None and call.again(arguments):
            self._left = ATTEMPTS
            return call.repeat(arguments)
        if not self._left or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self._compiled(**arguments)
        self._left -= 1
        self._call = None
        if self._picture is None or not self._picture.holds():
            self._picture = Picture(self._model)
        pictures = [self._picture, Picture(*arguments.values())]
        settings, self._ran.calls = _settings(), []
        try:
            result = self._compiled(**arguments)
        finally:
            ran, self._ran.calls = self._ran.calls, None
        if len(ran) == 1:
            self._call = self._repeatable(arguments, pictures, settings, result, *ran[0])
        return result

    def repeater(self, arguments: dict) -> Callable[[dict], Any] | None:
        """What repeats the last call without looking for changes, for a loop that makes none but of tensors' values.

        Args:
            arguments: As in the calls that will be repeated.
        """
        call = self._call
        return call.repeat if call is not None and call.again(arguments) else None

    def _repeatable(self, arguments, pictures, settings, result, run, flat, outputs) -> "_Call | None":
        """The call that was just done, if it can be repeated."""
        reached = set().union(*(picture.tensors for picture in pictures))
        if _settings() != settings or not all(id(tensor) in reached for tensor in flat):
            return None
        packed = [m for m in self._model.modules() if isinstance(m, PackedMixin)]
        own = {id(parameter) for m in packed for name, parameter in m._parameters.items() if name in m.packed_names}
        call = _Call(arguments, pictures, settings, run, list(flat), own)
        explained = call.explains(result, outputs, arguments)
        return call if explained and all(picture.holds() for picture in pictures) else None
