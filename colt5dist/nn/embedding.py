"""Token embedding whose weight is initialised where it is owned."""

from torch import nn

from colt5dist.nn.initial import normal_


class Embedding(nn.Embedding):
    """`torch.nn.Embedding` whose weight is drawn from a normal distribution inside `__init__`.

    Args:
        num_embeddings: number of ids.
        embedding_dim: width of a vector.
        std: standard deviation of the initial weight.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, *, std: float) -> None:
        self.std = std
        super().__init__(num_embeddings, embedding_dim)

    def reset_parameters(self) -> None:
        """Draw the initial weight."""
        normal_(self.weight, self.std)
