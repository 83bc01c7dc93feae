"""Attention over packed rows, row by row: each row's places are gathered, what several rows begin with for each of them, so that no
product is computed that a mask would throw away. The layers around it see every place once. On accelerators with torch's flash
attention, which takes no mask; on processors with products of our own: torch's kernels take rows of this length badly there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, List, Tuple

import torch
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "packed_rows"


def places_of(paths: Sequence[Sequence[int]]) -> torch.Tensor:
    """[1, 1, rows, longest] int64, on the host: stands in the place of a mask, which models hand through as it is. `paths`: each row's
    places in order. A row's last place fills it up: what stands behind a place is not looked at."""
    longest = max(map(len, paths))
    filled: List[List[int]] = [[*path, *[path[-1]] * (longest - len(path))] for path in paths]
    return torch.tensor(filled, dtype=torch.long)[None, None]


def attend(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **more: Any
) -> Tuple[torch.Tensor, None]:
    """As transformers calls it. `query` [1, heads, places, width], `key` and `value` with as many heads or fewer; [1, places,
    heads, width]. Without `places_of` in the mask's place: torch's own."""
    if attention_mask is None or attention_mask.dtype != torch.long:
        found: Tuple[torch.Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **more)
        return found
    if more.get("dropout") or more.get("position_bias") is not None or more.get("softcap") is not None:
        raise ValueError("attention by rows knows none of dropout, position_bias and softcap")
    scale = query.shape[-1] ** -0.5 if more.get("scaling") is None else float(more["scaling"])
    by_rows = _ByRows.apply if query.device.type == "cpu" else flash
    out: torch.Tensor = by_rows(query, key, value, attention_mask[0, 0], scale)
    return out, None


def flash(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: torch.Tensor, scale: float
) -> torch.Tensor:
    """`rows` [rows, longest]. Causal and without a mask, so that torch may choose its flash kernel."""
    q, k, v = (_ToRows.apply(one, rows) for one in (query, key, value))
    fewer = key.shape[1] < query.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=fewer)
    return out.transpose(1, 2).flatten(0, 1).index_select(0, _first(rows, query.shape[2]))[None]


class _ToRows(torch.autograd.Function):
    """[1, heads, places, width] → [rows, heads, longest, width]. A place's gradients of several rows are summed in fp32."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(rows)
        ctx.places = states.shape[2]
        chosen = states[0].index_select(1, rows.flatten())
        return chosen.view(len(chosen), *rows.shape, -1).transpose(0, 1)

    @staticmethod
    def backward(ctx: Any, outer: torch.Tensor) -> Tuple[torch.Tensor, None]:
        (rows,) = ctx.saved_tensors
        return _summed(outer, rows, ctx.places), None


class _ByRows(torch.autograd.Function):
    """Keeps what came in, as torch's kernels do: the probabilities are computed again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: torch.Tensor, scale: float
    ) -> torch.Tensor:
        ctx.save_for_backward(query, key, value, rows)
        ctx.scale = scale
        q, k, v = (_gathered(one, rows, key.shape[1]) for one in (query, key, value))
        return _scattered(_probabilities(q, k, scale) @ v, rows, query.shape)[None]

    @staticmethod
    def backward(ctx: Any, outer: torch.Tensor) -> Tuple[Any, ...]:
        query, key, value, rows = ctx.saved_tensors
        heads = key.shape[1]
        q, k, v = (_gathered(one, rows, heads) for one in (query, key, value))
        mine = torch.zeros(rows.numel(), *outer.shape[2:], dtype=outer.dtype, device=outer.device)
        mine[_first(rows, outer.shape[1])] = outer[0]
        d_out = mine.view(*rows.shape, heads, -1, outer.shape[3]).permute(0, 2, 3, 1, 4).flatten(2, 3)
        p = _probabilities(q, k, ctx.scale)
        d_v = p.transpose(-1, -2) @ d_out
        d_p = d_out @ v.transpose(-1, -2)
        d_s = (d_p - (d_p * p).sum(-1, keepdim=True)).mul_(p).mul_(ctx.scale)
        d_q = _scattered(d_s @ k, rows, query.shape)[None].transpose(1, 2)
        d_k, d_v = (_summed(one, rows, key.shape[2]) for one in (d_s.transpose(-1, -2) @ q, d_v))
        return d_q, d_k, d_v, None, None


def _gathered(states: torch.Tensor, rows: torch.Tensor, heads: int) -> torch.Tensor:
    """[rows, heads, share × longest, width]: queries that share a key's head stand behind one another."""
    chosen = states[0].transpose(0, 1).index_select(0, rows.flatten())
    return chosen.view(*rows.shape, heads, -1, chosen.shape[-1]).permute(0, 2, 3, 1, 4).flatten(2, 3)


def _scattered(states: torch.Tensor, rows: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """[places, heads, width] of what `_gathered` has made of a tensor of this shape: of each place once."""
    by_place = states.unflatten(2, (-1, rows.shape[1])).permute(0, 3, 1, 2, 4).reshape(-1, shape[1], shape[3])
    return by_place.index_select(0, _first(rows, shape[2]))


def _summed(states: torch.Tensor, rows: torch.Tensor, places: int) -> torch.Tensor:
    """[1, heads, places, width]: of all rows that begin with a place, in fp32."""
    by_place = states.transpose(1, 2).flatten(0, 1)
    total = torch.zeros(places, *by_place.shape[1:], dtype=torch.float32, device=states.device)
    return total.index_add_(0, rows.flatten(), by_place.float()).to(states.dtype)[None].transpose(1, 2)


def _probabilities(q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
    """[rows, heads, share × longest, longest]"""
    longest = k.shape[2]
    ahead = torch.ones(longest, longest, dtype=torch.bool, device=k.device).triu(1)
    scores = (q * scale) @ k.transpose(-1, -2)
    return (
        scores.view(*scores.shape[:2], -1, longest, longest).masked_fill_(ahead, -torch.inf).softmax(-1).view_as(scores)
    )


def _first(rows: torch.Tensor, places: int) -> torch.Tensor:
    """Of each place where it stands first: never where it only fills a row up."""
    order = torch.arange(rows.numel(), device=rows.device)
    return torch.full((places,), rows.numel(), device=rows.device).scatter_reduce(0, rows.flatten(), order, "amin")


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
