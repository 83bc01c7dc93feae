"""Which tokens one forward pass computes, and which of its places are asked for a token: rows side by side with padding, or
packed into one sequence in which no row sees another. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Dict, List, Optional, Tuple

import numpy as np

from trainers.child.data import IGNORED, Example

PACKED_TOKENS = 512
"""Of one packed sequence: enough for matrix products to be efficient, little enough for the attention that the mask throws away."""


@dataclass(frozen=True)
class Piece:
    """One forward pass. `ids` [B][T]. `sources[i]`: the place in the flattened ids whose hidden state must predict `targets[i]`,
    a loss token of the row `rows[i]` (counted in the examples given). `parents` [T]: of a packed piece, the place of the token
    before in its row, -1 for a first one; `positions` [T]: how many tokens come before in its row; `paths`: each row's places."""

    ids: List[List[int]]
    sources: List[int]
    targets: List[int]
    rows: List[int]
    parents: Optional[List[int]] = None
    positions: Optional[List[int]] = None
    paths: Optional[List[List[int]]] = None

    @property
    def spread(self) -> float:
        """How many pairs of places row by row, of those in a mask over all of them."""
        if self.paths is None:
            return math.inf
        return len(self.paths) * max(map(len, self.paths)) ** 2 / len(self.ids[0]) ** 2


def padded(examples: Sequence[Example], pad: int) -> Piece:
    """Padded on the right to the longest. A causal model never looks at what is right of a token, so the padding needs no mask.
    No example: places without loss, so that every rank runs every forward."""
    length = max((len(example.ids) for example in examples), default=2)
    ids = [example.ids + [pad] * (length - len(example.ids)) for example in examples] or [[pad] * length]
    asked = [(row, place) for row, example in enumerate(examples) for place in _loss_places(example)]
    return Piece(
        ids,
        [row * length + place - 1 for row, place in asked],
        [examples[row].labels[place] for row, place in asked],
        [row for row, _ in asked],
    )


def packed(examples: Sequence[Example], *, share: bool) -> Piece:
    """All rows in one sequence. `share`: what several rows begin with is computed once: a token is known by the tokens before
    it, which is all that a causal model's states and gradients depend on where nothing is drawn at random."""
    ids: List[int] = []
    parents: List[int] = []
    positions: List[int] = []
    sources: List[int] = []
    paths: List[List[int]] = []
    known: Dict[Tuple[int, int], int] = {}
    for example in examples:
        path = [-1]
        for place, token in enumerate(example.ids):
            here = known.get((path[-1], token), len(ids)) if share else len(ids)
            if here == len(ids):
                ids.append(token)
                parents.append(path[-1])
                positions.append(place)
                known[path[-1], token] = here
            path.append(here)
        paths.append(path[1:])
        sources += [path[place] for place in _loss_places(example)]
    asked = [(row, example.labels[place]) for row, example in enumerate(examples) for place in _loss_places(example)]
    return Piece([ids], sources, [label for _, label in asked], [row for row, _ in asked], parents, positions, paths)


def _loss_places(example: Example) -> Iterator[int]:
    return (place for place, label in enumerate(example.labels) if place and label != IGNORED)


def visible(parents: Sequence[int]) -> Any:
    """[T, T] bool: each place sees itself and what comes before it in its own row."""
    seen = np.zeros((len(parents), len(parents)), dtype=bool)
    for place, parent in enumerate(parents):
        if parent >= 0:
            seen[place] = seen[parent]
        seen[place, place] = True
    return seen


def packs(
    batch: Sequence[int], lengths: Mapping[int, int], world_size: int, size: Optional[int] = None
) -> List[List[List[int]]]:
    """Per rank its rows of a batch in pieces of at most `PACKED_TOKENS` tokens (but one row at least) and `size` rows. Every
    rank gets equally many pieces; the last ones may be empty."""
    ranks = [_fill(batch[rank::world_size], lengths, size or len(batch)) for rank in range(world_size)]
    most = max(len(pieces) for pieces in ranks)
    return [pieces + [[]] * (most - len(pieces)) for pieces in ranks]


def _fill(rows: Sequence[int], lengths: Mapping[int, int], size: int) -> List[List[int]]:
    pieces: List[List[int]] = []
    tokens = 0
    for row in rows:
        tokens += lengths[row]
        if not pieces or tokens > PACKED_TOKENS or len(pieces[-1]) == size:
            pieces.append([])
            tokens = lengths[row]
        pieces[-1].append(row)
    return pieces
