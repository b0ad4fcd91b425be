"""Drives of the expert as training data, and what a driver is given at each moment.

N moments, Q bins of a colour channel, S side of a frame, T speeds.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mbm_kernels.captioning.data import CaptionSet
from mbm_kernels.captioning.streams import color_histograms
from mbm_kernels.driving.simulator import HERTZ, LANES, TRACK, Pixels, Simulator

COMMANDS = (  # by lane
    ("keep left", "stay in the left lane", "take the left lane", "drive on the left"),
    ("keep right", "stay in the right lane", "take the right lane", "drive on the right"),
)
SPEEDS = (5.0, 10.0)  # m/s, of what the car is to drive; the track's limit is 10
FULL_SPEED = 10.0  # m/s, 1 in the time stream
HISTORY = 8  # T, decisions
SECONDS = 20  # of an episode
EVERY = 2  # decisions from one recorded moment to the next: neighbours look alike
GREY = torch.tensor([0.2989, 0.5870, 0.1140])  # of red, green and blue, as highway-env's
MOST_EPISODES = 1000
VALIDATION = 8  # episodes


@dataclass(frozen=True)
class Course:
    """What is asked of a driver in an episode, by decision: lanes, words, speeds in m/s."""

    lanes: list[int]
    words: list[str]
    speeds: list[float]

    @classmethod
    def drawn(cls, seed: int, seconds: float = SECONDS) -> Course:
        """A lane that changes once, in the second quarter or the third, and new speeds each 4 s."""
        random = np.random.default_rng(seed)
        steps = round(seconds * HERTZ)
        first, change = int(random.integers(2)), int(random.uniform(0.25, 0.75) * steps)
        phrases = [COMMANDS[lane][random.integers(len(COMMANDS[lane]))] for lane in (0, 1)]
        lanes = [first if k < change else 1 - first for k in range(steps)]
        speeds = random.uniform(*SPEEDS, size=steps // (4 * HERTZ) + 1)
        by_step = [float(speeds[k // (4 * HERTZ)]) for k in range(steps)]
        return cls(lanes, [phrases[lane] for lane in lanes], by_step)


@dataclass(frozen=True)
class Moments:
    """What drivers are given at N moments.

    images: uint8 [N, 3, S, S], grey. color: float [N, Q, Q, Q], roots of shares. time: float
    [N, T, 1], the last speeds, oldest first, in FULL_SPEED; the first ``lengths`` [N] are there.
    words: N commands.
    """

    images: Tensor
    color: Tensor
    time: Tensor
    lengths: Tensor
    words: list[str]

    @classmethod
    def of(
        cls,
        frames: Sequence[Pixels],
        speeds: Sequence[Sequence[float]],
        words: Sequence[str],
        bins: int,
    ) -> Moments:
        """Of frames RGB [S, S, 3] and the speeds in m/s up to each, at most T."""
        pixels = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)  # [N, 3, S, S]
        grey = torch.einsum("nchw,c->nhw", pixels.float(), GREY).round().to(torch.uint8)
        time = torch.zeros(len(frames), HISTORY, 1)
        for row, known in zip(time, speeds, strict=True):
            row[: len(known), 0] = torch.tensor(known) / FULL_SPEED
        return cls(
            grey[:, None].expand(-1, 3, -1, -1).contiguous(),
            color_histograms(pixels.contiguous(), bins).sqrt(),
            time,
            torch.tensor([len(known) for known in speeds]),
            list(words),
        )


def record(
    simulator: Simulator,
    seeds: Iterable[int],
    *,
    side: int,
    bins: int,
    noise: float = 0.5,
    seconds: float = SECONDS,
) -> CaptionSet:
    """Episodes that the expert drives, pushed off its way so that it is seen to come back.

    A clone that only ever saw the middle of a lane does not know what to do beside it (Ross and
    Bagnell, "Efficient reductions for imitation learning", 2010). So now and then the wheel is
    turned aside for half a second, while what is recorded is the expert's steering (noise injected
    into the supervisor: Laskey et al., "DART", 2017).

    Args:
        seeds: of the episodes. side: S. bins: Q. noise: the most that the wheel is turned aside,
            0..1; 0 records plain drives.

    Returns:
        Frames with commands; columns color, time, time_lengths and steering float [N], -1..1.
    """
    frames: list[Pixels] = []
    speeds: list[list[float]] = []
    words: list[str] = []
    steering: list[float] = []
    ids: list[str] = []
    for seed in seeds:
        course = Course.drawn(seed, seconds)
        aside = _pushes(seed, len(course.lanes), noise)
        simulator.reset(seed)
        known: deque[float] = deque(maxlen=HISTORY)
        for k, lane in enumerate(course.lanes):
            state = simulator.state(lane)
            if not state.on_road:
                break
            known.append(state.speed)
            right = simulator.expert(lane)
            if k % EVERY == 0:
                frames.append(simulator.frame(side))
                speeds.append(list(known))
                words.append(course.words[k])
                steering.append(right)
                ids.append(f"{seed}/{k}")
            simulator.step(float(np.clip(right + aside[k], -1, 1)), course.speeds[k])
    found = Moments.of(frames, speeds, words, bins)
    columns = {
        "color": found.color,
        "time": found.time,
        "time_lengths": found.lengths,
        "steering": torch.tensor(steering),
    }
    digest = hashlib.sha256("\n".join(words).encode())
    for x in (found.images, *columns.values()):
        digest.update(x.contiguous().numpy().tobytes())
    return CaptionSet(
        found.images, words, ids, checksum=digest.hexdigest(), source=TRACK, columns=columns
    )


def training_seeds(seed: int, episodes: int) -> range:
    """Of the episodes of a training; no evaluation's, which are 0..999, nor a validation's.

    Raises:
        ValueError: episodes is not 1..1000.
    """
    if not 1 <= episodes <= MOST_EPISODES:
        raise ValueError(f"episodes: got {episodes}, expected 1 to {MOST_EPISODES}")
    first = 2 * MOST_EPISODES + MOST_EPISODES * seed
    return range(first, first + episodes)


def validation_seeds() -> range:
    return range(MOST_EPISODES, MOST_EPISODES + VALIDATION)


def lane_of(words: str) -> int:
    """The lane that a command asks for."""
    return next(lane for lane in range(len(LANES)) if words in COMMANDS[lane])


def _pushes(seed: int, steps: int, noise: float) -> list[float]:
    """What is added to the expert's steering: nothing, or half a second of one amount."""
    random = np.random.default_rng((seed, 1))
    pushes = [0.0] * steps
    k = int(random.integers(HERTZ))
    while k < steps:
        long = HERTZ // 2
        pushes[k : k + long] = [random.uniform(-noise, noise)] * len(pushes[k : k + long])
        k += long + int(random.integers(HERTZ, 3 * HERTZ))
    return pushes
