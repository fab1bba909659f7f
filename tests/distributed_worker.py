"""What ``test_distributed.py`` starts in two processes: DDP through the Trainer, then FSDP2 by hand (on CPUs accelerate
knows DDP only), on one model. ``train`` and ``steps`` are also what the test runs alone, to compare.
"""

import json
import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from hf_lowbit import LowBitConfig

STEPS, BATCH, LENGTH, RATE = 4, 4, 24, 2.0


def make(folder):
    config = LowBitConfig(bits=4)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=config)
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))


def data():
    generator = torch.Generator().manual_seed(1)
    return torch.randint(4, 40, (STEPS * BATCH, LENGTH), generator=generator)


def train(folder, output, processes):
    """The losses of an unchanged Trainer, which saves the adapter."""
    model = make(folder)
    arguments = TrainingArguments(
        str(output), max_steps=STEPS, per_device_train_batch_size=BATCH // processes, optim="sgd", learning_rate=RATE,
        lr_scheduler_type="constant", max_grad_norm=0.0, logging_steps=1, save_strategy="no", report_to=[],
        use_cpu=True, disable_tqdm=True, ddp_find_unused_parameters=False,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=[{"input_ids": row, "labels": row} for row in data()])
    assert arguments.world_size == processes
    trainer.train()
    trainer.save_model()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def steps(model, rank, processes):
    """The losses of ``rank``'s share of every batch."""
    optimizer, losses = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE), []
    model.train()
    for batch in data().split(BATCH):
        ids = batch.chunk(processes)[rank]
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


def sharded(folder, output):
    """The same with the model in shards; rank 0 saves the adapter."""
    from torch import distributed
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import fully_shard

    model = make(folder)
    mesh = distributed.init_device_mesh("cpu", (distributed.get_world_size(),))
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    codes = model.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight
    assert codes.dtype == torch.int16 and codes.to_local().shape[0] * 2 == codes.shape[0]
    losses = steps(model, distributed.get_rank(), distributed.get_world_size())
    distributed.all_reduce(losses)
    # The adapter alone: what is frozen need not be gathered, and 16-bit integers cannot be, outside of fully_shard.
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    state = get_model_state_dict(model, options=options)
    if distributed.get_rank() == 0:
        model.save_pretrained(output, state_dict=state)
    return (losses / distributed.get_world_size()).tolist()


def main():
    folder, output = sys.argv[1], Path(sys.argv[2])
    found = {"ddp": train(folder, output / "ddp", 2), "fsdp": sharded(folder, output / "fsdp")}
    if torch.distributed.get_rank() == 0:
        (output / "losses.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
