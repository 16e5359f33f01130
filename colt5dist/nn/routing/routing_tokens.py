"""The routers' vectors and their product with the tokens: the raw scores."""

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from colt5dist.nn.initial import normal_

MOST_JOINED_ROUTES = 4


class _WideProduct(torch.autograd.Function):
    """x (t, d) @ weight (r, d)^T for 16-bit arguments on CUDA, summed and returned in float32.

    A float32 copy of x, the largest tensor of a layer, is never made; a 16-bit result would tie scores that differ.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.mm(x, weight.t(), out_dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad = grads[0].to(x.dtype)
        grad_x = _outer(grads[0], weight) if ctx.needs_input_grad[0] else None
        grad_weight = grad.t() @ x if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight


def _outer(grad: Tensor, weight: Tensor) -> Tensor:
    """grad (t, r) float32 @ weight (r, d), in the type of the weight.

    A compiler joins sums of a few products with the operators beside them; a matrix product reads and writes alone.
    """
    if not torch.compiler.is_compiling() or weight.shape[0] > MOST_JOINED_ROUTES:
        return grad.to(weight.dtype) @ weight
    wide = weight.float()
    total = grad[:, :1] * wide[0]
    for route in range(1, weight.shape[0]):
        total = total + grad[:, route : route + 1] * wide[route]
    return total.to(weight.dtype)


def routing_scores(x: Tensor, routing_tokens: Tensor) -> Tensor:
    """Products of the tokens x (b, n, d) with routing tokens (r, d), or (b, r, d) that differ by sample -> (b, r, n).

    Float32, float64 for float64 arguments, also under autocast.
    """
    batch, length = x.shape[:2]
    with torch.autocast(x.device.type, enabled=False):
        if routing_tokens.dim() == 2 and x.is_cuda and x.dtype == routing_tokens.dtype and x.dtype.itemsize == 2:
            product = _WideProduct.apply(x.flatten(0, 1), routing_tokens)
            return rearrange(product, "(b n) r -> b r n", b=batch, n=length).contiguous()
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        x, routing_tokens = x.to(dtype), routing_tokens.to(dtype)
        if routing_tokens.dim() == 2:
            product = x.flatten(0, 1) @ routing_tokens.t()
            return rearrange(product, "(b n) r -> b r n", b=batch, n=length).contiguous()
        return routing_tokens @ x.transpose(1, 2)


def cosine_similarity(scores: Tensor, x: Tensor, routing_tokens: Tensor) -> Tensor:
    """Scores (b, r, n) of x (b, n, d) and routing tokens (r, d) or (b, r, d), divided by the lengths of both."""
    x_length = torch.linalg.vector_norm(x, dim=-1, dtype=scores.dtype).clamp(min=1e-12)
    token_length = torch.linalg.vector_norm(routing_tokens, dim=-1, dtype=scores.dtype).clamp(min=1e-12)
    return scores / (x_length.unsqueeze(-2) * token_length.unsqueeze(-1))


class RoutingTokens(nn.Module):
    """One learned vector for each route: x (b, n, dim) -> raw scores (b, r, n).

    All routes that read the same x have their vectors in one parameter.

    Args:
        num_routes: routes, r.
        dim: width of a token of x.
        std: standard deviation of the initial vectors. With x of mean square 1, dim**-0.5 gives scores of variance 1.
        cosine_sim: whether the scores are products of unit vectors.
    """

    def __init__(self, num_routes: int, dim: int, *, std: float, cosine_sim: bool) -> None:
        super().__init__()
        self.cosine_sim = cosine_sim
        self.weight = nn.Parameter(normal_(torch.empty(num_routes, dim), std))

    def forward(self, x: Tensor) -> Tensor:
        """x (b, n, dim) -> (b, r, n), float32 (float64 for float64 x)."""
        scores = routing_scores(x, self.weight)
        return cosine_similarity(scores, x, self.weight) if self.cosine_sim else scores
