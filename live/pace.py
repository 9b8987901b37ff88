"""How well does a stream keep time? The figures of people who serve video, the same for a live page, a file
and a benchmark.

A frame is *due* when playback at an even rate reaches it, *ready* when its chunk is done, *shown* when a
viewer gets it. Deadlines do not move: after a frame that comes late, all others are late until the stream has
caught up. A player that is behind shows frames faster than the rate, but still evenly.
"""

from collections.abc import Sequence

import torch

CATCH_UP = 0.8  # of the time between two frames, while playback is behind


def shown_at(due: float, ready: float, last: float, gap: float) -> float:
    """Seconds at which a frame is shown; `last`: the one before it; `gap`: between two frames at the rate."""
    return max(due, ready, last + CATCH_UP * gap)


def figures(due: Sequence[float], ready: Sequence[float], shown: Sequence[float], gap: float) -> dict:
    """Seconds per frame, one clock for all → late: how many frames were not ready when due; behind: seconds
    from the last frame's deadline to its being shown; p50, p99: of jitter, by how many seconds the time
    between two frames differs from `gap`."""
    due, ready, shown = (torch.tensor(list(times), dtype=torch.float64) for times in (due, ready, shown))
    jitter = (shown.diff() - gap).abs() if len(shown) > 1 else torch.zeros(1, dtype=torch.float64)
    p50, p99 = jitter.quantile(torch.tensor([0.5, 0.99], dtype=torch.float64)).tolist()
    behind = max(float(shown[-1] - due[-1]), 0.0)
    return {"late": int((ready > due + 1e-9).sum()), "behind": behind, "p50": p50, "p99": p99}


def played(seconds: Sequence[float], frames: Sequence[int], rate: float, live: bool = False) -> dict:
    """The figures of a stream whose chunks had that many `frames` and took `seconds` each, played at `rate`
    frames a second from the moment at which its first chunk is there, with that moment as `first`. live:
    video to video, a chunk can only begin when its last frame has arrived, at the same rate."""
    due, ready, shown, now = [], [], [], 0.0
    for chunk, count in zip(seconds, frames, strict=True):
        now = max(now, (len(due) + count) / rate if live else 0.0) + chunk
        for _ in range(count):
            due.append((ready[0] if ready else now) + len(due) / rate)
            ready.append(now)
            shown.append(shown_at(due[-1], now, shown[-1] if shown else 0.0, 1 / rate))
    return figures(due, ready, shown, 1 / rate) | {"first": ready[0]}


def in_words(found: dict, frames: int, rate: float) -> str:
    jitter = f"jitter p50 {1000 * found['p50']:.0f} ms, p99 {1000 * found['p99']:.0f} ms"
    return f"played at {rate:g} frames/s: {found['late']} of {frames} frames late, {jitter}"


def steps_in_time(steps: int, seconds: Sequence[float], period: float, context: str) -> int:
    """The most steps with which 95 of 100 chunks are ready within `period`, from what chunks of `steps` took;
    a chunk costs its steps and, clean or noisy, a pass for the cache."""
    extra, slow = context in ("clean", "noisy"), torch.as_tensor(seconds, dtype=torch.float64).quantile(0.95)
    return max(int(period * (steps + extra) / slow) - extra, 0)


def fitting_steps(steps: int, most: int, took: Sequence[float], period: float) -> int:
    """Denoising steps for the next chunks, from the seconds that chunks of `steps` `took` and the `period`
    that playback leaves them: one fewer if most of the last three were too slow, one more if the last eight
    leave room for it. Besides its steps a chunk costs a pass for the cache."""
    slow = sum(seconds > period for seconds in list(took)[-3:]) > 1
    room = len(took) >= 8 and steps_in_time(steps, took, 0.8 * period, "clean") > steps
    return min(max(steps + room - slow, 1), most)
