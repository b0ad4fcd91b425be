"""`warm_heap`: in processes of their own, since it sets the allocator of the whole process."""

import json
import os
import subprocess
import sys

import pytest

import mbm_kernels
from mbm_kernels._core import heap
from tests import children

PAGES = heap.PROBE_BYTES // 4096


def run(code, **environment):
    """What a new process prints as JSON, and its standard error."""
    done = children.python("-c", code, **environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


def test_freed_memory_stays_mapped():
    found, _ = run("""
        import json
        import mbm_kernels
        from mbm_kernels._core.heap import faults_per_call, report
        told = report()
        mbm_kernels.warm_heap()
        print(json.dumps([told, faults_per_call()]))
    """)
    told, kept = found
    assert told["state"] == "default"
    assert told["faults_per_call"] >= PAGES
    assert told["faults_per_call_warm"] == kept == 0


def test_beyond_the_limit_and_after_the_end_it_goes_back():
    """Of malloc itself: small pieces of tensors and lists would lie at the heap's end."""
    found, _ = run("""
        import json
        import ctypes
        import mbm_kernels

        libc = ctypes.CDLL(None)
        libc.malloc.restype = ctypes.c_void_p
        libc.free.argtypes = [ctypes.c_void_p]
        libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
        size = 300 << 20

        def mebibytes():
            with open("/proc/self/statm") as file:
                return int(file.read().split()[1]) * 4096 >> 20

        def kept():
            before = mebibytes()
            place = libc.malloc(size)
            libc.memset(place, 1, size)
            made = mebibytes() - before
            libc.free(place)
            return made, mebibytes() - before

        found = []
        for limit in (0, 64 << 20, None, 0):
            mbm_kernels.warm_heap(limit)
            found.append(kept())
        print(json.dumps([*found, mebibytes()]))
    """)
    cold, limited, kept, (_, after), resident = found
    assert min(cold[0], limited[0], kept[0]) >= 290
    assert cold[1] < 70
    assert limited[1] < 70
    assert kept[1] >= 290
    assert after < 70
    assert resident < 600, "what was kept went back"


def test_environment_variable():
    found, said = run(
        """
        import json
        import mbm_kernels
        from mbm_kernels._core.heap import report
        print(json.dumps(report()))
        """,
        MBM_WARM_HEAP="1",
    )
    assert found["state"] == "warm"
    assert found["faults_per_call"] == 0
    assert "MBM_WARM_HEAP" not in said


@pytest.mark.parametrize("limit", [-1, 2**31])
def test_a_limit_out_of_range(limit):
    with pytest.raises(ValueError, match=f"limit: got {limit}, expected 0 to 2147483647 bytes"):
        mbm_kernels.warm_heap(limit)


@pytest.mark.parametrize("limit", [1.5, True, "1"])
def test_a_limit_that_is_no_integer(limit):
    with pytest.raises(TypeError, match=f"limit: got {type(limit).__name__}, expected an int"):
        mbm_kernels.warm_heap(limit)


def test_another_allocator_is_refused(monkeypatch):
    monkeypatch.setattr(heap, "why_not", lambda: "malloc comes from libjemalloc.so.2, not glibc")
    with pytest.raises(RuntimeError, match="malloc comes from libjemalloc"):
        mbm_kernels.warm_heap()
    assert not heap.is_warm()
    monkeypatch.setenv("MBM_WARM_HEAP", "1")
    with pytest.warns(RuntimeWarning, match="MBM_WARM_HEAP is not obeyed: .*libjemalloc"):
        heap.warm_if_asked()


def test_a_preloaded_allocator_is_recognised(tmp_path):
    """By a library whose malloc is glibc's under another roof."""
    source, library = tmp_path / "other.c", tmp_path / "libother.so"
    source.write_text("""
        #include <stddef.h>
        extern void *__libc_malloc(size_t);
        void *malloc(size_t n) { return __libc_malloc(n); }
    """)
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source], check=True)
    done = subprocess.run(
        [sys.executable, "-c", "from mbm_kernels._core import heap; print(heap.why_not())"],
        capture_output=True,
        text=True,
        env={**os.environ, "LD_PRELOAD": str(library)},
    )
    assert done.stdout == "malloc comes from libother.so, not from glibc\n", done.stderr
