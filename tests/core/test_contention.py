"""Teams of threads beside other processes (csrc/common/contention.h)."""

import json
import os

import pytest

from tests import children


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="threads cannot be held to a core")
def test_a_team_that_waits_for_a_lost_core_is_halved_for_a_while():
    """In a process of its own: what is known of the cores holds for the whole process."""
    code = """
        import json, os, subprocess, sys, time
        from mbm_kernels._core import native

        cpu = native.cpu()
        core = {min(os.sched_getaffinity(0))}
        millisecond = 10**6

        def after(team, waited):
            cpu.note_team(team, 10 * millisecond, waited)
            return cpu.granted_team(8)

        def share_a_core():
            os.sched_setaffinity(0, core)
            other = subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"])
            end = time.monotonic() + 0.3
            while time.monotonic() < end:
                pass
            other.kill()
            other.wait()

        late = 9 * millisecond
        found = {"first": cpu.granted_team(8), "nothing to compare with": after(8, late)}
        share_a_core()
        found["soon"] = after(8, millisecond // 2)
        found["less than half"] = after(8, 4 * millisecond)
        found["late"] = after(8, late)
        found["a smaller one asked for"] = cpu.granted_team(2)
        share_a_core()
        found["again"] = after(4, late)
        time.sleep(1)
        found["after the pause"] = [cpu.granted_team(8), cpu.granted_team(8)]
        time.sleep(1)
        found["after another"] = [cpu.granted_team(8), cpu.granted_team(8)]
        print(json.dumps(found))
    """
    done = children.python("-c", code)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "first": 8,
        "nothing to compare with": 8,
        "soon": 8,
        "less than half": 8,
        "late": 4,
        "a smaller one asked for": 2,
        "again": 2,
        "after the pause": [4, 4],
        "after another": [8, 8],
    }
