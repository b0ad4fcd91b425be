"""What is driven: highway-env's racetrack, its lane-keeping controller, and a view from above.

`racetrack-v1` is the environment of highway-env whose own traffic keeps lanes: the controller that
steers its vehicles (`ControlledVehicle.steering_control`) is the expert. `lane-keeping-v0` has no
driver of its own. The track has two lanes all round, so that a command can choose between them.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

TRACK = "racetrack-v1"
HERTZ = 10  # decisions in a second, each held for one step of the simulation
LANES = ("left", "right")
FULL_STEERING = np.pi / 4  # radians of a front wheel at steering 1
VIEW = 32.0  # metres that a frame is wide and high
DRAWN = 4.0  # pixels a metre of the map, before it is turned
BEHIND = 0.25  # share of a frame that lies behind the car
CONFIG = {
    "observation": {"type": "AttributesObservation", "attributes": []},  # frame() and state()
    "action": {"type": "ContinuousAction", "longitudinal": True, "lateral": True},
    "simulation_frequency": HERTZ,
    "policy_frequency": HERTZ,
    "other_vehicles": 0,
}
MARGIN = 2 * VIEW  # metres of ground around the track
GROUND, CAR = (100, 100, 100), (50, 200, 0)  # highway-env's colours

Pixels = npt.NDArray[np.uint8]


class State(NamedTuple):
    """What a driver is judged by, of now.

    speed: m/s. offset: metres from the middle of the lane that is asked for, to the right. in_lane:
    whether the car's middle is in that lane. on_road: whether it is in any.
    """

    speed: float
    offset: float
    in_lane: bool
    on_road: bool


class Simulator(Protocol):
    """A car on a road with two lanes, its speed held by the simulator, its wheel by a driver."""

    def reset(self, seed: int) -> None:
        """Put the car at a place of the road that comes from the seed."""

    def frame(self, side: int) -> Pixels:
        """The view from above, RGB uint8 [side, side, 3], the car heading up."""

    def state(self, lane: int) -> State:
        """Of the car, as to a lane of LANES."""

    def expert(self, lane: int) -> float:
        """The steering of the simulator's own controller for a lane, -1..1."""

    def step(self, steering: float, speed: float) -> None:
        """Drive 1 / HERTZ seconds with steering -1 (left) .. 1 (right) towards a speed in m/s."""


class Racetrack:
    """highway-env's `racetrack-v1` without other cars; a `Simulator`.

    Raises:
        ImportError: highway-env is not installed.
    """

    def __init__(self) -> None:
        gymnasium, self._controller = _highway_env()
        made = gymnasium.make(TRACK, config=CONFIG, disable_env_checker=True)
        self._env: Any = made.unwrapped
        self._controller_of_car: Any = None
        self._map, self._corner = _track()

    def reset(self, seed: int) -> None:
        self._env.reset(seed=seed)
        random = self._env.np_random
        network, car = self._env.road.network, self._env.vehicle
        lane = network.get_lane(network.random_lane_index(random))
        along = random.uniform(0, lane.length)
        car.position = lane.position(along, random.uniform(-0.5, 0.5))
        car.heading = lane.heading_at(along) + random.uniform(-0.1, 0.1)
        car.speed = random.uniform(5.0, 10.0)
        car.on_state_update()
        self._controller_of_car = self._controller(car.road, car.position)

    def frame(self, side: int) -> Pixels:
        car = self._env.vehicle
        ahead = np.array([np.cos(car.heading), np.sin(car.heading)])
        right = np.array([-ahead[1], ahead[0]])  # y grows to the south
        # Pixel (i, j) of twice the side is at corner + i across + j down of the map.
        step = VIEW / (2 * side) * DRAWN
        across, down = right * step, -ahead * step
        middle = (car.position - self._corner) * DRAWN
        corner = middle - side * across - 2 * side * (1 - BEHIND) * down
        affine = (across[0], down[0], corner[0], across[1], down[1], corner[1])
        size = (2 * side, 2 * side)
        seen = self._map.transform(
            size, Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR, fillcolor=GROUND
        )
        length, width = (x / VIEW * side for x in (car.LENGTH, car.WIDTH))
        y = 2 * side * (1 - BEHIND)
        ImageDraw.Draw(seen).rectangle(
            (side - width, y - length, side + width, y + length), fill=CAR
        )
        return np.asarray(seen.resize((side, side), Image.Resampling.BOX))

    def state(self, lane: int) -> State:
        car = self._env.vehicle
        road = self._env.road.network.get_lane(self._index(lane))
        along, offset = road.local_coordinates(car.position)
        in_lane = abs(offset) <= road.width_at(along) / 2
        return State(float(car.speed), float(offset), bool(in_lane), bool(car.on_road))

    def expert(self, lane: int) -> float:
        pilot = self._pilot()
        steering = pilot.steering_control(self._index(lane))
        return float(np.clip(steering / FULL_STEERING, -1, 1))

    def step(self, steering: float, speed: float) -> None:
        acceleration = self._pilot().speed_control(speed)
        limit = self._env.action_type.acceleration_range[1]
        self._env.step(np.array([acceleration / limit, steering]))

    def _pilot(self) -> Any:
        """The environment's controller, where the car is."""
        pilot, car = self._controller_of_car, self._env.vehicle
        pilot.position, pilot.heading, pilot.speed = car.position, car.heading, car.speed
        return pilot

    def _index(self, lane: int) -> Any:
        """A lane of the road beside the car, or of the one after where that ends."""
        network, car = self._env.road.network, self._env.vehicle
        start, end, _ = car.lane_index
        index = (start, end, lane)
        if network.get_lane(index).after_end(car.position):
            return network.next_lane(index, position=car.position)
        return index


def _highway_env() -> tuple[Any, Any]:
    """gymnasium with highway-env's environments, and the class of the controller."""
    try:
        import_module("highway_env")
        gymnasium = import_module("gymnasium")
        controller = import_module("highway_env.vehicle.controller").ControlledVehicle
    except ImportError as error:
        raise ImportError(
            f"driving: got no highway-env that can be imported ({error}), expected one; "
            "`pip install 'mbm_kernels[caption,driving]'`"
        ) from error
    return gymnasium, controller


@cache
def _track() -> tuple[Image.Image, Any]:
    """The whole track as highway-env draws it, and the place in metres of its first pixel.

    A frame is a part of it, turned, which takes a tenth of the time of drawing every line anew.
    """
    gymnasium, _ = _highway_env()
    pygame, graphics = import_module("pygame"), import_module("highway_env.road.graphics")
    road = gymnasium.make(TRACK, config=CONFIG, disable_env_checker=True).unwrapped.road
    lanes = [x for ends in road.network.graph.values() for to in ends.values() for x in to]
    along = np.linspace(0, 1, 9)
    places = np.array([lane.position(s * lane.length, 0) for lane in lanes for s in along])
    corner = places.min(axis=0) - MARGIN
    size = tuple(int(x) for x in (places.max(axis=0) + MARGIN - corner) * DRAWN)
    surface = graphics.WorldSurface(size, 0, pygame.Surface(size))
    surface.scaling, surface.origin = DRAWN, corner
    graphics.RoadGraphics.display(road, surface)
    pixels = pygame.surfarray.array3d(surface)  # [X, Y, 3]
    return Image.fromarray(np.ascontiguousarray(pixels.swapaxes(0, 1))), corner
