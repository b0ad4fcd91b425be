"""Exit statuses of the gates: nothing but a regression ends with the status of one."""

import sys
import traceback
from collections.abc import Callable

OK, REGRESSION, BAD_INPUT, CANNOT_MEASURE, INTERNAL = 0, 1, 2, 3, 70
LEGEND = (
    f"Exit status: {OK} as recorded, {REGRESSION} a regression, {BAD_INPUT} bad input, "
    f"{CANNOT_MEASURE} nothing to compare with or no tool to measure by, {INTERNAL} the gate broke."
)


class CannotMeasure(RuntimeError):
    """There is no baseline, or what measures is missing: neither good nor bad is known."""


def status(gate: Callable[[], int]) -> int:
    """What `gate` returns, or the status of what it raises, which is told on stderr."""
    try:
        return gate()
    except CannotMeasure as error:
        print(f"cannot measure: {error}", file=sys.stderr)
        return CANNOT_MEASURE
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    except Exception:
        traceback.print_exc()
        return INTERNAL
