"""Finetuning: memory and time of a LoRA step beside float LoRA and bitsandbytes, and perplexity that training recovers.

    python benchmarks/finetune.py                      # a step: r=8 on all linears, 2 x 128 tokens
    python benchmarks/finetune.py --recover            # 2 bits from every initialisation, trained on news
    python benchmarks/finetune.py --only 'ours|bf16'   # with bitsandbytes: pip install 'hf-lowbit[bench,peers]'

Every contestant is a process of its own, and with several rounds they take turns. Ours load a repo that is packed
already, bitsandbytes packs while loading. Memory is resident memory above that after the imports: "peak MB" counts
everything (VmHWM), mapped weights of a bfloat16 file too; "anonymous MB" leaves mapped files out (RssAnon, sampled).
Seconds are of the wall; CPU seconds count all threads and suffer less from what else runs on the machine.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from common import CACHE, earlier_rows, model_folder, news_text, write_results
from held_out import calibration_documents
from loading import Peak, anonymous_mb

SEED = 0
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Name: (packed repo to make, dtype).
STEP = {
    "ours int4, fp32": ("int4", "float32"),
    "ours int2, fp32": ("int2", "float32"),
    "LoRA fp32": (None, "float32"),
    "bitsandbytes nf4, fp32": ("nf4", "float32"),
    "ours int4, bf16": ("int4", "bfloat16"),
    "ours int2, bf16": ("int2", "bfloat16"),
    "LoRA bf16": (None, "bfloat16"),
    "bitsandbytes nf4, bf16": ("nf4", "bfloat16"),
}
# Name: packed repo, with an adapter in it where there is a method, and dtype.
RECOVER = {
    "2 bits, zeros": ("int2-zeros", "float32"),
    "2 bits, LoftQ": ("int2-loftq", "float32"),
    "2 bits, EoRA": ("int2-eora", "float32"),
    "2 bits, ApiQ-lw": ("int2-apiq-lw", "float32"),
    "2 bits, ApiQ-bw": ("int2-apiq-bw", "float32"),
    "LoRA fp32, not packed": (None, "float32"),
    "LoRA bf16, not packed": (None, "bfloat16"),
    "bitsandbytes nf4 (QLoRA), 4 bits": ("nf4", "float32"),
}
RANK = 16  # of the adapters in benchmarks/adapters.py


def split_news() -> tuple[list[str], str]:
    """Articles to train on, and the text of the others, on which no adapter was calibrated either."""
    articles = [line for line in news_text().splitlines() if line.strip()]
    return [a for i, a in enumerate(articles) if i % 3], "\n".join(articles[::3])


def high_water_mb() -> tuple[float, float]:
    """Resident memory of this process: the largest so far, and now."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return tuple(int(fields[key].split()[0]) * 1024 / 1e6 for key in ("VmHWM", "VmRSS"))


def prepare(source: str, name: str) -> Path:
    """The packed repo ``name`` of the model ``source``, made once."""
    if "-" in name:
        folder, method = CACHE / "adapters" / f"{name}-r{RANK}", name.split("-", 1)[1]
        if not (folder / "adapter").exists():
            from hf_lowbit import LowBitConfig
            from hf_lowbit.adapters.initialization import initialize
            from hf_lowbit.calibration import Calibration

            calibration = Calibration(calibration_documents(), 32, 512)
            shutil.rmtree(folder, ignore_errors=True)
            initialize(
                source, LowBitConfig(bits=2), destination=folder, method=method, rank=RANK, calibration=calibration
            )
        return folder
    folder = CACHE / "finetune" / f"{name}-head8"  # named after all that is in it: a default may change
    if not folder.exists():
        from transformers import AutoModelForCausalLM

        from hf_lowbit import LowBitConfig

        config = LowBitConfig(bits=int(name[3:]), method="rtn", embeddings=8)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, quantization_config=config)
        partial = folder.with_name(folder.name + ".partial")
        model.save_pretrained(partial)
        partial.rename(folder)
    return folder


def batches(source: str, steps: int, size: int = 2, length: int = 128) -> list[torch.Tensor]:
    """``steps`` batches (size, length) of news articles, in an order of their own and the same for all."""
    from transformers import AutoTokenizer

    from hf_lowbit.evaluate import make_windows

    windows = make_windows(AutoTokenizer.from_pretrained(source), "\n".join(split_news()[0]), length)
    need = steps * size
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(SEED))
    order = order.repeat(-(-need // len(windows)))[:need]
    return list(windows[order].split(size))


def load(source: str, repo: str | None, dtype: str):
    """The float model ``source``, the same quantized by bitsandbytes, or the packed model in the folder ``repo``."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options = {}
    if repo == "nf4":
        repo, options["quantization_config"] = None, BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, dtype),
        )  # fmt: skip
    return AutoModelForCausalLM.from_pretrained(repo or source, dtype=getattr(torch, dtype), **options)


def train(model, data: list[torch.Tensor], rate: float, decay: bool):
    """One optimizer step for each batch; yields (loss, wall seconds, CPU seconds)."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0)
    model.train()
    for step, ids in enumerate(data):
        wall, cpu = time.perf_counter(), time.process_time()
        if decay:
            optimizer.param_groups[0]["lr"] = rate * min(1, (step + 1) / 10) * (1 - step / len(data))
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item(), time.perf_counter() - wall, time.process_time() - cpu


def adapt(model, rank: int):
    """A fresh adapter on every linear layer of the blocks."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(SEED)
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS, task_type="CAUSAL_LM"))


def step_child(source: str, repo: str | None, dtype: str, steps: int) -> dict:
    """Memory, times and losses of a few steps; the first one is not timed."""
    import peft  # noqa: F401  (imports are not loading)
    import transformers.modeling_utils  # noqa: F401

    import hf_lowbit.adapters.lora
    import hf_lowbit.quantizer  # noqa: F401

    if repo == "nf4":
        import bitsandbytes  # noqa: F401
    data = batches(source, steps)
    torch.ones(64, 64) @ torch.ones(64, 64)  # the thread pool's memory is not the model's
    before, resident = anonymous_mb(), high_water_mb()[1]
    with Peak() as peak:
        model = adapt(load(source, repo, dtype), 8)
        loaded = anonymous_mb() - before
        measured = list(train(model, data, 1e-4, decay=False))
    losses, walls, cpus = zip(*measured, strict=True)
    return {
        "peak MB": high_water_mb()[0] - resident, "anonymous MB": peak.mb - before, "loaded MB": loaded,
        "losses": losses, "walls": walls[1:], "cpus": cpus[1:],
    }  # fmt: skip


def recover_child(source: str, repo: str | None, dtype: str, steps: int, rate: float, windows: int) -> dict:
    """Held-out perplexity before and after training, and the loss on the way."""
    from peft import PeftModel
    from transformers import AutoTokenizer

    from hf_lowbit.evaluate import evaluate, make_windows

    held_out = make_windows(AutoTokenizer.from_pretrained(source), split_news()[1], 512, windows)
    adapter = Path(repo or "") / "adapter"

    def make():
        model = load(source, repo, dtype)
        return PeftModel.from_pretrained(model, adapter, is_trainable=True) if adapter.exists() else adapt(model, RANK)

    # Of a model of its own: an evaluation on a CPU gives bitsandbytes' weights another layout, which does not train.
    row = {"ppl before": evaluate(make().eval(), held_out, progress=False).perplexity}
    trained = make()
    losses = [loss for loss, *_ in train(trained, batches(source, steps), rate, decay=True)]
    for quarter in range(4):
        part = losses[quarter * steps // 4 : (quarter + 1) * steps // 4]
        row[f"loss, quarter {quarter + 1}"] = statistics.mean(part)
    after = evaluate(trained.eval(), held_out, progress=False)
    return {**row, "ppl after": after.perplexity, "± ppl": after.perplexity_se, "losses": losses}


def run_child(mode: str, *arguments) -> dict:
    """The result of ``mode`` in a process of its own."""
    command = [sys.executable, __file__, "--child", mode, json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1][:200]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def packed(source: str, name: str | None) -> str | None:
    """The folder of :func:`prepare`, made in a process of its own; bitsandbytes packs while loading.

    Raises:
        RuntimeError: if that fails.
    """
    if name in (None, "nf4"):
        return name
    made = run_child("prepare", source, name)
    if "error" in made:
        raise RuntimeError(f"{name} could not be made: {made['error']}")
    return made["folder"]


def step_rows(source: str, names: list[str], rounds: int, steps: int) -> list[dict]:
    repos = {name: packed(source, STEP[name][0]) for name in names}
    found = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            made = run_child("step", source, repos[name], STEP[name][1], steps)
            print(name, {k: v for k, v in made.items() if k != "losses"}, flush=True)
            found[name].append(made)
    rows = []
    for name, results in found.items():
        errors = [r["error"] for r in results if "error" in r]
        if errors:
            rows.append({"method": name, "error": errors[0]})
            continue
        walls, cpus = (sorted(t for r in results for t in r[key]) for key in ("walls", "cpus"))
        rows.append({
            "method": name, **{k: max(r[k] for r in results) for k in ("peak MB", "anonymous MB", "loaded MB")},
            "s per step": statistics.median(walls), "fastest": walls[0], "slowest": walls[-1],
            "CPU s per step": statistics.median(cpus),
            "losses": " ".join(f"{loss:.3f}" for loss in results[0]["losses"]),
        })  # fmt: skip
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or repo; default SmolLM2-135M-Instruct off its grid")
    parser.add_argument("--recover", action="store_true", help="train, and measure held-out perplexity")
    parser.add_argument("--only", default="", help="regular expression over contestants")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="default 4, and 200 with --recover")
    parser.add_argument("--rate", type=float, default=5e-4, help="learning rate of --recover")
    parser.add_argument("--windows", type=int, default=16, help="held-out windows of 512 tokens")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--print", action="store_true", help="do not write results/")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        mode, arguments = args.child
        children = {"step": step_child, "recover": recover_child, "prepare": lambda *a: {"folder": str(prepare(*a))}}
        print(json.dumps(children[mode](*json.loads(arguments))))
        return
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    torch.set_num_threads(args.threads)
    source, steps = model_folder(args.model), args.steps or (200 if args.recover else 4)
    names = [name for name in (RECOVER if args.recover else STEP) if re.search(args.only, name)]
    if not args.recover:
        rows = step_rows(source, names, args.rounds, steps)
        note = f"LoRA, r=8, all seven linears of a block, 2 x 128 tokens; {args.rounds} rounds of {steps} steps."
        if not args.print:
            command = f"python benchmarks/finetune.py --rounds {args.rounds} --steps {steps} --threads {args.threads}"
            command += f" --only {args.only!r}" if args.only else ""
            write_results("finetune_step", command, rows, note)
        return
    command = f"python benchmarks/finetune.py --recover --steps {steps} --windows {args.windows}"
    note = (
        f"Rank {RANK}, {steps} steps of 2 x 128 tokens of news, AdamW, rate {args.rate:g} falling to 0; "
        f"perplexity on {args.windows} windows of 512 tokens of other articles. All compute in float32 but LoRA bf16. "
        "How adapters were started, and at what cost: adapters.md."
    )
    for name in names:
        repo, dtype = RECOVER[name]
        made = run_child("recover", source, packed(source, repo), dtype, steps, args.rate, args.windows)
        print(name, made, flush=True)
        rows = earlier_rows("finetune_recover", command)  # now: another process may have added some
        rows[name] = {"method": name, **{k: v for k, v in made.items() if k != "losses"}}
        if not args.print:  # after every contestant: the run is long
            write_results("finetune_recover", command, [rows[n] for n in RECOVER if n in rows], note)


if __name__ == "__main__":
    main()
