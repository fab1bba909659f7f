"""Generate with compiled decoding: a static cache and one graph for a token, compiled once and kept on disk.

python examples/compiled_decoding.py "Why is the sky blue?" [--model MODEL] [--cache FOLDER]

The first run compiles (a minute on a CPU); later ones, in any process, read what it left in FOLDER.
"""

import argparse
import os
import tempfile
import time

parser = argparse.ArgumentParser()
parser.add_argument("prompt")
parser.add_argument("--model", help="float, or packed in 4 bits")
parser.add_argument("--cache", default=os.path.expanduser("~/.cache/hf_lowbit_compiled"))
parser.add_argument("--length", type=int, default=512, help="of the static cache: prompt and answer")
parser.add_argument("--tokens", type=int, default=64)
args = parser.parse_args()
os.environ["TORCHINDUCTOR_CACHE_DIR"] = args.cache  # before torch is imported; the default is under /tmp

from transformers import AutoModelForCausalLM, AutoTokenizer, StaticCache  # noqa: E402

from hf_lowbit import LowBitConfig, compile_decoding, decode  # noqa: E402
from hf_lowbit.smollm import save_smollm2  # noqa: E402

source = args.model or str(save_smollm2(f"{tempfile.gettempdir()}/smollm2"))
# In float32, in which compiled graphs are faster on CPUs than in bfloat16.
model = AutoModelForCausalLM.from_pretrained(source, quantization_config=LowBitConfig(bits=4), dtype="float32")
tokenizer = AutoTokenizer.from_pretrained(source)

compile_decoding(model)  # single tokens; a prompt has any length and is read once
cache = StaticCache(config=model.config, max_cache_len=args.length)  # of one length: another one compiles again
chat = [{"role": "user", "content": args.prompt}]
ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
for what in ("first", "second"):  # the first includes compiling, or reading what was compiled
    cache.reset()
    start = time.perf_counter()
    options = {"past_key_values": cache, "max_new_tokens": args.tokens, "do_sample": False}
    output = model.generate(**ids, **options, custom_generate=decode)  # decode: a shorter loop, the same tokens
    answer = output[0, ids["input_ids"].shape[1] :]
    print(f"{what} answer: {len(answer)} tokens in {time.perf_counter() - start:.1f} s")
print(tokenizer.decode(answer, skip_special_tokens=True))
