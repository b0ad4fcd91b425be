"""Spreads the tests of an OpSuite over its cases, the dtypes and the backends that run here."""

import math
from typing import Any

import pytest
import torch

from mbm_kernels._core import dispatch
from mbm_kernels.testing import emulation
from mbm_kernels.testing.suite import OpSuite, available_backends, device_of, interpreted


def generate(metafunc: pytest.Metafunc) -> None:
    """The body of a conftest's pytest_generate_tests: see the module's docstring."""
    suite = metafunc.cls
    if suite is None or not issubclass(suite, OpSuite):
        return
    with emulation.of(suite):
        _generate(metafunc, suite)


def _backends(suite: type[OpSuite]) -> list[str]:
    return emulation.backends() if suite.emulated else list(available_backends(suite.op))


def _generate(metafunc: pytest.Metafunc, suite: type[OpSuite]) -> None:
    names = metafunc.fixturenames
    if {"case", "backend", "dtype"} <= set(names):
        cells = [
            (case, backend, dtype)
            for number, case in enumerate(suite.cases)
            for backend, dtype in _pairs(suite)
            if dtype.itemsize > 2 or number < _rounded_cases(suite, backend)
            if suite().takes(case, backend)
        ]
        ids = [f"{case}-{_pair_id(backend, dtype)}" for case, backend, dtype in cells]
        metafunc.parametrize(("case", "backend", "dtype"), cells, ids=ids)
        return
    if "case" in names:
        metafunc.parametrize("case", suite.cases, ids=str)
    if {"edge_case", "backend"} <= set(names):
        edges = [
            (case, backend)
            for case in suite.edge_cases
            for backend in _backends(suite)
            if suite().takes(case, backend)
        ]
        ids = [f"{case}-{backend}" for case, backend in edges]
        metafunc.parametrize(("edge_case", "backend"), edges, ids=ids)
        return
    if "hiding_case" in names:
        _hide(metafunc, suite)
        return
    if "dtype" in names:
        pairs = _pairs(suite)
        ids = [_pair_id(*pair) for pair in pairs]
        metafunc.parametrize(("backend", "dtype"), pairs, ids=ids)
    elif "backend" in names:
        metafunc.parametrize("backend", _backends(suite))


def _rounded_cases(suite: type[OpSuite], backend: str) -> int:
    return min(1, suite.rounded_cases) if interpreted(backend) else suite.rounded_cases


def _hide(metafunc: pytest.Metafunc, suite: Any) -> None:
    """Every hiding case with every special number; interpreted, the smallest two cases, of which
    the second has the first special alone."""
    cells: list[tuple[Any, ...]] = []
    with_specials = "special" in metafunc.fixturenames
    for backend in _backends(suite):
        cases = suite.hiding_cases
        if interpreted(backend):
            cases = sorted(cases, key=lambda case: math.prod(case.sizes.values()))[:2]
        for number, case in enumerate(cases):
            few = 1 if interpreted(backend) and number else None
            specials = suite.specials[:few] if with_specials else [("",)]
            cells += [(f"{case}-{backend}-{name}", case, backend, *x) for name, *x in specials]
    names = ("hiding_case", "backend", *(("special", "mode") if with_specials else ()))
    metafunc.parametrize(names, [cell[1:] for cell in cells], ids=[cell[0] for cell in cells])


def _pairs(suite: type[OpSuite]) -> list[tuple[str, torch.dtype]]:
    return [
        (backend, dtype)
        for backend in _backends(suite)
        for dtype in suite.dtypes
        if dispatch.why_not(suite.op, backend, device_of(backend), dtype) is None
    ]


def _pair_id(backend: str, dtype: torch.dtype) -> str:
    return f"{backend}-{str(dtype).removeprefix('torch.')}"
