"""The opponent of `benchmarks/train.py`: TRL's SFTTrainer in a process of its own, on rows that are tokens already.

`python benchmarks/trl_sft.py task.json` prints a line of JSON when the imports are done and one for each step."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any


def tell(type: str, **fields: Any) -> None:
    """With the memory of this process (KiB resident now and at most) and its seconds of processor."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = dict(line.split(":", 1) for line in lines)
    used = {"resident": int(found["VmRSS"].split()[0]), "peak": int(found["VmHWM"].split()[0])}
    print(json.dumps({"type": type, **fields, **used, "cpu_s": time.process_time()}), flush=True)


def main(task: dict[str, Any]) -> None:
    import torch
    from datasets import Dataset
    from peft import LoraConfig, PeftModel
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Clock(TrainerCallback):
        """Seconds of each step as a wall clock has them; TRL logs the loss after the step."""

        began = 0.0
        took = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.monotonic()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.took = time.monotonic() - self.began

        def on_log(self, _args: Any, state: Any, _control: Any, logs: Any = None, **__: Any) -> None:
            if "loss" in logs:
                tell("step", step=state.global_step, loss=logs["loss"], seconds=self.took)

    torch.set_num_threads(task["threads"])
    tell("hello")
    dtype = torch.bfloat16 if task["precision"] == "bf16" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(task["model"], dtype=dtype)
    lora = LoraConfig(
        r=task["lora_r"], lora_alpha=2 * task["lora_r"], target_modules="all-linear", task_type="CAUSAL_LM"
    )
    if task["adapter"]:
        model, lora = PeftModel.from_pretrained(model, task["adapter"], is_trainable=True), None
    settings = SFTConfig(
        output_dir=task["out"],
        max_steps=task["steps"],
        per_device_train_batch_size=task["batch_size"],
        learning_rate=task["lr"],
        lr_scheduler_type="constant",
        bf16=task["precision"] == "bf16",
        gradient_checkpointing=False,  # its default recomputes every forward pass: slower
        train_sampling_strategy="sequential",
        max_length=None,
        use_cpu=True,
        dataloader_pin_memory=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    rows = Dataset.from_list(task["rows"])
    SFTTrainer(model, args=settings, train_dataset=rows, peft_config=lora, callbacks=[Clock()]).train()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
