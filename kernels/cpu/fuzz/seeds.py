"""Writes small coded tensors of every kind to a folder, for the fuzzer: ``python kernels/cpu/fuzz/seeds.py FOLDER``."""

import sys
from pathlib import Path

import torch

from hf_lowbit.storage import entropy, entropy_plain


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    for number, (symbols, kind) in enumerate(entropy_plain.SYMBOLS.items()):
        for rows in (1, 9):
            entropy.BLOCK_SYMBOLS = 200
            values = torch.randn(rows, 2 * kind.unit, generator=generator) * 5
            tensor = values.round().clamp(-20, 20).to(torch.int8).view(torch.uint8)
            if symbols == entropy_plain.TERNARY:
                digits = torch.randint(0, 243, (rows, 64), dtype=torch.uint8, generator=generator) // 100
                tensor = torch.from_numpy(entropy_plain.SYMBOLS[symbols].join(digits.numpy(), None))
            tensor = tensor.repeat(1, 1 + 300 // tensor.shape[1])
            (folder / f"{number}-{rows}").write_bytes(entropy.encode(tensor, symbols).numpy().tobytes())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
