"""Finetune at 2 bits: start from an adapter that makes up for what packing lost (ApiQ), then train it.

python examples/apiq_2bit.py MODEL TEXT_FILE FOLDER     (gets the packed base, and in FOLDER/adapter the adapter)
"""

import argparse
from pathlib import Path

from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from hf_lowbit import LowBitConfig
from hf_lowbit.adapters.initialization import initialize
from hf_lowbit.calibration import Calibration
from hf_lowbit.evaluate import evaluate, make_windows

parser = argparse.ArgumentParser()
parser.add_argument("model", help="folder or repo of a float model")
parser.add_argument("text")
parser.add_argument("folder")
parser.add_argument("--method", default="apiq-bw", help="apiq-lw, apiq-bw, eora, loftq or zeros")
parser.add_argument("--rank", type=int, default=16)
parser.add_argument("--windows", type=int, default=64, help="for calibration")
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--length", type=int, default=256)
args = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(args.model)
text = Path(args.text).read_text("utf-8")
cut = len(text) * 9 // 10
held_out = make_windows(tokenizer, text[cut:], args.length)

made = initialize(
    args.model,
    LowBitConfig(bits=2),
    destination=args.folder,
    method=args.method,
    rank=args.rank,
    calibration=Calibration([text[:cut]], args.windows, args.length),
)
base = AutoModelForCausalLM.from_pretrained(made.base, dtype="float32")
print(f"2 bits alone:      perplexity {evaluate(base, held_out).perplexity:.1f}")
model = PeftModel.from_pretrained(base, made.adapter, is_trainable=True)
print(f"{args.method + ':':18s} perplexity {evaluate(model.eval(), held_out).perplexity:.1f}")

rows = [{"input_ids": w, "labels": w} for w in make_windows(tokenizer, text[:cut], args.length)]
arguments = TrainingArguments(
    f"{args.folder}/training", max_steps=args.steps, per_device_train_batch_size=2, learning_rate=5e-4,
    lr_scheduler_type="cosine", warmup_steps=args.steps // 20, save_strategy="no", report_to=[],
)  # fmt: skip
Trainer(model=model, args=arguments, train_dataset=rows).train()
print(f"after training:    perplexity {evaluate(model.eval(), held_out).perplexity:.1f}")
model.save_pretrained(made.adapter)
