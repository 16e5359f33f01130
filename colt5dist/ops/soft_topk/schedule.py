"""What a run of coordinate descent does at each iteration: the temperature, and which states are kept."""


def epsilon_schedule(eps: float, eps_init: float, eps_decay: float, n_iters: int) -> list[float]:
    """Temperatures eps_1 .. eps_{T+1} of T = `n_iters` iterations; the last one is that of the output.

    eps_t = max(eps_init * eps_decay ** (t - 1), eps): the eps-scaling of CoDA, 2304.04947.
    """
    current = max(eps_init, eps)
    epsilons = [current]
    for _ in range(n_iters):
        current = max(current * eps_decay, eps)
        epsilons.append(current)
    return epsilons


def segment_ends(n_iters: int, segments: int) -> list[int]:
    """Last iteration, counted from 1, of each of `segments` segments of nearly equal length."""
    return [(segment + 1) * n_iters // segments for segment in range(segments)]
