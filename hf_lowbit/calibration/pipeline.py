"""Block by block through a float model: the machine that every calibrated method runs in.

For each decoder block, in order: its float weights are read, a :class:`Hook` solves its layers (a :class:`Solution` per
layer: packed tensors, and a low-rank correction if the method makes one), the solutions are written to a file, and the
calibration windows are passed through the solved block, so that the next one sees what the quantized model computes.
Where a hook asks for it, the float model's own activations are passed on beside them.

Memory holds one block in float32 (and the solved copy of its layers), the activations of the calibration windows
between two blocks (W x L x H floats, twice with the float model's; in a file above a budget), as much again for what
solved parts of the block give (:mod:`.replay`, where no budget is set) and the second moments of one input at a time.

A run works in a folder: ``manifest.json`` with all that the result depends on, and a file per block, which gets its
name once it is complete. A run that was stopped, by ``kill -9`` too, goes on after the last finished block: finished
blocks are passed through again from their files, which is the same arithmetic on the same bits, so what comes out is
the same too (on the same machine with the same number of threads: sums depend on both).
"""

import hashlib
import json
import math
import os
from contextlib import ExitStack
from pathlib import Path

import torch
from huggingface_hub.utils import WeakFileLock
from transformers.utils import logging

from ..convert import LOCK, Source, fingerprint, resume
from ..storage.shards import TEMPORARY, explained
from ..version import __version__
from .arguments import Arguments
from .block import Block, Layer, _weight
from .blocks import Blocks
from .folding import still_right
from .hook import Hook
from .processes import Processes
from .residual import check_block
from .run import Run
from .samples import Samples, samples_of
from .stream import Stream

logger = logging.get_logger(__name__)


def calibrate(
    source: Source,
    work: Path,
    hook: Hook,
    tokens: torch.Tensor | Samples | None,
    settings: dict,
    *,
    blocks: Blocks | None = None,
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
        tokens: Calibration windows, int64 (W, L), or other calls of the model; None for a hook that needs no
            activations.
        settings: What the result depends on besides the source and the tokens, for the manifest.
        blocks: The blocks of ``source``, if they were made of ``tokens`` before.
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
    samples = None if hook.activations == "none" or tokens is None else samples_of(tokens, source.model)
    if samples is not None:
        samples.check(source.model)
    if blocks is None:
        blocks = Blocks(source, samples)
    full = [[f"{block}.{n}" for n in names] for block, names in zip(blocks.names, blocks.layers, strict=True)]
    if blocks.residual is not None:
        full.append(blocks.residual.packed_ends(source.plan))
    run = Run(work, full, {name: source.plan.packed[name] for names in full for name in names})
    for name, planned in run.planned.items():
        hook.check(name, planned)
    manifest = {
        "source": {Path(f).name: fingerprint(Path(f)) for f in source.files},
        "settings": {
            **source.config.to_dict(),
            **settings,
            "dtype": str(source.model.config.dtype).removeprefix("torch."),
            "calibration": None if samples is None else samples.digest(),
            "batch_size": batch_size,
            "seed": seed,
            "version": __version__,
        },
    }
    run.identity = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    if shared:
        work = run.work = work / run.identity[:32]
    processes = Processes.current()
    processes.first(lambda: work.mkdir(parents=True, exist_ok=True))
    try:
        with ExitStack() as stack:
            lock = WeakFileLock(work / LOCK, timeout=None if shared else 0.1)
            processes.first(lambda: stack.enter_context(lock) and None)
            processes.first(lambda: resume(work, manifest))
            _solve(blocks, run, hook, samples, batch_size, seed, torch.device(device), max_activation_bytes)
    except TimeoutError:
        raise FileExistsError(f"another process works in {work}: it holds {work / LOCK}") from None
    return run


def _solve(blocks: Blocks, run: Run, hook: Hook, samples: Samples | None, batch_size: int, seed: int, device, limit):
    """Solves what is not solved yet."""
    count = len(blocks.names)
    processes = Processes.current()
    residual = blocks.residual
    if residual is not None and not processes.first(lambda: run.finished(count)):
        processes.first(lambda: run.write(count, *residual.ends(blocks)))
    todo = processes.first(lambda: [i for i in range(count) if blocks.changes(i) and not run.finished(i)])
    if not todo:
        return
    given = samples if samples is None or samples.tokens is None else samples.tokens
    hook.prepare(blocks, run, given, seed, batch_size=batch_size, device=device)
    streams: list[Stream] = []
    if samples is not None:
        both = hook.activations == "both"

        def hold(shape):
            held = _hold(run.work, shape, limit if limit is None or not both else limit // 2)
            return torch.empty(shape, device=device) if held is None else held

        streams = [Stream(blocks, samples, packed, hold, device) for packed in ([True, False] if both else [True])]
    for i in logging.tqdm(range(count), desc=f"Calibrating ({type(hook).__name__})", unit="block"):
        if i > todo[-1]:
            break
        if streams or i in todo:
            _solve_block(blocks, i, i in todo, run, hook, streams, batch_size, seed, device, limit is None)


def _solve_block(blocks, i, todo: bool, run, hook, streams: list[Stream], batch_size, seed, device, keep) -> None:
    """Solves block ``i``, or reads its solution, and passes the activations on."""
    arguments = [stream.enter(i) for stream in streams]
    inputs = [stream.hidden for stream in streams]
    module = blocks.read(i).to(device)
    if blocks.residual is not None and todo:
        check_block(blocks, i, module, inputs[0], arguments[0])
    layers = {
        name: Layer(full, run.planned[full], _weight(module.get_submodule(name)))
        for name, full in zip(blocks.layers[i], run.layers[i], strict=True)
    }
    generator = torch.Generator(device="cpu").manual_seed(seed * 1_000_003 + i)
    hidden, reference = (inputs[k] if k < len(inputs) else None for k in (0, 1))
    own, others = arguments[0] if arguments else Arguments(), arguments[-1] if arguments else None
    block = Block(blocks.names[i], i, module, layers, hidden, reference, own, generator, batch_size, others, keep)
    dtype = blocks.source.model.config.dtype  # in which they will be stored
    if todo:
        block.tuned |= blocks.turned(i, module)
        block.folds = still_right(block, blocks.folds.get(block.name, []), dtype)
        hook.solve(block)
        unsolved = [layer.name for layer in layers.values() if layer.solution is None]
        if unsolved:
            raise RuntimeError(f"{type(hook).__name__} left {unsolved[0]} unsolved")
        tuned = {f"{block.name}.{name}": value.to(dtype).float() for name, value in block.tuned.items()}
        found = {layer.name: layer.solution for layer in layers.values() if layer.solution is not None}
        block.processes.first(lambda: run.write(i, found, tuned))
    if blocks.changes(i):
        solutions = run.read(i)
        for name, layer in layers.items():
            block.set(name, solutions[layer.name])
        for name, value in run.tuned(i).items():
            block.tune(name.removeprefix(block.name + "."), value.to(block.device))
    if streams:
        for stream, outputs in zip(streams, block.advance(), strict=False):
            stream.leave(i, outputs)


def _hold(work: Path, shape: tuple[int, ...], limit: int | None) -> torch.Tensor | None:
    """A float32 tensor of ``shape`` in a file in ``work`` where it takes more than ``limit`` bytes, otherwise None.

    The file has no name any more: it is gone with the process, however that ends.
    """
    nbytes = 4 * math.prod(shape)
    if limit is None or nbytes <= limit:
        return None
    path = work / f"activations-{os.getpid()}{TEMPORARY}"
    with explained(path, nbytes), open(path, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, nbytes)  # a full disk is said now, not by a signal later
    held = torch.from_file(str(path), shared=True, size=math.prod(shape), dtype=torch.float32).view(shape)
    path.unlink()
    return held
