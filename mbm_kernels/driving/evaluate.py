"""Driving in closed loop: seconds in the lane that is asked for, by driver."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean, pstdev

import torch
from torch import Tensor

from mbm_kernels.captioning.data import CaptionSet, WordTokenizer
from mbm_kernels.captioning.streams import subsets_of
from mbm_kernels.driving.drivers import Driver, constant_driver, linear_driver, model_driver
from mbm_kernels.driving.records import HISTORY, SECONDS, Course, Moments
from mbm_kernels.driving.simulator import HERTZ, Simulator
from mbm_kernels.driving.train import SUBSETS
from mbm_kernels.models import MultimodalBigModel
from mbm_kernels.models.multimodal import STREAMS


@dataclass(frozen=True)
class Score:
    """A driver's episodes.

    in_lane: seconds in the lane asked for, by episode, up to where the car left the road. on_road:
    episodes that ended on the road. error: root mean square of the steering on recorded drives
    against the expert's, None for the expert.
    """

    in_lane: list[float]
    on_road: int
    error: float | None

    def as_dict(self) -> dict[str, object]:
        return {
            "in_lane": round(mean(self.in_lane), 3),
            "deviation": round(pstdev(self.in_lane), 3),
            "on_road": self.on_road,
            "episodes": len(self.in_lane),
            "steering_rmse": None if self.error is None else round(self.error, 4),
            "by_episode": [round(x, 3) for x in self.in_lane],
        }


def name_of(streams: Sequence[str]) -> str:
    """What the table calls a model that drives with some of its streams."""
    out = [stream for stream in STREAMS if stream not in streams]
    if not out:
        return "model, all streams"
    if len(streams) == 1:
        return f"model, {streams[0]} alone"
    return "model without " + ", ".join(out)


def drivers_of(
    model: MultimodalBigModel, tokenizer: WordTokenizer, records: CaptionSet
) -> dict[str, Driver | None]:
    """Everyone who drives, None being the expert; `records` is what the model was trained on."""
    found: dict[str, Driver | None] = {"expert": None}
    for streams in subsets_of(model, SUBSETS):
        found[name_of(streams)] = model_driver(model, tokenizer, streams)
    found["linear, 8x8 pixels, each lane"] = linear_driver(records, by_command=True)
    found["linear, 8x8 pixels"] = linear_driver(records)
    found["constant steering"] = constant_driver(records)
    return found


def evaluate(
    model: MultimodalBigModel,
    tokenizer: WordTokenizer,
    records: CaptionSet,
    held_out: CaptionSet,
    make: Callable[[], Simulator],
    *,
    seeds: int = 20,
    seconds: float = SECONDS,
    progress: Callable[[str], None] = lambda name: None,
) -> dict[str, Score]:
    """Drive each seed's episode by each driver.

    Args:
        records, held_out: drives that the model was trained on, and others. make: gives a simulator
            for each seed. progress: called with a driver's name as it starts.
    """
    simulators = [make() for _ in range(seeds)]
    scores = {}
    for name, driver in drivers_of(model, tokenizer, records).items():
        progress(name)
        error = None if driver is None else _error(driver, held_out)
        in_lane, on_road = _drive(driver, simulators, seconds, model)
        scores[name] = Score(in_lane, on_road, error)
    return scores


def _drive(
    driver: Driver | None, simulators: list[Simulator], seconds: float, model: MultimodalBigModel
) -> tuple[list[float], int]:
    """Seconds in lane by seed, and how many episodes ended on the road."""
    courses = [Course.drawn(seed, seconds) for seed in range(len(simulators))]
    for seed, simulator in enumerate(simulators):
        simulator.reset(seed)
    known: list[deque[float]] = [deque(maxlen=HISTORY) for _ in simulators]
    in_lane, driving = [0.0] * len(simulators), list(range(len(simulators)))
    for k in range(len(courses[0].lanes)):
        states = {i: simulators[i].state(courses[i].lanes[k]) for i in driving}
        driving = [i for i in driving if states[i].on_road]
        if not driving:
            break
        for i in driving:
            in_lane[i] += states[i].in_lane / HERTZ
            known[i].append(states[i].speed)
        if driver is None:
            steering = [simulators[i].expert(courses[i].lanes[k]) for i in driving]
        else:
            frames = [simulators[i].frame(model.image_size) for i in driving]
            speeds, words = (
                [list(known[i]) for i in driving],
                [courses[i].words[k] for i in driving],
            )
            seen = Moments.of(frames, speeds, words, model.config.color_bins)
            steering = driver(seen).clamp(-1, 1).tolist()
        for i, angle in zip(driving, steering, strict=True):
            simulators[i].step(angle, courses[i].speeds[k])
    return in_lane, len(driving)


def _error(driver: Driver, held_out: CaptionSet) -> float:
    columns = held_out.columns
    seen = Moments(
        held_out.images,
        columns["color"],
        columns["time"],
        columns["time_lengths"],
        held_out.captions,
    )
    found: Tensor = driver(seen).clamp(-1, 1)
    return float(torch.sqrt((found - columns["steering"]).square().mean()))


def as_text(scores: dict[str, Score]) -> str:
    """A line a driver, aligned."""
    rows = [("driver", "s in lane", "deviation", "on road", "steering RMSE")]
    for name, score in scores.items():
        error = "" if score.error is None else f"{score.error:.3f}"
        kept = f"{score.on_road} of {len(score.in_lane)}"
        seconds, deviation = mean(score.in_lane), pstdev(score.in_lane)
        rows.append((name, f"{seconds:.1f}", f"{deviation:.1f}", kept, error))
    width = max(len(row[0]) for row in rows)
    return "\n".join(
        row[0].ljust(width) + "".join(cell.rjust(15) for cell in row[1:]) for row in rows
    )
