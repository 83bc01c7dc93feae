"""A training of your own: a small text classifier in plain PyTorch, for jobs of method `custom`.

    heliostat finetune --base-model smollm2-135m --dataset queues --code examples/custom --entrypoint train.py \
        --param steps=200 --hyper lr=0.01

The dataset has rows of text and label; the base model is there, and not used. It runs outside of a job too, with
trainers/child/custom/shown/heliostat.py beside it: HELIOSTAT_DATA=folder HELIOSTAT_OUTPUT=folder python train.py"""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import torch
from heliostat import job

FEATURES = 4096


def features(text: str) -> torch.Tensor:
    """Which groups of three letters it has."""
    found = torch.zeros(FEATURES)
    for start in range(len(text) - 2):
        found[zlib.crc32(text[start : start + 3].lower().encode()) % FEATURES] = 1.0
    return found


rows = [json.loads(line) for line in (job.data / "train.jsonl").read_text(encoding="utf-8").splitlines()]
labels = sorted({row["label"] for row in rows})
inputs = torch.stack([features(row["text"]) for row in rows])
targets = torch.tensor([labels.index(row["label"]) for row in rows])

lr = job.params.get("lr", 0.01)
torch.manual_seed(job.params.get("seed", 0))
model = torch.nn.Sequential(torch.nn.Linear(FEATURES, 64), torch.nn.ReLU(), torch.nn.Linear(64, len(labels)))
optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
step = 0

if job.resume_folder:
    state = torch.load(job.resume_folder / "state.pt", weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    step = state["step"]


def save(folder: Path) -> None:
    """All that a run needs to go on with the same numbers. Every rank computes the same here: one writes."""
    if job.rank == 0:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
        torch.save(state, folder / "state.pt")


while step < job.params.get("steps", 100):
    chosen = torch.randint(len(rows), (16,), generator=torch.Generator().manual_seed(step))
    output = model(inputs[chosen])
    loss = torch.nn.functional.cross_entropy(output, targets[chosen])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    step += 1
    accuracy = (output.argmax(1) == targets[chosen]).float().mean().item()
    job.report(step=step, loss=loss.item(), lr=lr, epoch=step * 16 / len(rows), accuracy=accuracy)
    job.between(save)

if job.rank == 0:
    torch.save(model.state_dict(), job.output / "model.pt")
    (job.output / "labels.json").write_text(json.dumps(labels), encoding="utf-8")
    print(f"{len(rows)} rows, {len(labels)} labels: done after {step} steps")
