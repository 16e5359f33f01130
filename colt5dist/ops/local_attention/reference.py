"""Local attention by the package `local-attention`: windows of keys around windows of queries.

A compiler gets it as one operator, whose backward runs it again: the package looks around by overlapping
`Tensor.unfold`, whose gradient PyTorch's compiler gets wrong on CPU (up to 2.13; eager PyTorch is right).
"""

# mypy: allow-untyped-defs
# (autograd's context has no type)

import torch
from local_attention import LocalAttention
from torch import Tensor
from torch.library import Library, register_autograd, register_fake


def local_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, *, radius: int, mask: Tensor | None, bias: Tensor | None
) -> Tensor:
    """Shapes as in `local_attention`; the scores of a window of queries with three windows of keys are held in
    memory."""
    if mask is None:
        # without a mask the package attends to the zeros that it pads the sequence with
        mask = torch.ones((q.shape[0], q.shape[-2]), dtype=torch.bool, device=q.device)
    window_bias = None
    if bias is not None:
        # (heads, window, three windows): the first key is one window before the first query
        query = torch.arange(radius, device=q.device).unsqueeze(-1)
        key = torch.arange(-radius, 2 * radius, device=q.device)
        window_bias = bias[:, (key - query + radius).clamp(0, 2 * radius)].to(q.dtype)
    return _attend(q, k, v, mask, window_bias, radius, False)


def local_attention_causal_reference(q: Tensor, k: Tensor, v: Tensor, *, radius: int, mask: Tensor | None) -> Tensor:
    """The causal form; the padding that the package adds is at the end, where no query sees it."""
    return _attend(q, k, v, mask, None, radius, True)


def _attend(*inputs) -> Tensor:
    """What `_by_package` takes; one operator for a compiler."""
    if torch.compiler.is_compiling():
        return torch.ops.colt5dist.local_attention_of_package(*inputs)
    return _by_package(*inputs)


def _by_package(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, window_bias: Tensor | None, radius: int, causal: bool
) -> Tensor:
    attention = LocalAttention(
        window_size=radius,
        causal=causal,
        look_backward=1,
        look_forward=0 if causal else 1,
        exact_windowsize=not causal,
        autopad=True,
        use_rotary_pos_emb=False,
    )
    return attention(q, k, v, mask=mask, attn_bias=window_bias)


def _forward(*inputs):
    q = inputs[0]
    # of the type that was promised to the compiler; under autocast the package may give another
    return _by_package(*inputs).to(q.dtype).contiguous()


def _fake_forward(q, *_others):
    return q.new_empty(q.shape)


def _backward(grad, q, k, v, mask, window_bias, radius, causal):
    given = [x for x in (q, k, v, window_bias) if x is not None]
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_() for x in given]
        bias = None if window_bias is None else inputs[3]
        out = _by_package(inputs[0], inputs[1], inputs[2], mask, bias, radius, causal)
        grads = [x.contiguous() for x in torch.autograd.grad(out, inputs, grad.to(out.dtype))]
    return *grads[:3], q.new_empty(0) if window_bias is None else grads[3]


def _fake_backward(_grad, q, k, v, _mask, window_bias, *_settings):
    grad_bias = q.new_empty(0) if window_bias is None else window_bias.new_empty(window_bias.shape)
    return *(x.new_empty(x.shape) for x in (q, k, v)), grad_bias


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.radius, ctx.causal = inputs
    ctx.save_for_backward(*tensors)


def _gradient(ctx, grad):
    saved = ctx.saved_tensors  # once: activation checkpointing refuses a second look
    grads = torch.ops.colt5dist.local_attention_of_package_backward(grad, *saved, ctx.radius, ctx.causal)
    return *grads[:3], None, None if saved[4] is None else grads[3], None, None


_LIBRARY = Library("colt5dist", "FRAGMENT")
_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? window_bias, int radius, bool causal"
_LIBRARY.define(f"local_attention_of_package({_INPUTS}) -> Tensor")
_LIBRARY.define(f"local_attention_of_package_backward(Tensor grad, {_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor)")
_LIBRARY.impl("local_attention_of_package", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("local_attention_of_package_backward", _backward, "CompositeExplicitAutograd")
register_fake("colt5dist::local_attention_of_package", _fake_forward, lib=_LIBRARY)
register_fake("colt5dist::local_attention_of_package_backward", _fake_backward, lib=_LIBRARY)
register_autograd("colt5dist::local_attention_of_package", _gradient, setup_context=_setup_context, lib=_LIBRARY)
