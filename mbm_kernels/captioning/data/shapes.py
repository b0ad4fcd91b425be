"""Signed distances of the five shapes: negative inside, in pixels, y pointing down.

Each takes `u`, `v` float32 `[M, P]` (pixel offsets from the centre, in the shape's own frame) and
`r` float32 `[M, 1]`, the nominal radius, and returns `[M, P]`. The factors make shapes of one `r`
look equally large: their areas lie within 2.1 r^2 and 3.2 r^2.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]


def _circle(u: Array, v: Array, r: Array) -> Array:
    return np.hypot(u, v) - r


def _box(u: Array, v: Array, half_u: Array, half_v: Array) -> Array:
    du, dv = np.abs(u) - half_u, np.abs(v) - half_v
    outside = np.hypot(np.maximum(du, 0), np.maximum(dv, 0))
    distance: Array = outside + np.minimum(np.maximum(du, dv), 0)
    return distance


def _square(u: Array, v: Array, r: Array) -> Array:
    half = np.float32(0.87) * r
    return _box(u, v, half, half)


def _cross(u: Array, v: Array, r: Array) -> Array:
    long, short = np.float32(1.08) * r, np.float32(0.36) * r
    return np.minimum(_box(u, v, long, short), _box(u, v, short, long))


def _triangle(u: Array, v: Array, r: Array) -> Array:
    # Intersection of three half-planes at the inradius: exact inside, sharp at the corners.
    inradius = np.float32(0.65) * r
    s = np.float32(np.sqrt(0.75))
    sides = np.maximum(v, np.maximum(s * u, -s * u) - np.float32(0.5) * v)
    distance: Array = sides - inradius
    return distance


def _star(u: Array, v: Array, r: Array) -> Array:
    # Fold the plane into one tenth of the star; the edge joins the outer tip to the inner notch.
    outer, inner = np.float32(1.22), np.float32(0.62)
    sector = np.float32(2 * np.pi / 5)
    angle = np.arctan2(u, -v)
    angle = np.abs(angle - sector * np.round(angle / sector))
    radius = np.hypot(u, v)
    p_along, p_across = radius * np.cos(angle), radius * np.sin(angle)
    notch_along = inner * np.float32(np.cos(np.pi / 5))
    notch_across = inner * np.float32(np.sin(np.pi / 5))
    edge_along, edge_across = notch_along - outer, notch_across
    length = np.float32(np.hypot(edge_along, edge_across))
    distance: Array = ((p_across * -edge_along) + (p_along - outer * r) * edge_across) / length
    return distance


SHAPES: dict[str, Callable[[Array, Array, Array], Array]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
}
