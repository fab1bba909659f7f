"""Different bits for different layers, and the output head and embeddings in 8 bits instead of 16.

python examples/mixed_bits.py [MODEL]     (default: the SmolLM2 that the demo extra brings)
"""

import sys
import tempfile

from transformers import AutoModelForCausalLM

from hf_lowbit import LowBitConfig
from hf_lowbit.smollm import save_smollm2

source = sys.argv[1] if len(sys.argv) > 1 else str(save_smollm2(f"{tempfile.gettempdir()}/smollm2"))

config = LowBitConfig(
    bits=3,
    rules={  # regular expressions over whole module names; the first that matches decides
        r".*layers\.0\..*": None,  # the first block stays in float
        r".*\.(v_proj|down_proj)": {"bits": 4},  # the layers that quantization hurts most
        r".*\.(gate|up)_proj": {"format": "nf"},  # another format, at the same 3 bits
        r"lm_head|.*embed_tokens": {"bits": 8},  # kept by default: asked for here (one tensor, where they are tied)
    },
)
model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config)
print(model.hf_quantizer.plan.report())
for pattern, spec in model.config.quantization_config.layers.items():
    print(f"{pattern:40s} {spec}")
