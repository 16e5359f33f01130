"""The heavy branch of conditional attention: from routed tokens back to their positions in the sequence."""

import torch
from torch import Tensor

from colt5dist.nn.attention.attention import Attention
from colt5dist.nn.attention.rotary import Angles, map_angles
from colt5dist.nn.routing.gather_scatter import add_routed, gather_positions, gather_tokens
from colt5dist.nn.routing.router import Route
from colt5dist.ops.checks import check_counts


def check_sets(name: str, num_sets: int, heads: int) -> None:
    """Raise ValueError where argument `name` asks for routed sets that cannot share the heads evenly."""
    check_counts(**{name: num_sets})
    if heads % num_sets:
        raise ValueError(f"{name}: {num_sets} sets cannot share {heads} heads evenly; use a divisor of the heads")


def attend_routed(
    attention: Attention,
    x: Tensor,
    context: Tensor,
    query: Route,
    key_value: Route,
    *,
    multiply_queries_by_score: bool = False,
    angles: Angles | None = None,
) -> Tensor:
    """Outputs of the routed queries over the routed sets of the context, times the queries' scores.

    Where all of the context is taken, every set reads it without a copy.

    Args:
        attention: the attention layer.
        x: (b, n, dim).
        context: (b, j, dim).
        query: routing of x, one route.
        key_value: routing of the context, one route for each set.
        multiply_queries_by_score: whether the queries are multiplied by their scores, too.
        angles: rotary angles of all n positions, of x and context alike.

    Returns:
        (b, m, dim).
    """
    indices_q = None if query.indices is None else query.indices.squeeze(1)
    indices_kv = key_value.indices
    tokens_q = x if indices_q is None else gather_tokens(x, indices_q)
    scores_kv, mask = key_value.scores, key_value.mask
    if indices_kv is None:
        scores_kv, mask = scores_kv[:, 0], None if mask is None else mask[:, 0]
    else:
        context = gather_tokens(context, indices_kv)
    rotary = None
    if angles is not None:
        rotary = (
            angles if indices_q is None else map_angles(lambda a: gather_positions(a, indices_q), angles),
            angles if indices_kv is None else map_angles(lambda a: gather_positions(a, indices_kv), angles),
        )
    scores_q = query.scores.squeeze(1)
    heavy = attention(
        tokens_q,
        context=context,
        mask=mask,
        normalized_scores_kv=scores_kv,
        normalized_scores_q=scores_q if multiply_queries_by_score else None,
        rotary_emb=rotary,
    )
    return heavy * scores_q.to(heavy.dtype).unsqueeze(-1)


def put_back(
    x: Tensor, heavy: Tensor, query: Route, *, light: Tensor | None = None, null_token: Tensor | None = None
) -> Tensor:
    """The heavy outputs at their positions in the sequence, with the light branch added.

    Args:
        x: (b, n, dim), the sequence.
        heavy: (b, m, dim), the outputs of the routed queries.
        query: routing of the queries.
        light: (b, n, dim), output of the light branch; None: there is none.
        null_token: (dim,), heavy output of the other tokens; None: 0.

    Returns:
        (b, n, dim).
    """
    if query.indices is None:
        out = heavy if light is None else light + heavy
        # the null token is unused here and must still have a gradient: see CoordinateDescentRouter._scores
        return out if null_token is None else out + (0.0 * null_token).to(out.dtype)
    base = torch.zeros_like(x, dtype=heavy.dtype) if light is None else light
    return add_routed(base, heavy, query.indices.squeeze(1), fill=null_token)
