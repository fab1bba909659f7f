"""QLoRA with the unchanged Trainer: a model in 4 bits, a LoRA adapter in float on top, checkpoints and evaluation.

python examples/qlora_trainer.py TEXT_FILE ADAPTER [--model MODEL]     (default: the SmolLM2 that the demo extra brings)
"""

import argparse
import tempfile
from pathlib import Path

import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from hf_lowbit import LowBitConfig
from hf_lowbit.evaluate import make_windows
from hf_lowbit.smollm import save_smollm2

parser = argparse.ArgumentParser()
parser.add_argument("text")
parser.add_argument("adapter", help="folder to save to")
parser.add_argument("--model")
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--length", type=int, default=128)
args = parser.parse_args()
packed = f"{args.adapter}/base"
source = args.model or str(save_smollm2(f"{tempfile.gettempdir()}/smollm2"))

model = AutoModelForCausalLM.from_pretrained(source, quantization_config=LowBitConfig(bits=4), dtype=torch.bfloat16)
model.save_pretrained(packed)  # what the adapter belongs to
model = AutoModelForCausalLM.from_pretrained(packed)
model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
model.print_trainable_parameters()

windows = make_windows(AutoTokenizer.from_pretrained(source), Path(args.text).read_text("utf-8"), args.length)
rows = [{"input_ids": window, "labels": window} for window in windows]
held_out = max(1, len(rows) // 10)
arguments = TrainingArguments(
    args.adapter,
    max_steps=args.steps,
    per_device_train_batch_size=2,
    gradient_accumulation_steps=2,
    gradient_checkpointing=True,  # remove it where memory suffices: it computes everything twice
    learning_rate=5e-4,
    eval_strategy="steps",
    eval_steps=max(1, args.steps // 2),
    save_steps=max(1, args.steps // 2),
    load_best_model_at_end=True,
    report_to=[],
)
trainer = Trainer(model=model, args=arguments, train_dataset=rows[held_out:], eval_dataset=rows[:held_out])
trainer.train()
best = trainer.evaluate()["eval_loss"]
model.save_pretrained(args.adapter)

trainer.model = AutoPeftModelForCausalLM.from_pretrained(args.adapter).to(arguments.device).eval()
print("same loss again:", trainer.evaluate()["eval_loss"] == best)
