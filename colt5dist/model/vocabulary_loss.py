"""Cross-entropy over the vocabulary, chunk by chunk, by the module that owns the output embedding."""

from typing import Any

import torch
from torch import Tensor, nn

from colt5dist.nn.initial import normal_
from colt5dist.ops.cross_entropy import vocabulary_cross_entropy

# logits of one chunk of tokens: 256 MiB in float32
MAX_CHUNK_LOGITS = 2**26
# logits that are kept whole: 2 GiB in bf16
MAX_KEPT_LOGITS = 2**30


class _ChunkedCrossEntropy(torch.autograd.Function):
    """hidden (t, d), weight (vocabulary, d), targets (t,) -> cross-entropy (t,) and logsumexp (t,), both float32.

    The logits of a chunk of tokens exist only while that chunk is computed, in the forward and again in the backward
    pass:
        d logits = softmax * (g_loss + g_logsumexp) - onehot(target) * g_loss
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        rows = max(1, MAX_CHUNK_LOGITS // weight.shape[0])
        losses, normalisers = [], []
        for chunk, target in zip(hidden.split(rows), targets.split(rows), strict=True):
            logits = _wide(chunk @ weight.t())
            normaliser = logits.logsumexp(dim=-1)
            losses.append(normaliser - logits.gather(-1, target.unsqueeze(-1)).squeeze(-1))
            normalisers.append(normaliser)
        normaliser = torch.cat(normalisers)
        ctx.save_for_backward(hidden, weight, targets, normaliser)
        return torch.cat(losses), normaliser

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        hidden, weight, targets, normaliser = ctx.saved_tensors
        grad_loss, grad_normaliser = grads
        rows = max(1, MAX_CHUNK_LOGITS // weight.shape[0])
        num_chunks = max(1, -(-hidden.shape[0] // rows))
        grad_hidden = torch.empty_like(hidden)
        # several chunks are summed in float32, whatever the weight's type
        grad_weight = torch.zeros_like(weight, dtype=normaliser.dtype) if num_chunks > 1 else None
        for number in range(num_chunks):
            part = slice(number * rows, (number + 1) * rows)
            grad_logits = (_wide(hidden[part] @ weight.t()) - normaliser[part].unsqueeze(-1)).exp_()
            grad_logits *= (grad_loss[part] + grad_normaliser[part]).unsqueeze(-1)
            grad_logits.scatter_add_(-1, targets[part].unsqueeze(-1), -grad_loss[part].unsqueeze(-1))
            grad_logits = grad_logits.to(hidden.dtype)
            grad_hidden[part] = grad_logits @ weight
            chunk_grad = grad_logits.t() @ hidden[part]
            grad_weight = chunk_grad if grad_weight is None else grad_weight.add_(chunk_grad)
        assert grad_weight is not None
        return grad_hidden, grad_weight.to(weight.dtype), None


def _wide(logits: Tensor) -> Tensor:
    """Float32, unless the logits are float64."""
    return logits if logits.dtype == torch.float64 else logits.float()


class VocabularyLoss(nn.Module):
    """Output embedding (untied, vocab_size x d_model) and the loss of its logits, token by token.

    On GPUs the logits of up to MAX_KEPT_LOGITS / vocab_size targets are kept for the backward pass, in the type of the
    products. Of more targets, and on CPUs, no tensor of (all tokens, vocabulary) is kept: their logits are computed
    again.

    Args:
        d_model: width of a hidden state.
        vocab_size: number of ids.
        std: standard deviation of the initial weight.
    """

    def __init__(self, d_model: int, vocab_size: int, *, std: float) -> None:
        super().__init__()
        self.num_ids = vocab_size
        self.weight = nn.Parameter(normal_(torch.empty(vocab_size, d_model), std))

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (..., d_model) -> (..., vocab_size), at least float32; for generation, outside of ZeRO-3."""
        return _wide(hidden @ self.weight.to(hidden.dtype).t())

    def _fits(self, target_ids: Tensor) -> bool:
        """Whether the logits of all targets are kept for the backward pass."""
        return target_ids.numel() * self.num_ids <= MAX_KEPT_LOGITS

    def forward(self, hidden: Tensor, target_ids: Tensor, target_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Loss of each target.

        Args:
            hidden: (b, t, d_model).
            target_ids: (b, t) int64.
            target_mask: (b, t) bool, True = counts; None: all.

        Returns:
            The cross-entropy in nats and the squared logsumexp of the logits, each (b, t) float32 (float64 for float64
            weights) and exactly 0 where masked, with gradient 0 there.
        """
        device = hidden.device.type
        weight: Tensor = self.weight
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            hidden, weight = hidden.to(dtype), weight.to(dtype)
        with torch.autocast(device, enabled=False):
            if hidden.is_cuda and hidden.dtype != torch.float64 and self._fits(target_ids):
                valid = None if target_mask is None else target_mask.flatten()
                loss, normaliser = vocabulary_cross_entropy(hidden.flatten(0, 1), weight, target_ids.flatten(), valid)
                return loss.view_as(target_ids), normaliser.square().view_as(target_ids)
            loss, normaliser = _ChunkedCrossEntropy.apply(hidden.flatten(0, 1), weight, target_ids.flatten())
            loss, z_loss = loss.view_as(target_ids), normaliser.square().view_as(target_ids)
            if target_mask is None:
                return loss, z_loss
            return loss.masked_fill(~target_mask, 0.0), z_loss.masked_fill(~target_mask, 0.0)
