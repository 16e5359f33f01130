"""What the routers of every layer did with one document, as arrays."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from colt5dist.data.model_tokenizer import ModelTokenizer
from colt5dist.data.read.batch import Batch
from colt5dist.model.routing_statistics import ROUTER_NAMES, LayerRouting
from colt5dist.pretrained.routing.token_kinds import KINDS, token_kinds, token_texts


@dataclass(frozen=True, kw_only=True)
class DocumentRouting:
    """One document of n tokens in L conditional layers; padding is left out."""

    texts: list[str]
    """(n,) text of each token; sentinels are written <0>, <1>, ..., other special tokens <>."""
    kinds: NDArray[np.int8]
    """(n,) kind of each token, an index into KINDS."""
    scores: dict[str, NDArray[np.float32]]
    """Router -> (L, n) soft scores, from 0 to 1."""
    routed: dict[str, NDArray[np.bool_]]
    """Router -> (L, n), whether the token was routed."""

    def kind_shares(self, router: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Shares of the kinds among all tokens, and among those that a router picked.

        Args:
            router: `feed_forward`, `query` or `key_value`.

        Returns:
            (kinds,) and (L, kinds), each of which sums to 1 over the kinds (0 where a layer routed no token).
        """
        is_kind = self.kinds == np.arange(len(KINDS))[:, None]
        routed = self.routed[router].astype(np.float64) @ is_kind.T
        return is_kind.mean(axis=1), routed / np.maximum(routed.sum(axis=1, keepdims=True), 1)


def seen_ids(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """The ids that the conditional layers read, and which of them are valid: both (b, n).

    They are the inputs, or, without an encoder, what the decoder reads.
    """
    if batch["input_ids"].shape[1]:
        return batch["input_ids"], batch["input_mask"]
    return batch["decoder_input_ids"], batch["target_mask"]


def document_routing(
    routing: Sequence[LayerRouting], batch: Batch, row: int, tokenizer: ModelTokenizer
) -> DocumentRouting:
    """Take one row of a micro-batch out of what the routers did.

    Args:
        routing: one entry per conditional layer, of this micro-batch; at least one.
        batch: the micro-batch.
        row: which of its rows.
        tokenizer: the model's tokenizer.
    """
    ids, mask = seen_ids(batch)
    valid = mask[row].cpu().numpy()
    found = ids[row].cpu().numpy()[valid].tolist()
    texts = token_texts(found, tokenizer)
    first = tokenizer.first_sentinel
    named = [f"<{token - first}>" if token >= first else text or "<>" for token, text in zip(found, texts, strict=True)]
    scores: dict[str, NDArray[np.float32]] = {}
    routed: dict[str, NDArray[np.bool_]] = {}
    for name in ROUTER_NAMES:
        of_layers = [getattr(layer, name) for layer in routing]
        scores[name] = torch.stack([tokens.soft_scores[row] for tokens in of_layers]).float().cpu().numpy()[:, valid]
        picked = torch.stack(
            [
                torch.zeros_like(tokens.soft_scores[row], dtype=torch.bool).scatter(
                    -1, tokens.indices[row], tokens.mask[row]
                )
                for tokens in of_layers
            ]
        )
        routed[name] = picked.cpu().numpy()[:, valid]
    return DocumentRouting(texts=named, kinds=token_kinds(found, tokenizer), scores=scores, routed=routed)
