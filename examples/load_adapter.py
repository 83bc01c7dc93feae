"""Asks a LoRA adapter with nothing but transformers and peft: python load_adapter.py ADAPTER_FOLDER BASE_MODEL PROMPT [SYSTEM]"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, logging


def main(adapter: str, base: str, prompt: str, system: str = "") -> None:
    """`base`: a Hugging Face folder, or a .gguf file."""
    file = Path(base)
    gguf = {"gguf_file": file.name} if file.suffix == ".gguf" else {}
    folder = str(file.parent) if gguf else base
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    model = AutoModelForCausalLM.from_pretrained(folder, **gguf, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, adapter).eval()
    messages = [{"role": "system", "content": system}] * bool(system) + [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    asked = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        answer = model.generate(**asked, max_new_tokens=32, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    print(tokenizer.decode(answer[0, asked["input_ids"].shape[1] :], skip_special_tokens=True).strip())


if __name__ == "__main__":
    if len(sys.argv) not in (4, 5):
        sys.exit(__doc__)
    main(*sys.argv[1:])
