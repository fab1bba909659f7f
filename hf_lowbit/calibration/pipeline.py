"""Block by block through a float model: the machine that every calibrated method runs in.

For each decoder block, in order: its float weights are read, a :class:`Hook` solves its layers (a :class:`Solution` per
layer: packed tensors, and a low-rank correction if the method makes one), the solutions are written to a file, and the
calibration windows are passed through the solved block, so that the next one sees what the quantized model computes.
Where a hook asks for it, the float model's own activations are passed on beside them.

Memory holds one block in float32 (and the solved copy of its layers), the activations of the calibration windows
between two blocks (W x L x H floats, twice with the float model's; in a file above a budget) and the second moments of
one input at a time.

A run works in a folder: ``manifest.json`` with all that the result depends on, and a file per block, which gets its
name once it is complete. A run that was stopped, by ``kill -9`` too, goes on after the last finished block: finished
blocks are passed through again from their files, which is the same arithmetic on the same bits, so what comes out is
the same too (on the same machine with the same number of threads: sums depend on both).
"""

import copy
import hashlib
import json
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from huggingface_hub.utils import WeakFileLock
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.utils import logging

from ..convert import LOCK, Source, fingerprint, resume
from ..plan import Packed
from ..storage.shards import TEMPORARY, explained, sync_folder
from ..version import __version__
from .blocks import Arguments, Blocks
from .data import digest
from .statistics import Moments

logger = logging.get_logger(__name__)
TOKENS = "tokens"  # key in a block file's metadata: tokens that each layer saw


@dataclass
class Solution:
    """What a method decided for one layer.

    Attributes:
        tensors: The packed weight, by suffix, as :meth:`Format.pack` returns it.
        lora_a: A (r, K), float32, or None.
        lora_b: B (N, r), float32: the layer computes ``x (Q + B A)^T``.
        tokens: How many tokens of the calibration its choice rests on, or None where it looked at none.
    """

    tensors: dict[str, torch.Tensor]
    lora_a: torch.Tensor | None = None
    lora_b: torch.Tensor | None = None
    tokens: int | None = None


@dataclass
class Layer:
    """One linear layer to solve: its name in the model, its format and method, its float32 weight (N, K)."""

    name: str
    planned: Packed
    weight: torch.Tensor
    solution: Solution | None = None

    def value(self, solution: Solution) -> torch.Tensor:
        """``Q + B A``, float32 (N, K)."""
        weight = self.planned.format.dequantize(solution.tensors, self.planned.shape)
        if solution.lora_a is not None and solution.lora_b is not None:
            weight = torch.addmm(weight, solution.lora_b, solution.lora_a)
        return weight


class Hook(ABC):
    """A method that works on a whole block. Its fields (a dataclass) are its options, and part of the manifest.

    Attributes:
        activations: What it needs: "none", "quantized" (what the block gets in the quantized model), or "both" (the
            float model's too).
    """

    activations: ClassVar[str] = "quantized"

    def check(self, name: str, planned: Packed) -> None:  # noqa: B027  (most have nothing to check)
        """Raises ``ValueError`` if the layer ``name`` cannot be solved as it is planned; asked before any work."""

    def prepare(  # noqa: B027  (most have nothing to prepare)
        self, blocks: Blocks, run: "Run", tokens: torch.Tensor | None, seed: int, **options: Any
    ) -> None:
        """What has to be known of the whole float model before its first block is solved.

        It is called whenever a run begins or goes on, and may keep files in the folder of ``run``.

        Args:
            blocks: The model.
            run: The run.
            tokens: The calibration windows.
            seed: For random choices.
            options: ``batch_size`` and ``device``, as in :func:`calibrate`.
        """

    @abstractmethod
    def solve(self, block: "Block") -> None:
        """Calls :meth:`Block.set` for every layer of ``block``. The result must depend on the block alone."""


class LayerHook(Hook):
    """A method that works on one layer after the other, each with the inputs that the solved ones before it leave."""

    @abstractmethod
    def solve_layer(self, layer: Layer, moments: Moments | None, generator: torch.Generator) -> Solution:
        """The solution for ``layer`` from the ``moments`` of its inputs (None without activations)."""

    def solve(self, block: "Block") -> None:
        for group in block.groups():
            moments = None if self.activations == "none" else block.moments(group)
            for name in group:
                block.set(name, self.solve_layer(block.layers[name], moments, block.generator))


class Block:
    """One decoder block with its activations, as a hook sees it.

    Attributes:
        name, index: Which one.
        layers: Layers to solve by their name in the block, in the model's order.
        module: The block as solved so far, float32.
        reference: The float block.
        inputs: (W, L, H) what the block gets in the quantized model, or None without activations. On the CPU where it
            is spilled to a file, otherwise on ``device``, where the block is.
        reference_inputs: (W, L, H) what it gets in the float model, or None.
        arguments: What else it gets.
        generator: For all random choices in this block.
        batch_size: Windows that run together.
    """

    def __init__(self, name, index, reference, layers, inputs, reference_inputs, arguments, generator, batch_size):
        self.name, self.index, self.reference, self.layers = name, index, reference, layers
        self.inputs, self.reference_inputs, self.arguments = inputs, reference_inputs, arguments
        self.generator, self.batch_size = generator, batch_size
        self.device = next((p.device for p in reference.parameters()), torch.device("cpu"))
        # Parameters that nobody changes are shared with the float block.
        shared = {id(p): p for p in reference.parameters()}
        self.module = copy.deepcopy(reference, shared)

    def set(self, name: str, solution: Solution) -> None:
        """Takes ``solution`` for the layer ``name`` and puts its value into the solved block."""
        layer = self.layers[name]
        layer.solution = solution
        weight = self.as_parameter(name, layer.value(solution))[name + ".weight"]
        self.module.get_submodule(name).weight = nn.Parameter(weight.contiguous(), requires_grad=False)

    def as_parameter(self, name: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
        """``value`` (N, K) for the layer ``name`` as its module keeps it, by the parameter's name."""
        return {name + ".weight": value if _is_linear(self.module.get_submodule(name)) else value.T}

    def batches(self) -> list[torch.Tensor]:
        """Numbers of the windows that run together."""
        return self.arguments.batches(self.batch_size)

    @torch.no_grad()
    def outputs(self, module: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
        """Outputs (W, L, H) of ``module`` for ``inputs`` (W, L, H)."""
        result = torch.empty_like(inputs)
        for windows in self.batches():
            result[windows] = self._run(module, inputs, windows).to(result.device)
        return result

    @torch.no_grad()
    def advance(self) -> None:
        """Replaces the block's inputs by its outputs, batch by batch.

        Raises:
            ValueError: if the solved block's outputs are not finite.
        """
        for module, inputs in ((self.module, self.inputs), (self.reference, self.reference_inputs)):
            for windows in self.batches() if inputs is not None else ():
                inputs[windows] = self._run(module, inputs, windows).to(inputs.device)
                if module is self.module and not torch.isfinite(inputs[windows]).all():
                    raise ValueError(
                        f"the activations after {self.name} are not finite: the model is damaged, or too few bits "
                        "broke it"
                    )

    def _run(self, module, inputs, windows) -> torch.Tensor:
        """Outputs (b, L, H) of ``module`` for some windows of ``inputs``, which may lie on another device."""
        return self.arguments.run(module, inputs[windows].to(self.device), windows)

    def error(self, target: torch.Tensor) -> float:
        """Mean squared error of the output (W, L, H) of the block as solved so far, from ``target`` (W, L, H)."""
        assert self.inputs is not None
        return float((self.outputs(self.module, self.inputs) - target).double().square().mean())

    @torch.no_grad()
    def groups(self) -> list[list[str]]:
        """Names of the layers in the order in which they run, those with the same input together.

        Without activations, or where a layer did not run in the first window, it is a group of its own.
        """
        if self.inputs is None:
            return [[name] for name in self.layers]
        seen: list[tuple[torch.Tensor, list[str]]] = []

        def note(name):
            def hook(module, args):
                group = next((names for x, names in seen if x is args[0]), None)
                if group is None:
                    seen.append((args[0], [name]))
                else:
                    group.append(name)

            return hook

        with _hooks(self.module, {name: note(name) for name in self.layers}):
            first = self.batches()[0][:1]
            self._run(self.module, self.inputs, first)
        ran = [names for _, names in seen]
        return ran + [[name] for name in self.layers if not any(name in names for names in ran)]

    @torch.no_grad()
    def moments(
        self, group: list[str], batches: list[torch.Tensor] | None = None, cross: bool | None = None
    ) -> Moments:
        """The moments of the common input of ``group``.

        Args:
            group: Names of layers.
            batches: Some of :meth:`batches`; all by default.
            cross: Whether cross moments too; by default where the float activations are there.
        """
        name = group[0]
        cross = self.reference_inputs is not None if cross is None else cross
        assert self.inputs is not None
        moments = Moments(self.layers[name].weight.shape[1], cross, self.device)
        for windows in self.batches() if batches is None else batches:
            x = self._input_of(name, self.module, self.inputs, windows)
            r = self._input_of(name, self.reference, self.reference_inputs, windows) if cross else None
            if x is not None and (not cross or r is not None):
                moments.add(x, r)
        return moments

    def _input_of(self, name, module, inputs, windows) -> torch.Tensor | None:
        """What the layer ``name`` gets; the forward pass ends there. None if it does not run."""

        def catch(module, args):
            raise _Caught(args[0])

        try:
            with _hooks(module, {name: catch}):
                self._run(module, inputs, windows)
        except _Caught as caught:
            return caught.x
        return None


class _Caught(Exception):
    def __init__(self, x):
        self.x = x


class _hooks:
    """Forward pre-hooks on modules of ``module`` by name, removed on leaving."""

    def __init__(self, module, by_name):
        self.handles = [module.get_submodule(n).register_forward_pre_hook(hook) for n, hook in by_name.items()]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


# -- the run -----------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """A run in the folder ``work``; calling it with a module's name gives its packed tensors, or None.

    Attributes:
        work: The folder.
        layers: For each block, the full names of its solved modules.
        planned: What was planned for each of them.
        identity: Hash of all that the result depends on.
    """

    work: Path
    layers: list[list[str]]
    planned: dict[str, Packed]
    identity: str = ""
    _open: dict[int, dict[str, Solution]] = field(default_factory=dict)

    def __post_init__(self):
        self._block_of = {name: i for i, names in enumerate(self.layers) for name in names}

    def path(self, index: int) -> Path:
        """The file of block ``index``."""
        return self.work / f"block-{index:05d}.safetensors"

    def finished(self, index: int) -> bool:
        """Whether block ``index`` is solved."""
        return self.path(index).is_file()

    def write(self, index: int, solutions: dict[str, Solution]) -> None:
        """Writes the solutions of a block, by full module name, beside and renames."""
        tensors = {}
        counts = {name: s.tokens for name, s in solutions.items() if s.tokens is not None}
        for name, s in solutions.items():
            tensors.update({f"{name}.weight{suffix}": t.contiguous() for suffix, t in s.tensors.items()})
            if s.lora_a is not None and s.lora_b is not None:
                tensors[f"{name}.lora_A"], tensors[f"{name}.lora_B"] = s.lora_a.contiguous(), s.lora_b.contiguous()
        path = self.path(index)
        temporary = path.with_name(path.name + TEMPORARY)
        with explained(path, sum(t.nbytes for t in tensors.values())):
            save_file(tensors, temporary, {TOKENS: json.dumps(counts)} if counts else None)
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)

    def read(self, index: int) -> dict[str, Solution]:
        """The solutions of a finished block, by full module name.

        Raises:
            ValueError: if the file does not hold what was planned, naming it.
        """
        tensors, counts, found = load_file(self.path(index)), self._tokens(index), {}
        for name in self.layers[index]:
            planned = self.planned[name]
            expected = planned.format.tensors(planned.shape)
            stored: dict[str, torch.Tensor] = {}
            for suffix, (shape, dtype) in expected.items():
                tensor = tensors.get(f"{name}.weight{suffix}")
                if tensor is None or tuple(tensor.shape) != tuple(shape) or tensor.dtype != dtype:
                    raise ValueError(f"{self.path(index)} is damaged at {name}.weight{suffix}: remove it and go on")
                stored[suffix] = tensor
            found[name] = Solution(stored, tensors.get(f"{name}.lora_A"), tensors.get(f"{name}.lora_B"))
            found[name].tokens = counts.get(name)
        return found

    def __call__(self, name: str) -> dict[str, torch.Tensor] | None:
        index = self._block_of.get(name)
        if index is None:
            return None
        if index not in self._open:
            self._open.clear()  # one block at a time
            self._open[index] = self.read(index)
        return self._open[index][name].tensors

    def tokens(self) -> dict[str, int]:
        """For each module whose solution rests on calibration, how many tokens it saw."""
        found = {}
        for index in range(len(self.layers)):
            found.update(self._tokens(index) if self.layers[index] else {})
        return found

    def _tokens(self, index: int) -> dict[str, int]:
        with safe_open(self.path(index), "pt") as file:
            return json.loads((file.metadata() or {}).get(TOKENS, "{}"))

    def solutions(self) -> Iterator[tuple[str, Solution]]:
        """Every module's solution, a block at a time."""
        for index in range(len(self.layers)):
            yield from (self.read(index) if self.layers[index] else {}).items()


def calibrate(
    source: Source,
    work: Path,
    hook: Hook,
    tokens: torch.Tensor | None,
    settings: dict,
    *,
    batch_size: int = 2,
    seed: int = 0,
    device: torch.device | str = "cpu",
    max_activation_bytes: int | None = None,
    shared: bool = False,
) -> Run:
    """Solves every packed layer in the decoder blocks of ``source``, or goes on with a run that was stopped.

    Args:
        source: The float model, from :func:`hf_lowbit.convert.open_source`.
        work: The folder of the run; made if it does not exist.
        hook: The method.
        tokens: Calibration windows, int64 (W, L); None for a hook that needs no activations.
        settings: What the result depends on besides the source and the tokens, for the manifest.
        batch_size: Windows that run together, where the model treats them alike.
        seed: For all random choices.
        device: Where blocks and activations are held and computed.
        max_activation_bytes: Activations between blocks that take more lie in a file in ``work``, not in memory.
        shared: Whether ``work`` holds many runs, each in a folder that is named after all that its result depends on;
            a process waits there for another one that makes the same run.

    Returns:
        The finished run.

    Raises:
        ValueError: if ``tokens`` are missing or there is a run with other settings in ``work``.
        FileExistsError: if ``work`` holds something else, or another process works there.
    """
    if hook.activations != "none" and tokens is None:
        raise ValueError(f"{type(hook).__name__} needs calibration data: give calibration=, such as a list of texts")
    if tokens is not None:
        text = source.model.config.get_text_config(decoder=True)
        limit = getattr(text, "max_position_embeddings", None)
        if limit and tokens.shape[1] > limit:
            raise ValueError(
                f"calibration windows of {tokens.shape[1]} tokens are longer than the model's {limit} positions: use a "
                "smaller length"
            )
        if not 0 <= int(tokens.min()) <= int(tokens.max()) < text.vocab_size:
            raise ValueError(
                f"calibration tokens go from {int(tokens.min())} to {int(tokens.max())}, the model's vocabulary from 0 "
                f"to {text.vocab_size - 1}: use the model's own tokenizer"
            )
    tokens = None if hook.activations == "none" else tokens
    blocks = Blocks(source)
    full = [[f"{block}.{n}" for n in names] for block, names in zip(blocks.names, blocks.layers, strict=True)]
    run = Run(work, full, {name: source.plan.packed[name] for names in full for name in names})
    for name, planned in run.planned.items():
        hook.check(name, planned)
    manifest = {
        "source": {Path(f).name: fingerprint(Path(f)) for f in source.files},
        "settings": {
            **source.config.to_dict(),
            **settings,
            "dtype": str(source.model.config.dtype).removeprefix("torch."),
            "calibration": digest(tokens),
            "batch_size": batch_size,
            "seed": seed,
            "version": __version__,
        },
    }
    run.identity = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    if shared:
        work = run.work = work / run.identity[:32]
    work.mkdir(parents=True, exist_ok=True)
    try:
        lock = WeakFileLock(work / LOCK, timeout=None if shared else 0.1)
        with lock:
            resume(work, manifest)
            _solve(blocks, run, hook, tokens, batch_size, seed, torch.device(device), max_activation_bytes)
    except TimeoutError:
        raise FileExistsError(f"another process works in {work}: it holds {work / LOCK}") from None
    return run


def _solve(blocks: Blocks, run: Run, hook: Hook, tokens, batch_size: int, seed: int, device, limit: int | None) -> None:
    """Solves what is not solved yet."""
    count = len(blocks.names)
    todo = [i for i in range(count) if blocks.layers[i] and not run.finished(i)]
    if not todo:
        return
    hook.prepare(blocks, run, tokens, seed, batch_size=batch_size, device=device)
    hidden, reference, arguments = None, None, [Arguments()] * count
    if tokens is not None:
        both = hook.activations == "both"

        def hold(shape):
            held = _hold(run.work, shape, limit if limit is None or not both else limit // 2)
            return torch.empty(shape, device=device) if held is None else held

        hidden, arguments = blocks.capture(tokens, hold, packed=True)
        reference = blocks.capture(tokens, hold)[0] if both else None
        arguments = [a.to(device) for a in arguments]
    for i in logging.tqdm(range(count), desc=f"Calibrating ({type(hook).__name__})", unit="block"):
        if i > todo[-1]:
            break
        if hidden is None and i not in todo:
            continue
        _solve_block(blocks, i, run, hook, hidden, reference, arguments[i], batch_size, seed, device)


def _solve_block(blocks, i, run, hook, hidden, reference, arguments, batch_size, seed, device) -> None:
    """Solves block ``i``, or reads its solution, and passes the activations on in place."""
    module = blocks.read(i).to(device)
    layers = {
        name: Layer(full, run.planned[full], _weight(module.get_submodule(name)))
        for name, full in zip(blocks.layers[i], run.layers[i], strict=True)
    }
    generator = torch.Generator(device="cpu").manual_seed(seed * 1_000_003 + i)
    block = Block(blocks.names[i], i, module, layers, hidden, reference, arguments, generator, batch_size)
    if layers and not run.finished(i):
        hook.solve(block)
        unsolved = [layer.name for layer in layers.values() if layer.solution is None]
        if unsolved:
            raise RuntimeError(f"{type(hook).__name__} left {unsolved[0]} unsolved")
        run.write(i, {layer.name: layer.solution for layer in layers.values()})
    if layers:
        solutions = run.read(i)
        for name, layer in layers.items():
            block.set(name, solutions[layer.name])
    if hidden is not None:
        block.advance()


def _hold(work: Path, shape: tuple[int, ...], limit: int | None) -> torch.Tensor | None:
    """A float32 tensor of ``shape`` in a file in ``work`` where it takes more than ``limit`` bytes, otherwise None.

    The file has no name any more: it is gone with the process, however that ends.
    """
    nbytes = 4 * math.prod(shape)
    if limit is None or nbytes <= limit:
        return None
    path = work / ("activations" + TEMPORARY)
    with explained(path, nbytes), open(path, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, nbytes)  # a full disk is said now, not by a signal later
    held = torch.from_file(str(path), shared=True, size=math.prod(shape), dtype=torch.float32).view(shape)
    path.unlink()
    return held


def _weight(module: nn.Module) -> torch.Tensor:
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    return (weight if _is_linear(module) else weight.T).detach()
