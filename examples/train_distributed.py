"""Train a LoRA adapter on a packed model in several processes, with copies of the model (DDP) or with shards (FSDP2).

accelerate launch --multi_gpu --num_processes 2 examples/train_distributed.py MODEL TEXT_FILE ADAPTER
accelerate launch --use_fsdp --fsdp_version 2 --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP --num_processes 2 \
    --fsdp_cpu_ram_efficient_loading false examples/train_distributed.py MODEL TEXT_FILE ADAPTER

On machines without GPUs add --cpu: processes then talk over gloo.
"""

import argparse
from pathlib import Path

from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed

from hf_lowbit import LowBitConfig
from hf_lowbit.evaluate import make_windows

parser = argparse.ArgumentParser()
parser.add_argument("model", help="a float model, or one that is packed")
parser.add_argument("text")
parser.add_argument("adapter", help="folder to save to")
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--batch", type=int, default=4, help="sequences in a step, of all processes together")
parser.add_argument("--length", type=int, default=128)
parser.add_argument("--cpu", action="store_true")
args = parser.parse_args()

arguments = TrainingArguments(  # first: it joins the processes
    args.adapter,
    max_steps=args.steps,
    learning_rate=1e-3,
    logging_steps=1,
    save_strategy="no",
    report_to=[],
    use_cpu=args.cpu,
    ddp_find_unused_parameters=False,
)
arguments.per_device_train_batch_size = args.batch // arguments.world_size

set_seed(0)  # the same adapter in every process
with arguments.main_process_first():
    model = AutoModelForCausalLM.from_pretrained(args.model, quantization_config=LowBitConfig(bits=4), dtype="float32")
model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))

windows = make_windows(AutoTokenizer.from_pretrained(args.model), Path(args.text).read_text("utf-8"), args.length)
trainer = Trainer(model=model, args=arguments, train_dataset=[{"input_ids": w, "labels": w} for w in windows])
trainer.train()
trainer.save_model(args.adapter)  # rank 0 writes; with shards, all gather
