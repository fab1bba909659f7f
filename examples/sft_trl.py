"""Supervised finetuning of a packed model on chats with TRL's SFTTrainer; the loss counts the assistant's words only.

python examples/sft_trl.py CHATS.jsonl ADAPTER [--model MODEL]     (each line: {"prompt": [...], "completion": [...]})
"""

import argparse
import tempfile

from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from hf_lowbit import LowBitConfig
from hf_lowbit.smollm import save_smollm2

parser = argparse.ArgumentParser()
parser.add_argument("chats", help='with messages like {"role": "user", "content": "..."} in "prompt" and "completion"')
parser.add_argument("adapter", help="folder to save to")
parser.add_argument("--model")
parser.add_argument("--bits", type=int, default=4)
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--length", type=int, default=512)
args = parser.parse_args()
source = args.model or str(save_smollm2(f"{tempfile.gettempdir()}/smollm2"))

config = LowBitConfig(bits=args.bits, embeddings="float")  # TRL's loss reads the head's weight itself
model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config)
arguments = SFTConfig(
    args.adapter,
    max_steps=args.steps,
    max_length=args.length,
    per_device_train_batch_size=2,
    learning_rate=1e-3,
    logging_steps=max(1, args.steps // 10),
    save_strategy="no",
    report_to=[],
    bf16=False,
)
trainer = SFTTrainer(
    model=model,
    args=arguments,
    train_dataset=load_dataset("json", data_files=args.chats, split="train", cache_dir=f"{args.adapter}/cache"),
    processing_class=AutoTokenizer.from_pretrained(source),
    peft_config=LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
)
trainer.train()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
trainer.save_model(args.adapter)
