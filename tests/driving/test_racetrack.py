"""highway-env's racetrack, where it is installed: `pip install 'mbm_kernels[caption,driving]'`."""

import numpy as np
import pytest

pytest.importorskip("highway_env")

from mbm_kernels.driving.records import Course, record
from mbm_kernels.driving.simulator import CAR, Racetrack


@pytest.fixture(scope="module")
def track():
    return Racetrack()


def test_the_car_is_seen_from_above_and_heads_up(track):
    track.reset(0)
    frame = track.frame(64)
    assert frame.dtype == np.uint8
    assert frame.shape == (64, 64, 3)
    green = (np.abs(frame.astype(int) - CAR) < 30).all(axis=2)
    rows, columns = np.nonzero(green)
    assert abs(columns.mean() - 31.5) < 1
    assert abs(rows.mean() - 47.5) < 1
    assert np.ptp(rows) > np.ptp(columns)
    assert (frame > 180).all(axis=2).any()  # lines


def test_positive_steering_goes_right_and_speed_is_held(track):
    for turn in (0.2, -0.2):
        track.reset(1)
        before = track.state(0)
        for _ in range(4):
            track.step(turn, 9.0)
        after = track.state(0)
        assert np.sign(after.offset - before.offset) == np.sign(turn)
        assert abs(after.speed - 9) < abs(before.speed - 9)


def test_the_left_lane_is_left_of_the_right(track):
    for seed in range(5):
        track.reset(seed)
        assert track.state(0).offset - track.state(1).offset == pytest.approx(5, abs=1.5)


def test_the_expert_does_what_it_is_asked(track):
    for seed in range(3):
        track.reset(seed)
        course, kept = Course.drawn(seed), []
        for lane, speed in zip(course.lanes, course.speeds, strict=True):
            kept.append(track.state(lane).in_lane)
            assert track.state(lane).on_road
            track.step(track.expert(lane), speed)
        assert np.mean(kept) > 0.8


def test_the_same_seeds_give_the_same_drives(track):
    first, again = (record(x, [7], side=16, bins=4, seconds=5) for x in (track, Racetrack()))
    assert first.checksum == again.checksum
