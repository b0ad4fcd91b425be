"""Python in a process of its own, forked from a server that has imported torch already.

An import of torch takes 3 to 4 s of CPU, longer than most of what such a process is there for. What
must see the start itself (environment variables that the loader, glibc, OpenMP or triton read; what
an import brings in) is a `subprocess` instead.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
METHOD = "forkserver"
CONTEXT = multiprocessing.get_context(METHOD)
# The second is what a first step of any optimizer imports, for as long again as the first.
CONTEXT.set_forkserver_preload(["torch", "torch._dynamo"])


def _run(arguments, environment, cwd, outputs):
    for number, path in enumerate(outputs, start=1):
        file = os.open(path, os.O_WRONLY)
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.path.insert(0, str(cwd))
    for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
        del sys.modules[name]  # in `cwd` there may be others
    option, *rest = sys.argv = list(arguments)
    if option == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif option == "-c":
        sys.argv = [option, *rest[1:]]
        code = compile(textwrap.dedent(rest[0]), "<a test's child>", "exec")
        exec(code, {"__name__": "__main__"})
    else:
        runpy.run_path(option, run_name="__main__")


class Child:
    """A running `python` of such arguments: "-m" and a module, "-c" and code, or a script."""

    def __init__(self, *arguments: object, cwd: Path = ROOT, environment: Mapping[str, str] = {}):
        self.arguments = [str(x) for x in arguments]
        self._folder = tempfile.TemporaryDirectory()
        self._outputs = [Path(self._folder.name) / name for name in ("stdout", "stderr")]
        for path in self._outputs:
            path.touch()
        self._process = CONTEXT.Process(
            target=_run,
            args=(self.arguments, {**os.environ, **environment}, cwd, self._outputs),
        )
        self._process.start()
        self.pid = self._process.pid

    @property
    def stdout(self) -> str:
        return self._outputs[0].read_text()

    def is_alive(self) -> bool:
        return self._process.is_alive()

    def wait_for(self, text: str) -> None:
        """Returns when the child has printed it."""
        while text not in self.stdout:
            assert self.is_alive(), self.end()
            time.sleep(0.01)

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def end(self, seconds: float = 1800) -> subprocess.CompletedProcess[str]:
        """Waits for the child's end, and ends it after so many seconds."""
        self._process.join(seconds)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        said = [path.read_text() for path in self._outputs]
        return subprocess.CompletedProcess(self.arguments, self._process.exitcode, *said)


def python(*arguments: object, cwd: Path = ROOT, **environment: str):
    """What a `Child` of these arguments has done at its end."""
    return Child(*arguments, cwd=cwd, environment=environment).end()
