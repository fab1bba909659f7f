"""A model of another family than SmolLM2, so that nothing is tuned to one: a small GPT-2, trained here once.

    python benchmarks/second_model.py      # about 5 CPU minutes
    python benchmarks/calibrated.py --model gpt2-small --windows 24

GPT-2 has Conv1D in place of nn.Linear, one projection for query, key and value, LayerNorm with biases, learned
positions and GELU. This one has 4.7 million weights in its blocks. It is trained on the docstrings of Python's standard
library and on those documents that :mod:`held_out` neither calibrates nor evaluates on, with a byte-level BPE of that
text. What it has learnt is said beside the perplexity of guessing by the frequency of tokens alone ("unigram", counted
on the same training text). The same Python and the same number of threads give the same model.
"""

import argparse
import ast
import json
import shutil
import sysconfig
import time
from pathlib import Path

import torch
from common import CACHE
from held_out import CHOSEN_ON, HeldOut, articles, evaluation_texts, topics
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

FOLDER = CACHE / "gpt2-small"
END = "<|endoftext|>"
VOCABULARY, LENGTH, BATCH, RATE = 4096, 512, 2, 1.5e-3


def training_text() -> list[str]:
    """Documents in a fixed order."""
    root, documents = Path(sysconfig.get_path("stdlib")), []
    for file in sorted(root.rglob("*.py")):
        if {"site-packages", "test", "tests", "lib2to3"}.intersection(file.relative_to(root).parts):
            continue
        nodes = ast.walk(ast.parse(file.read_bytes()))
        found = (ast.get_docstring(n) for n in nodes if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef))
        documents.append("\n\n".join(filter(None, found)))
    return [*filter(None, documents), *articles()[0::3], *(topics[name] for name in sorted(CHOSEN_ON))]


def train(steps: int) -> Path:
    """The folder of the model, trained once; written beside and renamed."""
    if (FOLDER / "config.json").exists():
        return FOLDER
    documents, work = training_text(), FOLDER.with_name(FOLDER.name + ".part")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(documents, VOCABULARY, special_tokens=[END], show_progress=False)
    trained.save(str(work / "tokenizer.json"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(work / "tokenizer.json"), eos_token=END, bos_token=END)
    tokenizer.save_pretrained(work)
    ids = torch.tensor(tokenizer(END.join(documents), verbose=False)["input_ids"])
    print(f"{len(documents)} documents, {len(ids)} tokens", flush=True)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=256, n_layer=6, n_head=8, n_positions=LENGTH, bos_token_id=0, eos_token_id=0,
        embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0,
    )  # fmt: skip
    model, start = GPT2LMHeadModel(config), time.process_time()
    optimizer = torch.optim.AdamW(model.parameters(), RATE, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps, pct_start=0.1)
    for step in range(steps):
        begins = torch.randint(0, len(ids) - LENGTH, (BATCH,))
        batch = torch.stack([ids[b : b + LENGTH] for b in begins])
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step}: loss {loss.item():.3f}, {time.process_time() - start:.0f} CPU s", flush=True)
    model.save_pretrained(work)
    counts = torch.bincount(ids, minlength=VOCABULARY).float() + 1
    (work / "unigram.json").write_text(json.dumps((counts / counts.sum()).log().tolist()))
    return work.rename(FOLDER)


def perplexities() -> dict[str, tuple[float, float]]:
    """For each evaluation text, the perplexity of the model and of the frequencies of tokens."""
    unigram, found = torch.tensor(json.loads((FOLDER / "unigram.json").read_text())), {}
    for name, text in evaluation_texts().items():
        held = HeldOut(str(FOLDER), text, 16)
        targets = [window[1:] for window in held.windows]
        own = torch.cat([held(i)[: len(t)].gather(1, t[:, None])[:, 0] for i, t in enumerate(targets)])
        found[name] = tuple(float(torch.exp(-lp.mean())) for lp in (own, unigram[torch.cat(targets)]))
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=700)
    args = parser.parse_args()
    train(args.steps)
    learnt = ", ".join(
        f"{own:.0f} on {text} (guessing by the frequency of tokens: {unigram:.0f})"
        for text, (own, unigram) in perplexities().items()
    )
    about = f"a GPT-2 with 4.7 million weights in its blocks (second_model.py), whose perplexity is {learnt}"
    (FOLDER / "described.txt").write_text(about)  # which calibrated.py says
    print(about)


if __name__ == "__main__":
    main()
