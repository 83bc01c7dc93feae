"""Two trainings that take turns on the same slots, told over the protocol at seeded moments: between steps, in an evaluation, while
a checkpoint is written, while one rank lags behind. And what a parked one still costs."""

from __future__ import annotations

import os
import random
import signal
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from builders_child import Child, Zygote, make_config, numbers, tree_of
from builders_llama import capital_rows, make_tiny_llama, write_rows

from trainers.config import TrainConfig

EVAL_STEPS = 5
STEPS_TO_SPARE = 40
"""They pass while an order is on its way."""
MOMENTS = ("step", "evaluation", "checkpoint", "lag")
TICKS = os.sysconf("SC_CLK_TCK")
PAGE = os.sysconf("SC_PAGE_SIZE")


def make_pair(root: Path, ranks: int, steps: int) -> tuple[TrainConfig, TrainConfig]:
    """Two runs with other seeds, each with evaluations and checkpoints on command only."""
    base = make_tiny_llama(root / "tiny")
    rows, held_out = (write_rows(root / name, capital_rows(count)) for name, count in (("rows", 16), ("held-out", 32)))
    first, second = (
        make_config(
            base, rows, root / f"alone-{seed}", seed=seed, max_steps=steps, eval_steps=EVAL_STEPS, world_size=ranks,
            validation_file=str(held_out), checkpoint_every_s=1e9,
        )
        for seed in (1, 2)
    )  # fmt: skip
    return first, second


@dataclass
class Turns:
    """Of two children, the first of which trains. `parked_cpu_s`, `parked_s`: summed over all turns that a child waited."""

    running: Child
    waiting: Child
    first_time: TrainConfig | None
    """Of the waiting one, which has not been started yet."""
    switches: list[dict[str, Any]] = field(default_factory=list)
    parked_cpu_s: float = 0.0
    parked_s: float = 0.0
    _ids: int = 0

    def switch(self, moment: str, dice: random.Random) -> None:
        """Waits for the moment, parks who runs, lets the other one go on to its next step."""
        before = memory_mib(self.running.pid)
        began = self._at(moment, dice)
        parked_at = time.monotonic()
        after, used = memory_mib(self.running.pid), cpu_s(self.running.pid)
        self._go_on()
        going_at = time.monotonic()
        self.waiting.until("step")
        stepped_at = time.monotonic()
        self.parked_cpu_s += cpu_s(self.running.pid) - used
        self.parked_s += stepped_at - parked_at
        self.running, self.waiting = self.waiting, self.running
        seconds = {"park_s": parked_at - began, "resume_s": going_at - parked_at, "to_step_s": stepped_at - parked_at}
        rounded = {name: round(value, 4) for name, value in seconds.items()}
        self.switches.append({"moment": moment, **rounded, "mib_before": before, "mib_parked": after})

    def _at(self, moment: str, dice: random.Random) -> float:
        """When the order went out; returns once it is obeyed."""
        for _ in range(dice.randint(1, 3)):
            step = self.running.until("step")["step"]
        while moment == "evaluation" and step % EVAL_STEPS:
            step = self.running.until("step")["step"]
        if moment == "checkpoint":
            self._send("checkpoint")
        lagging = max(tree_of(self.running.pid)) if moment == "lag" else None
        if lagging is not None:
            os.kill(lagging, signal.SIGSTOP)
        began = time.monotonic()
        number = self._send("park")
        if lagging is not None:
            time.sleep(0.1)
            os.kill(lagging, signal.SIGCONT)
        while (ack := self.running.until("ack"))["id"] != number:
            pass
        assert ack["state"] == "parked", ack
        return began

    def _go_on(self) -> None:
        if self.first_time is not None:
            self.waiting.start(self.first_time)
            self.first_time = None
        else:
            number = self._ids = self._ids + 1
            assert self.waiting.command("resume", number)["state"] != "parked"

    def _send(self, command: str) -> int:
        self._ids += 1
        self.running.channel.send("command", id=self._ids, command=command)
        return self._ids

    def finish(self) -> None:
        self.running.until("finished")
        self._go_on()
        self.waiting.until("finished")


def take_turns(zygote: Zygote, root: Path, ranks: int, switches: int, dice: random.Random) -> Turns:
    """Raises AssertionError where a number differs from the run that was alone."""
    configs = make_pair(root, ranks, steps=8 * switches + STEPS_TO_SPARE)
    alone = [numbers(zygote.child().run(config)) for config in configs]
    first, second = (replace(config, output_dir=f"{config.output_dir}-in-turns") for config in configs)
    one, other = zygote.child(), zygote.child()
    turns = Turns(one, other, second)
    one.start(first)
    moments = [MOMENTS[number % len(MOMENTS)] for number in range(switches)]
    for moment in dice.sample(moments, len(moments)):
        turns.switch(moment, dice)
    turns.finish()
    assert [numbers(child.steps) for child in (one, other)] == alone, "the numbers of the runs that were alone"
    return turns


def idle_cpu_s(child: Child, seconds: float) -> float:
    """Processor seconds that its processes used while this waited."""
    before = cpu_s(child.pid)
    time.sleep(seconds)
    return cpu_s(child.pid) - before


def cpu_s(pid: int) -> float:
    total = 0
    for one in tree_of(pid):
        fields = Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()
        total += int(fields[11]) + int(fields[12])
    return total / TICKS


def memory_mib(pid: int) -> int:
    """Resident, of the ranks; pages that they share with the launcher count in each."""
    return sum(int(Path(f"/proc/{one}/statm").read_text().split()[1]) for one in tree_of(pid)[1:]) * PAGE >> 20
