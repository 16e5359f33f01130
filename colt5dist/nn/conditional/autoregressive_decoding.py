"""Decoding with the causal layers: a pass over the first tokens, then a step for each further token.

A step computes what the whole pass computes for that token: its own products, scores and thresholds from the earlier
windows, and attention to what these admitted. Sums are taken in another order, so the two agree to rounding; only where
a score is within rounding of its threshold can they decide differently. What is kept does not grow with the text: two
windows of light keys and values, `num_heavy_tokens_kv` heavy ones, one window of tokens, the scores of a few windows.
For inference: nothing here has a gradient, and ZeRO-3 does not gather the weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from colt5dist.nn.attention.attend import attend, merge_heads
from colt5dist.nn.attention.rotary import RotaryEmbedding, angle_dtype, rotated_queries_and_keys
from colt5dist.nn.conditional.autoregressive_attention import ConditionalRoutedAutoregressiveAttention
from colt5dist.nn.conditional.autoregressive_block import ConditionalRoutedAutoregressiveBlock
from colt5dist.nn.conditional.feed_forward import ConditionalRoutedFeedForward
from colt5dist.nn.routing.causal_router import Admission, CausalRouter
from colt5dist.nn.routing.gather_scatter import gather_tokens
from colt5dist.ops.admit import HISTORY, admission_threshold, admit_next, num_admitted


@dataclass
class RouterState:
    """What decoding keeps of one router."""

    window: list[Tensor] = field(default_factory=list)
    """Raw scores (b, r) of each token of the current window."""
    past: Tensor | None = None
    """Raw scores (b, r, windows, w) of the last windows, HISTORY at most; None in the first window."""
    threshold: Tensor | None = None
    """(b,): what a query of the current window has to reach; None where all do."""
    duals: Tensor | None = None
    """(b, r): dual variables by which it is scored; None where all scores are 1."""
    num_admitted: Tensor | None = None
    """(b,) int64: queries that the current window has admitted."""


@dataclass
class AttentionState:
    """What decoding keeps of one attention layer."""

    router: RouterState = field(default_factory=RouterState)
    light: tuple[Tensor, Tensor] | None = None
    """Keys and values (b, heads, t, dim_head) that light attention may still see."""
    memory: tuple[Tensor, Tensor, Tensor] | None = None
    """Admitted keys and values (b, heads, m, dim_head), newest last, and which of them there are (b, heads, m) bool."""
    window: list[Tensor] = field(default_factory=list)
    """Tokens (b, 1, dim) of the current window, as the routers see them."""
    position: int = 0
    """Tokens so far."""


@dataclass
class BlockState:
    """What decoding keeps of one `ConditionalRoutedAutoregressiveBlock`."""

    attention: AttentionState = field(default_factory=AttentionState)
    feed_forward: RouterState = field(default_factory=RouterState)


@torch.no_grad()
def read_block(block: ConditionalRoutedAutoregressiveBlock, x: Tensor) -> tuple[Tensor, BlockState]:
    """The block's output (b, n, dim) for the first n tokens x (b, n, dim), and the state after them."""
    attention, feed_forward = block.conditional_attn, block.conditional_ff
    between = x + attention(x)
    state = BlockState(_read_attention(attention, attention.norm(x)))
    router = _causal_router(feed_forward)
    admission = router.at_once(feed_forward.num_heavy_tokens)
    _read_scores(router, router.raw_scores(feed_forward.norm(between)), state.feed_forward, (admission,))
    return between + feed_forward(between), state


@torch.no_grad()
def block_step(block: ConditionalRoutedAutoregressiveBlock, x: Tensor, state: BlockState) -> Tensor:
    """The block's output (b, 1, dim) for the next token x (b, 1, dim); changes the state."""
    x = x + attention_step(block.conditional_attn, x, state.attention)
    return x + feed_forward_step(block.conditional_ff, x, state.feed_forward)


def select_rows(state: BlockState, rows: Tensor) -> None:
    """Let row i go on from what row rows[i] (new rows,) int64 has read; changes the state."""
    for part in (state.attention, state.attention.router, state.feed_forward):
        for name, value in vars(part).items():
            setattr(part, name, _rows_of(value, rows))


def _rows_of(value: Any, rows: Tensor) -> Any:
    """Those rows of every tensor (rows, ...) in a field of a state."""
    if isinstance(value, Tensor):
        return value[rows]
    if isinstance(value, (list, tuple)):
        return type(value)(_rows_of(item, rows) for item in value)
    return value


@torch.no_grad()
def feed_forward_step(layer: ConditionalRoutedFeedForward, x: Tensor, state: RouterState) -> Tensor:
    """The causal feed-forward's output (b, 1, dim) for the next token x (b, 1, dim); changes the state."""
    router = _causal_router(layer)
    x = layer.norm(x)
    admission = router.at_once(layer.num_heavy_tokens)
    admitted, score = _route_query(router, x, state, admission)
    if len(state.window) == router.window_size:
        _finish_window(router, state, (admission,))
    out = layer.light_ff(x)
    # on a GPU the host would have to wait for the answer
    if x.is_cuda or admitted.any():
        heavy = layer.heavy_ff(x)
        out = out + (heavy * score.to(heavy.dtype)[:, None, None]).masked_fill(~admitted[:, None, None], 0.0)
    return out


@torch.no_grad()
def attention_step(layer: ConditionalRoutedAutoregressiveAttention, x: Tensor, state: AttentionState) -> Tensor:
    """The layer's output (b, 1, dim) for the next token x (b, 1, dim), routing="causal"; changes the state."""
    if layer.routing != "causal":
        raise ValueError(f"layer: routing={layer.routing!r} needs the whole window; build it with 'causal'")
    x = layer.norm(x)
    query, key_value = layer.admissions(layer.num_heavy_tokens_q, layer.num_heavy_tokens_kv)
    admitted, score = _route_query(layer.router, x, state.router, query)
    out = _light_step(layer, x, state)
    if state.memory is not None:
        heavy = _heavy_step(layer, x, score, state)
        null = heavy.new_zeros(()) if layer.null_q_token is None else layer.null_q_token.to(heavy.dtype)
        out = out + torch.where(admitted[:, None, None], heavy, null)
    state.window.append(x)
    state.position += 1
    if len(state.window) == layer.heavy_window_size:
        _finish_window(layer.router, state.router, (query, key_value))
        _remember(layer, state, key_value)
        state.window.clear()
    return out


def _route_query(router: CausalRouter, x: Tensor, state: RouterState, admission: Admission) -> tuple[Tensor, Tensor]:
    """Whether the token x (b, 1, dim) is admitted (b,) bool, and its score (b,)."""
    scores = router.raw_scores(x).squeeze(-1)
    state.window.append(scores)
    score = scores[:, 0]
    if state.num_admitted is None:
        return torch.zeros_like(score, dtype=torch.bool), torch.zeros_like(score)
    admitted = admit_next(score, state.threshold, state.num_admitted, admission.num_places)
    state.num_admitted = state.num_admitted + admitted
    if state.duals is None or state.threshold is None or router.straight_through:
        return admitted, torch.ones_like(score)
    return admitted, router.scores_by_past(score, state.duals[:, 0])


def _finish_window(router: CausalRouter, state: RouterState, admissions: Sequence[Admission]) -> None:
    """Take the window's scores among the past, and what they say about the next."""
    window = torch.stack(state.window, dim=-1).unsqueeze(2)
    state.window.clear()
    _set_past(router, state, window if state.past is None else torch.cat((state.past, window), dim=2), admissions)


def _set_past(router: CausalRouter, state: RouterState, past: Tensor, admissions: Sequence[Admission]) -> None:
    """past: raw scores (b, r, windows, w) of all windows or of the last ones."""
    past = past[:, :, -HISTORY:]
    state.past = past
    state.num_admitted = torch.zeros(past.shape[0], dtype=torch.int64, device=past.device)
    if admissions[0].routes(router.window_size):
        state.threshold = admission_threshold(past[:, 0], admissions[0].num_tokens)[..., -1]
    if any(admission.routes(router.window_size) for admission in admissions):
        state.duals = router.duals(past.flatten(2), admissions, past.shape[2])[..., -1]


def _read_scores(router: CausalRouter, scores: Tensor, state: RouterState, admissions: Sequence[Admission]) -> None:
    """The state after tokens of raw scores (b, r, n)."""
    windows = scores.shape[-1] // router.window_size
    whole = windows * router.window_size
    rest = scores[..., whole:]
    if windows:
        _set_past(router, state, scores[..., :whole].unflatten(-1, (windows, -1)), admissions)
        state.num_admitted = num_admitted(rest[:, 0], state.threshold, admissions[0].num_places)
    state.window = list(rest.unbind(dim=-1))


def _read_attention(layer: ConditionalRoutedAutoregressiveAttention, x: Tensor) -> AttentionState:
    """The state after the tokens x (b, n, dim), normalised as the routers see them."""
    admissions = layer.admissions(layer.num_heavy_tokens_q, layer.num_heavy_tokens_kv)
    state, length, width = AttentionState(position=x.shape[1]), x.shape[1], layer.heavy_window_size
    _read_scores(layer.router, layer.router.raw_scores(x), state.router, admissions)
    recent = x[:, -2 * layer.light_attn.radius :]
    state.light = _light_projection(layer, recent, length - recent.shape[1])[1:]
    state.window = [token.unsqueeze(1) for token in x[:, length // width * width :].unbind(dim=1)]
    if length >= width:
        # one token more opens a window that reads the last whole one
        route = layer.router.admit(F.pad(x, (0, 0, 0, int(length % width == 0))), admissions)[1]
        assert route.indices is not None and route.mask is not None
        _keep(layer, state, gather_tokens(x, route.indices), route.indices, route.mask, route.scores)
    return state


def _causal_router(layer: ConditionalRoutedFeedForward) -> CausalRouter:
    if not isinstance(layer.router, CausalRouter):
        raise ValueError("layer: a feed-forward with routing='topk' sees the whole sequence; build it with 'causal'")
    return layer.router


def _light_projection(
    layer: ConditionalRoutedAutoregressiveAttention, x: Tensor, position: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Light queries, keys and values (b, heads, t, dim_head) of tokens x (b, t, dim), the first at `position`."""
    light = layer.light_attn
    places = torch.arange(position, position + x.shape[1], device=x.device)
    angles = _angles_at(layer.light_rotary_emb, places, x)
    return rotated_queries_and_keys(light.to_qkv(light.norm(x)), angles, light.heads)


def _light_step(layer: ConditionalRoutedAutoregressiveAttention, x: Tensor, state: AttentionState) -> Tensor:
    """Light attention's output (b, 1, dim)."""
    light = layer.light_attn
    q, k, v = _light_projection(layer, x, state.position)
    if state.light is not None:
        k, v = torch.cat((state.light[0], k), dim=2), torch.cat((state.light[1], v), dim=2)
    # the windows before the one before the token's own are out of sight
    seen = state.position % light.radius + 1 + light.radius
    state.light = k[:, :, -seen:], v[:, :, -seen:]
    return light.to_out(merge_heads(attend(q, *state.light)))


def _heavy_step(
    layer: ConditionalRoutedAutoregressiveAttention, x: Tensor, score: Tensor, state: AttentionState
) -> Tensor:
    """Heavy attention's output (b, 1, dim), times the score (b,)."""
    assert state.memory is not None
    heavy = layer.heavy_attn
    score = score.unsqueeze(-1)
    angles = _angles_at(layer.rotary_emb, torch.tensor([state.position], device=x.device), x)
    rotary = None if angles is None else (angles, angles)
    q, _, _ = heavy.project(x, x, None, score if layer.multiply_queries_by_score else None, rotary)
    k, v, mask = state.memory
    if heavy.null_kv is not None:
        null_k, null_v = heavy.null(k)
        k, v = torch.cat((null_k, k), dim=2), torch.cat((null_v, v), dim=2)
        mask = F.pad(mask, (1, 0), value=True)
    out = heavy.to_out(merge_heads(attend(q, k, v, mask=mask)))
    return out * score.to(out.dtype).unsqueeze(-1)


def _remember(layer: ConditionalRoutedAutoregressiveAttention, state: AttentionState, admission: Admission) -> None:
    """Admit keys and values of the window that has ended."""
    router, past = layer.router, state.router.past
    assert past is not None
    windows, width = past.shape[2:]
    raw = past[:, 1:].flatten(2)
    pick_by = raw if admission.routes(width) else torch.zeros_like(raw)
    indices, taken = (t[..., -admission.num_places :] for t in router.places(pick_by, admission, windows))
    indices = indices - (windows - 1) * width
    scores = torch.ones_like(raw[..., -width:])
    if admission.routes(width) and not router.straight_through:
        assert state.router.duals is not None
        duals = state.router.duals[:, 1:].unsqueeze(-1)
        scores = router.scores_by_past(raw[..., -width:], duals)
    scores = scores.gather(-1, indices).masked_fill(~taken, 0.0)
    tokens = gather_tokens(torch.cat(state.window, dim=1), indices)
    _keep(layer, state, tokens, state.position - width + indices, taken, scores)


def _keep(
    layer: ConditionalRoutedAutoregressiveAttention,
    state: AttentionState,
    tokens: Tensor,
    positions: Tensor,
    taken: Tensor,
    scores: Tensor,
) -> None:
    """Add keys and values to the memory, which keeps the newest taken ones.

    Args:
        layer: the attention layer.
        state: its state, changed here.
        tokens: (b, r, m, dim).
        positions: (b, r, m), of the tokens in the text.
        taken: (b, r, m) bool, False: a free place.
        scores: (b, r, m), routing scores.
    """
    angles = _angles_at(layer.rotary_emb, positions, tokens)
    rotary = None if angles is None else (angles[:, 0, :1], angles)
    _, k, v = layer.heavy_attn.project(tokens[:, 0, :1], tokens, scores, None, rotary)
    mask = layer.heavy_attn.by_head(taken, taken.shape[1]).expand(-1, layer.heavy_attn.heads, -1)
    if state.memory is not None:
        k, v = torch.cat((state.memory[0], k), dim=2), torch.cat((state.memory[1], v), dim=2)
        mask = torch.cat((state.memory[2], mask), dim=2)
    # free places before the taken ones, which stay in order; the newest are kept
    kept = mask.int().argsort(dim=-1, stable=True)[..., -layer.num_heavy_tokens_kv :]
    places = kept.unsqueeze(-1).expand(-1, -1, -1, k.shape[-1])
    state.memory = k.gather(2, places), v.gather(2, places), mask.gather(2, kept)


def _angles_at(rotary: RotaryEmbedding | None, positions: Tensor, x: Tensor) -> Tensor | None:
    """Angles (..., dim_head) of positions (...), None without rotary positions."""
    return None if rotary is None else rotary.at(positions.to(angle_dtype(x)))
