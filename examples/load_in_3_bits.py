"""Load a model in 3 bits, look at what was packed, talk to it, save it, and load it again with nothing of ours.

python examples/load_in_3_bits.py [MODEL] [FOLDER]     (default: the SmolLM2 that the demo extra brings, ./smollm2-3bit)
"""

import sys
import tempfile

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_lowbit import LowBitConfig
from hf_lowbit.smollm import save_smollm2

source = sys.argv[1] if len(sys.argv) > 1 else str(save_smollm2(f"{tempfile.gettempdir()}/smollm2"))
folder = sys.argv[2] if len(sys.argv) > 2 else "smollm2-3bit"

model = AutoModelForCausalLM.from_pretrained(source, quantization_config=LowBitConfig(bits=3))
tokenizer = AutoTokenizer.from_pretrained(source)
print(model.hf_quantizer.plan.report())

inputs = tokenizer("The capital of France is", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=8, do_sample=False)[0]))

model.save_pretrained(folder)
tokenizer.save_pretrained(folder)

again = AutoModelForCausalLM.from_pretrained(folder)  # the repo says itself how it is packed
with torch.no_grad():
    print("same logits:", torch.equal(again(**inputs).logits, model(**inputs).logits))
