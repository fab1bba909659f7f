"""What merging a trained adapter costs, three ways: KL from the adapted model, perplexity on held-out text, and size.

    python benchmarks/merging.py [--bits 4 2] [--steps 40] [--windows 10]

The model is packed, an adapter (r=8, all linear layers) is trained on the first half of the news text, and each way of
merging is measured on windows of 256 tokens from the second half. Results go to ``results/merging.md``.
"""

import argparse
import gc

import torch
from common import model_folder, news_text, write_results
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_lowbit import LowBitConfig
from hf_lowbit.adapters import merge
from hf_lowbit.evaluate import make_windows


def train(model, windows: torch.Tensor, steps: int) -> float:
    """Trains the adapter of ``model`` on pairs of ``windows`` (W, L) in turn; returns the last loss."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-4)
    model.train()
    for step in range(steps):
        batch = windows[torch.arange(2 * step, 2 * step + 2) % len(windows)]
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return loss.item()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder or repo instead of the default model")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 2])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--windows", type=int, default=10)
    options = parser.parse_args()
    folder, text = model_folder(options.model), news_text()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    training = make_windows(tokenizer, text[: len(text) // 2], 128)
    held_out = make_windows(tokenizer, text[len(text) // 2 :], 256, options.windows)
    note = (
        f"An adapter (r=8, all linear layers) trained for {options.steps} steps of 2 x 128 tokens in float32, on "
        f"{options.model or 'SmolLM2-135M-Instruct, off its grid'}; KL and perplexity on {len(held_out)} windows of "
        "256 tokens of news that it was not trained on."
    )
    rows = []
    for bits in options.bits:
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, quantization_config=LowBitConfig(bits=bits)
        )
        model = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear"))
        train(model, training, options.steps)
        for how in ("requantize", "low_rank", "dequantize"):
            merged, report = merge(model, how, windows=held_out)
            rows.append(
                {
                    "bits": bits,
                    "how": how,
                    "KL(adapted, merged)": report.kl,
                    "±": report.kl_se,
                    "perplexity before": report.before.perplexity,
                    "after": report.after.perplexity,
                    "MB of parameters": sum(p.nbytes for p in merged.parameters()) / 1e6,
                }
            )
            print(rows[-1], flush=True)
            command = f"python benchmarks/merging.py --steps {options.steps} --windows {options.windows}"
            write_results("merging", command, rows, note)
            del merged
            gc.collect()


if __name__ == "__main__":
    main()
