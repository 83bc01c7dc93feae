"""The cross-entropy of a causal language model over rows of tokens, with logits only where there is loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Optional

import torch
from torch.nn import functional as F

from trainers.child import row_attention
from trainers.child.data import Example
from trainers.child.head import token_losses
from trainers.child.packing import Piece, packed, padded, visible

PROBE = (Example([1, 2, 3, 4, 5, 6], []), Example([1, 2, 3, 7, 8, 9, 10, 11], []))
"""Two rows that begin alike."""


class SummedLoss(torch.nn.Module):
    """forward(piece) → the sum over all loss tokens; the caller divides by the number of them in the whole batch.
    forward(piece, rows) → [rows], each the sum over its loss tokens. Always by a call of the module, which tells DeepSpeed where a
    forward pass begins."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.splits = False
        self.packs = False
        self.by_rows = False
        self._shares = not _draws(model)

    def find_shortcuts(self, *, packing: Optional[bool] = None, max_seq_len: int = 0) -> None:
        """Tried once on two short rows: whether the head over the inner model's hidden states gives the model's own logits
        (some architectures scale or cap them), and whether packed rows have the logits of padded ones. `packing` False: not
        asked for. `max_seq_len`: tokens of the longest row; a mask of ours knows no sliding window."""
        training = self.training
        self.eval()
        with torch.no_grad():
            whole = self._logits(padded(PROBE, 0))
            wanted = packing is not False and not _windowed(self._base().config, max_seq_len)
            self.splits = self.packs = wanted and self._packs_alike(whole, self._split_logits)
            if not self.packs:
                self.splits = _alike(whole, self._split_logits(padded(PROBE, 0)))
            if wanted and not self.splits:
                self.packs = self._packs_alike(whole, self._logits)
            if self.packs:
                self._attend_by_rows(whole)
        self.train(training)

    def _attend_by_rows(self, whole: torch.Tensor) -> None:
        """Where it is the faster way."""
        base = self._base()
        if base.config._attn_implementation != "sdpa" or base.dtype == torch.float32:
            return
        base.set_attn_implementation(row_attention.NAME)
        self.by_rows = True
        if not self._packs_alike(whole, self._split_logits if self.splits else self._logits):
            self.by_rows = False
            base.set_attn_implementation("sdpa")

    def _packs_alike(self, whole: torch.Tensor, logits: Callable[[Piece], Optional[torch.Tensor]]) -> bool:
        first, second = (len(example.ids) for example in PROBE)
        piece = packed(PROBE, share=True)
        places = [*range(first), 0, 1, 2, *range(first, len(piece.ids[0]))]
        try:
            found = logits(piece)
        except (TypeError, ValueError, RuntimeError, IndexError, AttributeError):
            return False  # an architecture that takes neither a mask of ours nor positions
        return found is not None and _alike(torch.cat([whole[:first], whole[second:]]), found[places])

    def piece(self, examples: Sequence[Example], pad: int) -> Piece:
        """One row alone needs no mask of ours: attention then skips what lies ahead of a token."""
        return packed(examples, share=self._shares) if self.packs and len(examples) > 1 else padded(examples, pad)

    def forward(self, piece: Piece, rows: Optional[int] = None) -> torch.Tensor:
        losses = self._token_losses(piece)
        if rows is None:
            return losses.sum()
        if not piece.rows:
            return losses.new_zeros(rows) + losses
        return losses.new_zeros(rows).index_add(
            0, sent(torch.tensor(piece.rows, dtype=torch.long), losses.device), losses
        )

    def _token_losses(self, piece: Piece) -> torch.Tensor:
        """[loss tokens] fp32, in the piece's order."""
        device = self._base().device
        sources, targets = (sent(torch.tensor(one, dtype=torch.long), device) for one in (piece.sources, piece.targets))
        if self.splits:
            hidden, head = self._hidden(piece), self._base().get_output_embeddings()
            if piece.sources:
                return token_losses(hidden[sources], head, targets)
            return token_losses(hidden[:1], head, targets.new_zeros(1)) * 0.0  # runs every layer, as the other ranks do
        logits = self._logits(piece)
        if piece.sources:
            return F.cross_entropy(logits[sources].float(), targets, reduction="none")
        return logits.float().sum()[None] * 0.0

    def _hidden(self, piece: Piece) -> torch.Tensor:
        """[places, hidden] from the model without its head."""
        base = self._base()
        hidden: torch.Tensor = getattr(base, base.base_model_prefix)(**self._inputs(piece))[0].flatten(0, 1)
        return hidden

    def _logits(self, piece: Piece) -> torch.Tensor:
        """[places, vocabulary]"""
        logits: torch.Tensor = self.model(**self._inputs(piece)).logits.flatten(0, 1)
        return logits

    def _split_logits(self, piece: Piece) -> Optional[torch.Tensor]:
        """As `_logits`; None where the model has no inner model or no head."""
        base = self._base()
        inner, head = getattr(base, base.base_model_prefix, None), base.get_output_embeddings()
        return None if inner is None or inner is base or head is None else head(self._hidden(piece))

    def _inputs(self, piece: Piece) -> "dict[str, Any]":
        base = self._base()
        inputs = {"input_ids": sent(torch.tensor(piece.ids), base.device), "use_cache": False}
        if piece.parents is not None:
            inputs["attention_mask"] = self._mask(piece, piece.parents)
            inputs["position_ids"] = sent(torch.tensor([piece.positions]), base.device)
        return inputs

    def _mask(self, piece: Piece, parents: Sequence[int]) -> torch.Tensor:
        base = self._base()
        if self.by_rows and piece.paths and piece.spread < 1.0:
            return sent(row_attention.places_of(piece.paths), base.device)
        mask = sent(torch.from_numpy(visible(parents)), base.device)
        hidden = torch.zeros(mask.shape, dtype=base.dtype, device=base.device)
        return hidden.masked_fill_(~mask, torch.finfo(base.dtype).min)[None, None]

    def _base(self) -> Any:
        """The causal model itself; LoRA's layers live inside it."""
        return self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """To where the model is. From pinned memory: else the copy would wait for all that the accelerator has yet to do."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def _alike(wanted: torch.Tensor, found: Optional[torch.Tensor]) -> bool:
    """But for rounding."""
    if found is None or wanted.shape != found.shape:
        return False
    tolerance = 1e-3 if wanted.dtype == torch.float32 else 2e-2
    return float((wanted.float() - found.float()).norm()) <= tolerance * float(wanted.float().norm())


def _draws(model: Any) -> bool:
    """Whether a forward pass in training draws random numbers: what rows share would be drawn once for all of them."""
    of_attention = getattr(model.config.get_text_config(), "attention_dropout", 0.0) or 0.0
    return of_attention > 0 or any(isinstance(one, torch.nn.Dropout) and one.p > 0 for one in model.modules())


def _windowed(config: Any, max_seq_len: int) -> bool:
    """Whether a row is longer than what some layer looks back over."""
    names = ("sliding_window", "attention_chunk_size")
    windows = [getattr(config.get_text_config(), name, None) for name in names]
    return any(window is not None and max_seq_len > window for window in windows)
