"""The leased GPUs as device files and as names for CUDA. A lease counts cards in the order of their bus, as nvidia-smi does;
device files have numbers of their own, and inside of a sandbox CUDA counts only the cards that it can open."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

CARDS = Path("/proc/driver/nvidia/gpus")
DEVICES = Path("/dev")
CONTROL = ("nvidiactl", "nvidia-uvm", "nvidia-uvm-tools", "nvidia-modeset")
_FIELD = re.compile(r"^(GPU UUID|Device Minor):\s*(\S+)\s*$", re.MULTILINE)


@dataclass(frozen=True)
class Leased:
    """`visible`: CUDA_VISIBLE_DEVICES inside. `files`: for the sandbox, those that exist."""

    visible: str
    files: tuple[Path, ...]


@dataclass(frozen=True)
class Card:
    uuid: str
    minor: int


def leased(indexes: Sequence[int], cards: Path = CARDS, devices: Path = DEVICES) -> Leased:
    """Without the driver's own list of cards: device files of the leases' numbers, counted from 0 inside."""
    if not indexes:
        return Leased("", ())
    known = list_cards(cards)
    if max(indexes) < len(known):
        mine = [known[index] for index in indexes]
        visible, minors = ",".join(card.uuid for card in mine), [card.minor for card in mine]
    else:
        visible, minors = ",".join(str(number) for number in range(len(indexes))), list(indexes)
    files = [devices / name for name in (*CONTROL, *(f"nvidia{minor}" for minor in minors))]
    return Leased(visible, tuple(file for file in files if file.exists()))


def list_cards(folder: Path) -> list[Card]:
    """In the order of their bus addresses, which are the names of the folders."""
    found = []
    for information in sorted(folder.glob("*/information")):
        fields = dict(_FIELD.findall(information.read_text(encoding="utf-8", errors="replace")))
        if {"GPU UUID", "Device Minor"} <= set(fields):
            found.append(Card(fields["GPU UUID"], int(fields["Device Minor"])))
    return found
