"""Samples as text: 16 bits each, so that a row with all of its own stays one line."""

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mbm_kernels.bench.statistics import Times

MOST = 2**16 - 1


def pack(times: Mapping[str, Sequence[Times]]) -> dict[str, Any]:
    """Of each form: the nanoseconds of one unit, and of each process [rounds] units, uint16 in
    little-endian order, as base64. The largest sample is 65535 units."""
    packed = {}
    for name, processes in times.items():
        unit = max(1.0, float(max(t.max() for t in processes))) / MOST
        words = [np.rint(t / unit).astype("<u2").tobytes() for t in processes]
        packed[name] = {"unit_ns": unit, "u16": [base64.b64encode(w).decode() for w in words]}
    return packed


def unpack(packed: Mapping[str, Any]) -> dict[str, list[Times]]:
    """Nanoseconds per call of each form in each process; entry i of every form is of round i."""
    return {
        name: [
            np.frombuffer(base64.b64decode(word), "<u2") * form["unit_ns"] for word in form["u16"]
        ]
        for name, form in packed.items()
    }
