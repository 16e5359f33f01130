"""The heavy branch of causal conditional attention: queries of a window attend to what earlier windows admitted."""

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from colt5dist.nn.attention.attend import attend, merge_heads
from colt5dist.nn.attention.attention import Attention
from colt5dist.nn.attention.rotary import Angles


class MemoryAttention(Attention):
    """`Attention` of windows of queries to the newest taken places of the windows before them.

    Each of v windows in order has the same number of queries and, before it in time, one window of places for keys and
    values. The taken places of all windows, in order, are one list; the queries of window i see the last `memory_size`
    entries of that list as it was before window i.

    Windows of queries attend in groups, so that a group's keys are read together: those before its first window, then
    those that its own windows add. The position of a key in the group depends on no later token, so no output changes
    by one bit with a later one. The number of windows in a group is such that the keys are copied about twice: memory
    is linear in the number of windows.
    """

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        normalized_scores_kv: Tensor | None = None,
        normalized_scores_q: Tensor | None = None,
        rotary_emb: tuple[Angles, Angles] | None = None,
        *,
        num_windows: int | None = None,
        memory_size: int = 0,
    ) -> Tensor:
        """Attend; the taken places of a window come before its free ones.

        Args:
            x: (b, v * q, dim), v windows of q queries.
            context: (b, r, v * p, dim), r routed sets of v windows of p places.
            mask: (b, r, v * p) bool, True = taken.
            normalized_scores_kv: as in `Attention.forward`.
            normalized_scores_q: as in `Attention.forward`.
            rotary_emb: as in `Attention.forward`.
            num_windows: v; None: all arguments are those of `Attention.forward`.
            memory_size: keys/values that a window sees, for each set.

        Returns:
            (b, v * q, dim).
        """
        weights = (normalized_scores_kv, normalized_scores_q, rotary_emb)
        if num_windows is None:
            return super().forward(x, context, mask, *weights)
        assert mask is not None
        q, k, v = self.project(x, context, *weights)
        batch, heads = q.shape[:2]
        num_routes = mask.shape[1]
        num_places = mask.shape[-1] // num_windows
        num_queries = q.shape[2] // num_windows
        group = min(num_windows, 1 + -(-memory_size // num_places))
        num_groups = -(-num_windows // group)

        entries, seen = _memory(mask.unflatten(-1, (num_windows, num_places)), group, memory_size)
        # (b, r, groups, l) -> rows of the keys of all heads, concatenated
        entries = self.by_head(entries, num_routes).expand(-1, heads, -1, -1)
        first = torch.arange(batch * heads, device=k.device).view(batch, heads, 1, 1) * k.shape[2]
        rows = rearrange(entries + first, "b h g l -> (b g h l)")
        group_shape = {"b": batch, "g": num_groups, "h": heads, "l": entries.shape[-1]}
        k, v = (keys.flatten(0, 2).index_select(0, rows) for keys in (k, v))
        k, v = (rearrange(keys, "(b g h l) d -> (b g) h l d", **group_shape) for keys in (k, v))

        q = F.pad(q, (0, 0, 0, (num_groups * group - num_windows) * num_queries))
        q = rearrange(q, "b h (g i) d -> (b g) h i d", g=num_groups)
        seen = repeat(self.by_head(seen, num_routes), "b h g w l -> (b g) h (w i) l", i=num_queries)
        if self.null_kv is not None:
            null_k, null_v = self.null(k)
            k, v = torch.cat((null_k, k), dim=2), torch.cat((null_v, v), dim=2)
            seen = F.pad(seen, (1, 0), value=True)
        out = rearrange(attend(q, k, v, mask=seen), "(b g) h i d -> b h (g i) d", b=batch, g=num_groups)
        return self.to_out(merge_heads(out[:, :, : num_windows * num_queries]))


def _memory(taken: Tensor, group: int, memory_size: int) -> tuple[Tensor, Tensor]:
    """Which places a group of windows reads, and which of them each window sees.

    Args:
        taken: (b, r, v, p) bool.
        group: windows in a group.
        memory_size: places that a window sees.

    Returns:
        Places (b, r, groups, l) int64 whose keys each group reads, and whether each of its windows sees them (b, r,
        groups, group, l) bool.
    """
    num_windows, num_places = taken.shape[2:]
    num_groups = -(-num_windows // group)
    # entries of the list before each window's queries: its own window of places has already been filled
    before = taken.sum(dim=-1).cumsum(dim=-1)
    first = before[..., ::group]
    # the first window of the last group is not preceded by more than this
    reach = min(memory_size, ((num_groups - 1) * group + 1) * num_places)
    offsets = torch.arange(-reach, (group - 1) * num_places, device=taken.device)
    entry = first.unsqueeze(-1) + offsets  # (b, r, groups, l)
    # an entry of the list -> the window that brought it, and its place there
    flat = entry.flatten(2)
    window = torch.searchsorted(before, flat, right=True).clamp(max=num_windows - 1)
    brought_before = F.pad(before, (1, 0)).gather(-1, window)
    place = window * num_places + (flat - brought_before).clamp(0, num_places - 1)
    end = F.pad(before, (0, num_groups * group - num_windows), value=0).unflatten(-1, (num_groups, group)).unsqueeze(-1)
    entry = entry.unsqueeze(-2)
    seen = (entry >= 0) & (entry >= end - memory_size) & (entry < end)
    return rearrange(place, "b r (g l) -> b r g l", g=num_groups), seen
