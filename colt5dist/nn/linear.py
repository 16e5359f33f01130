"""Linear map whose weight is initialised where it is owned."""

from torch import nn

from colt5dist.nn.initial import normal_


class Linear(nn.Linear):
    """`torch.nn.Linear` with the standard deviation of its initial weight as an argument.

    The weight is drawn inside `__init__`, the only place where ZeRO-3 shows it whole.

    Args:
        in_features: width of the input.
        out_features: width of the output.
        bias: whether there is a bias; with std it starts at 0.
        std: standard deviation of the normal distribution from which the weight is drawn; None: PyTorch's
            initialisation, which the layers of colt5-attention have.
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False, std: float | None = None) -> None:
        self.std = std
        super().__init__(in_features, out_features, bias=bias)

    def reset_parameters(self) -> None:
        """Draw the initial weight."""
        if self.std is None:
            super().reset_parameters()
            return
        normal_(self.weight, self.std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
