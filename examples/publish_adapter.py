"""Publish a base in 2 bits together with an adapter that makes up for what packing lost, and load both again.

python examples/publish_adapter.py MODEL USER/NAME [METHOD] [CALIBRATION_TEXT]

METHOD is loftq, which needs no text (the default), eora, apiq-lw or apiq-bw. Whoever trains goes on from that adapter
and publishes the trained one alone, with ``model.push_to_hub("user/adapter")``.
"""

import sys
import tempfile

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_lowbit import LowBitConfig
from hf_lowbit.adapters.initialization import initialize
from hf_lowbit.hub import push_to_hub

source, repo_id = sys.argv[1:3]
method = sys.argv[3] if len(sys.argv) > 3 else "loftq"

with tempfile.TemporaryDirectory() as scratch:
    made = initialize(
        source,
        LowBitConfig(bits=2),
        destination=f"{scratch}/packed",
        method=method,
        rank=8,
        calibration=sys.argv[4] if len(sys.argv) > 4 else None,
        base_id=repo_id,  # what the adapter's config names as its base
    )
    base = AutoModelForCausalLM.from_pretrained(made.base)
    ids = AutoTokenizer.from_pretrained(source)("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = PeftModel.from_pretrained(base, made.adapter).eval()(ids).logits
    print(push_to_hub(made.base, repo_id, base_model=source))

# Anyone who has the package:
base = AutoModelForCausalLM.from_pretrained(repo_id)
model = PeftModel.from_pretrained(base, repo_id, subfolder="adapter").eval()
with torch.no_grad():
    print("same logits:", torch.equal(model(ids).logits, expected))
