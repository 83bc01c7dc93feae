"""A child that speaks the protocol and trains nothing; `hyperparams.seed` picks what it does. Run as the launcher is."""

import hashlib
import os
import sys
import time
from pathlib import Path

from trainers.protocol import FD_VARIABLE, Channel

STEPS = 6
(
    GOOD,
    DIES,
    FAILS,
    LINKS,
    HANGS,
    SLOW,
    LIES,
    MUTE,
    BABBLES,
    OBEYS,
    STUBBORN,
    HOG,
    HOGS,
    DIES_NAMELESS,
    HASTY,
    NO_MEMORY,
    TORCH_NO_MEMORY,
) = range(17)


def main() -> None:
    channel = Channel.from_fd(int(os.environ[FD_VARIABLE]))
    start = channel.receive(30)
    config, out = start["config"], Path(start["config"]["output_dir"])
    does = config["hyperparams"]["seed"]
    if does == MUTE:
        sys.exit("cannot import torch")
    channel.send("hello", pid=os.getpid(), python="3", torch="0", transformers="0", peft="0")
    first = int((Path(config["resume_from"]) / "step").read_text()) if config["resume_from"] else 0
    channel.send("ready", steps=STEPS, start_step=first)
    print("variables:", ",".join(sorted(os.environ)), flush=True)
    if does == BABBLES:
        channel.send("step", step="one")
    train(channel, out, does, first)


def train(channel: Channel, out: Path, does: int, first: int) -> None:
    if first == 0:
        channel.send("evaluated", step=0, when="before", loss=2.0, rows=1, samples=[{"answer": "nul \x00"}])
    for step in range(first + 1, STEPS + 1):
        if does in (SLOW, HANGS):
            wait_for_stop(channel, out, does, step - 1)
        if does == HASTY and step == STEPS:
            wait_for_stop(channel, out, does, step)
        if does in (OBEYS, STUBBORN):
            obey(channel, out, does, step - 1)
        say_step(channel, step)
        if does in (DIES, DIES_NAMELESS) and step == 3:
            os.kill(os.getpid(), 9 if does == DIES else 40)
        if does in (HOG, HOGS) and step == 3:
            hog(does)
        if does == FAILS and step == 3:
            channel.send("failed", code="loss_not_finite", message="NaN", hint="lower lr", fixable_by="user", step=3)
            wait_for_end(channel)
        if does in (NO_MEMORY, TORCH_NO_MEMORY):
            code = "out_of_memory" if does == TORCH_NO_MEMORY else "memory_limit_exceeded"
            channel.send("failed", code=code, message="full", hint="smaller", fixable_by="user", step=step)
            wait_for_end(channel)
        folder = write(out / "checkpoints" / f"step-{step:08d}", {"step": str(step), "weights": "w" * step}, does)
        metrics = {"best_step": 2} if does == HASTY else {}
        channel.send("checkpoint", step=step, path=str(folder), bytes=1, sha256=hashes(folder, does), metrics=metrics)
    folder = write(out / "artifact", {"adapter_model.safetensors": "adapter"}, does)
    channel.send("finished", step=STEPS, artifact=str(folder), sha256=hashes(folder, does), metrics={"loss": 0.5})
    wait_for_end(channel)


def wait_for_end(channel: Channel) -> None:
    while (message := channel.receive()) is not None:
        print("heard:", message["type"], message.get("step", ""), flush=True)
    os._exit(0)


def say_step(channel: Channel, step: int) -> None:
    channel.send("step", step=step, epoch=0.5, loss=1.0 / step, lr=0.1, grad_norm=1.0, tokens=10, seconds=0.01)


def wait_for_stop(channel: Channel, out: Path, does: int, step: int) -> None:
    """SLOW, HASTY: until told to stop, then writes a checkpoint; HANGS: for ever."""
    while True:
        message = channel.receive()
        if message is None:
            os._exit(1)
        print("heard:", message["type"], message.get("step", ""), flush=True)
        if does != HANGS and message["type"] == "command" and message["command"] == "stop":
            folder = write(out / "checkpoints" / "step-stop", {"step": str(step)}, does)
            best = {"best_step": 2} if does == HASTY else {}
            channel.send("checkpoint", step=step, path=str(folder), bytes=1, sha256=hashes(folder, does), metrics=best)
            channel.send("ack", id=message["id"], command="stop", state="finished", step=step)


def obey(channel: Channel, out: Path, does: int, step: int) -> None:
    """A step takes as long as the file `slow` lies in the output's grandparent. OBEYS: parks, resumes and stops in between;
    STUBBORN: parks never."""
    parked = False
    while parked or (out.parents[3] / "slow").exists():
        try:
            message = channel.receive(0.02)
        except TimeoutError:
            continue
        if message is None:
            os._exit(1)
        if message["type"] != "command":
            continue
        command = message["command"]
        if command == "park" and does == STUBBORN:
            continue
        if command == "stop":
            folder = write(out / "checkpoints" / "step-stop", {"step": str(step)}, does)
            channel.send("checkpoint", step=step, path=str(folder), bytes=1, sha256=hashes(folder, does), metrics={})
        parked = command == "park"
        state = "finished" if command == "stop" else "parked" if parked else "training"
        channel.send("ack", id=message["id"], command=command, state=state, step=step)
        if command == "stop":
            wait_for_end(channel)


def hog(does: int) -> None:
    """A GiB at once. HOG: itself; HOGS: in a process that it waits for, and in vain."""
    if does == HOGS and os.fork():
        os.wait()
        time.sleep(600)
    b"x" * (1 << 30)


def write(folder: Path, files: dict[str, str], does: int) -> Path:
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name).write_text(text)
    if does == LINKS:
        (folder / "weights").unlink(missing_ok=True)
        (folder / "weights").symlink_to("/etc/passwd")
    return folder


def hashes(folder: Path, does: int) -> dict[str, str]:
    found = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}
    return dict.fromkeys(found, "0" * 64) if does == LIES else found


main()
