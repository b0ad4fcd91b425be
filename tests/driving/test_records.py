"""What is recorded: the expert's steering, pushed off its way or not, seeded."""

import numpy as np
import pytest
import torch

from mbm_kernels.captioning.data import CaptionSet
from mbm_kernels.driving.drivers import constant_driver, linear_driver
from mbm_kernels.driving.records import (
    EVERY,
    HISTORY,
    Course,
    Moments,
    lane_of,
    record,
    training_seeds,
    validation_seeds,
)
from mbm_kernels.driving.simulator import HERTZ

from .helpers import BINS, SIDE, StraightRoad


def test_a_course_is_its_seeds():
    course = Course.drawn(3, 12)
    assert course == Course.drawn(3, 12)
    assert course != Course.drawn(4, 12)
    assert len(course.lanes) == len(course.words) == len(course.speeds) == 12 * HERTZ
    assert [lane_of(words) for words in course.words] == course.lanes
    changes = np.flatnonzero(np.diff(course.lanes))
    assert len(changes) == 1
    assert 3 * HERTZ - 1 <= changes[0] <= 9 * HERTZ
    assert len(set(course.speeds)) == 3


def test_seeds_of_training_validation_and_evaluation_are_apart():
    used = [range(1000), validation_seeds(), training_seeds(0, 1000), training_seeds(1, 1000)]
    assert len({seed for seeds in used for seed in seeds}) == sum(len(seeds) for seeds in used)
    for bad in (0, 1001):
        with pytest.raises(ValueError, match=f"episodes: got {bad}, expected 1 to 1000"):
            training_seeds(0, bad)


class Watched(StraightRoad):
    """Keeps what it was told."""

    def __init__(self):
        self.right, self.turned, self.offsets = [], [], []

    def expert(self, lane):
        self.right.append(super().expert(lane))
        self.offsets.append(abs(self.state(lane).offset))
        return self.right[-1]

    def step(self, steering, speed):
        self.turned.append(steering)
        super().step(steering, speed)


def test_what_is_recorded_is_the_experts_steering_while_the_wheel_is_turned_aside():
    plain, pushed = Watched(), Watched()
    quiet = record(plain, [5], side=SIDE, bins=BINS, noise=0, seconds=8)
    record(pushed, [5], side=SIDE, bins=BINS, noise=0.8, seconds=8)
    assert plain.turned == plain.right
    aside = np.abs(np.array(pushed.turned) - np.array(pushed.right))
    assert 0.1 < (aside > 0).mean() < 0.5
    assert max(pushed.offsets) > max(plain.offsets) or np.mean(pushed.offsets) > np.mean(
        plain.offsets
    )
    expected = torch.tensor(plain.right[::EVERY])
    assert torch.equal(quiet.columns["steering"], expected)


def test_shapes_and_the_same_bits_for_the_same_seeds(drives):
    count = len(drives)
    assert drives.images.shape == (count, 3, SIDE, SIDE)
    assert drives.columns["color"].shape == (count, BINS, BINS, BINS)
    assert drives.columns["time"].shape == (count, HISTORY, 1)
    assert drives.columns["time_lengths"][:6].tolist() == [1, 3, 5, 7, 8, 8]
    torch.testing.assert_close(
        drives.columns["color"].square().flatten(1).sum(1), torch.ones(count)
    )
    assert len(set(drives.ids)) == count
    again, other = (
        record(StraightRoad(), range(k, k + 40), side=SIDE, bins=BINS, seconds=6)
        for k in (100, 101)
    )
    assert again.checksum == drives.checksum != other.checksum


def test_an_episode_ends_with_the_road():
    class Ending(StraightRoad):
        def state(self, lane):
            return super().state(lane)._replace(on_road=self.passed < 10)

        def reset(self, seed):
            super().reset(seed)
            self.passed = 0

        def step(self, steering, speed):
            self.passed += 1

    assert len(record(Ending(), [0, 1], side=SIDE, bins=BINS)) == 2 * -(-10 // EVERY)


def test_columns_have_a_row_for_each_caption(drives):
    with pytest.raises(ValueError, match=r"steering: got 1 rows, expected 2; give one for each"):
        CaptionSet(drives.images[:2], ["a", "b"], ["0", "1"], columns={"steering": torch.ones(1)})


def moments(drives):
    return Moments(drives.images, *(drives.columns[x] for x in ("color", "time", "time_lengths")),
                   drives.captions)  # fmt: skip


def test_baselines_are_the_best_of_their_kind(drives):
    steering = drives.columns["steering"]
    constant = constant_driver(drives)(moments(drives))
    torch.testing.assert_close(constant, steering.mean().expand(len(drives)))
    pixels = linear_driver(drives)(moments(drives))
    lanes = linear_driver(drives, by_command=True)(moments(drives))
    errors = [float((x - steering).square().mean()) for x in (constant, pixels, lanes)]
    assert errors[0] > errors[1] > 2 * errors[2]
    # On this road a lane's expert is nearly linear in where the line is.
    assert errors[2] < 0.2 * errors[0]
