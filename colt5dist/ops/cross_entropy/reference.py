"""Cross-entropy of rows of logits and its gradient in plain PyTorch."""

from torch import Tensor


def cross_entropy_reference(logits: Tensor, targets: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Loss and logsumexp of each row.

    Args:
        logits: (rows, columns).
        targets: (rows,) int64.
        valid: (rows,) bool, True = counts; None: all.

    Returns:
        Cross-entropy in nats and logsumexp, each (rows,) float32 and 0 where not valid.
    """
    wide = logits.float()
    normaliser = wide.logsumexp(dim=-1)
    loss = normaliser - wide.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    if valid is None:
        return loss, normaliser
    return loss.masked_fill(~valid, 0.0), normaliser.masked_fill(~valid, 0.0)


def cross_entropy_gradient_reference_(
    logits: Tensor,
    targets: Tensor,
    valid: Tensor | None,
    normaliser: Tensor,
    grad_loss: Tensor,
    grad_normaliser: Tensor,
) -> None:
    """Write the gradient of the logits over the logits.

    Args:
        logits: (rows, columns), overwritten.
        targets: (rows,) int64.
        valid: (rows,) bool, True = counts; None: all.
        normaliser: (rows,) float32, the rows' logsumexp.
        grad_loss: (rows,) float32, gradient of the loss.
        grad_normaliser: (rows,) float32, gradient of the logsumexp.
    """
    gradient = (logits.float() - normaliser.unsqueeze(-1)).exp_()
    gradient *= (grad_loss + grad_normaliser).unsqueeze(-1)
    gradient.scatter_add_(-1, targets.unsqueeze(-1), -grad_loss.unsqueeze(-1))
    if valid is not None:
        gradient.masked_fill_(~valid.unsqueeze(-1), 0.0)
    logits.copy_(gradient)
