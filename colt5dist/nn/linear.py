"""Linear map whose weight is initialised where it is owned."""

from torch import nn

from colt5dist.nn.initial import normal_


class Linear(nn.Linear):
    """`torch.nn.Linear` with the standard deviation of its initial weight as an argument.

    std: of the normal distribution that the weight is drawn from (the bias starts at 0); None keeps PyTorch's own
    initialisation, which is the seed layers'. The weight is drawn inside `__init__`, the only place where ZeRO-3 shows
    it whole.
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
