"""Trainings in processes of their own, forked from one that has imported everything already.

    python -m tests.captioning.forked crash FOLDER [KILLS] [SEED]
    python -m tests.captioning.forked group FOLDER
    python -m tests.captioning.forked elastic ARGUMENTS...

`crash` kills a training at random moments (20 if not said) and resumes it, again and again;
`group` trains in groups of two processes. What they write is compared by the tests. `elastic` is
torchrun's agent over two workers that run `mbm-kernels` with the arguments, and are restarted once.
"""

import os
import random
import signal
import socket
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path

import torch
import torch._dynamo  # which each child would import at its first step
import torch.distributed.fsdp
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from mbm_kernels import cli
from mbm_kernels.captioning import checkpoint, processes
from mbm_kernels.captioning import cli as _  # noqa: F401  which each worker would import
from mbm_kernels.captioning.data import WordTokenizer
from mbm_kernels.captioning.distill import CrossEntropyObjective, DistillationObjective
from mbm_kernels.captioning.execution import Execution
from mbm_kernels.captioning.fit import fit
from mbm_kernels.captioning.presets import DistillSettings

from .training_helpers import SETTINGS, assert_same, colours, make, stop_at, weights_of

CRASH = replace(SETTINGS, steps=12, evaluate_every=2, augment=True, ema=0.9, accumulate=2)
GROUP = replace(SETTINGS, steps=6, batch_size=6, augment=True, ema=0.9)


def train(run, settings, parallel="ddp", objective="hard", **arguments):
    train_set = colours()
    train_set.captions[:4] = ["red", "a very dark green square", "a blue", "bright"]
    tokenizer = WordTokenizer.train(train_set.captions)
    torch.manual_seed(0)
    if objective == "hard":
        loss = CrossEntropyObjective(make(tokenizer))
    else:
        loss = DistillationObjective(make(tokenizer), make(tokenizer, 2), DistillSettings())
    execution = Execution(parallel=parallel)
    with processes.group(torch.device("cpu")):
        fit(
            loss,
            train_set,
            tokenizer,
            settings,
            validation=train_set,
            run=run,
            execution=execution,
            **arguments,
        )


def fork(function, *arguments, environment=(), **named):
    """The child's process id; its exit status is 0 unless the function raises."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.environ.update(environment)
        function(*arguments, **named)
        code = 0
    except Exception:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def status(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def group(*arguments, count=2, **named):
    """Exit statuses of the processes of one training."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    pids = [
        fork(train, *arguments, environment={**shared, "RANK": str(rank)}, **named)
        for rank in range(count)
    ]
    return [status(pid) for pid in pids]


def crash(folder, kills=20, seed=0):
    """Ends with an AssertionError unless every run gives the weights of one never stopped."""
    draw = random.Random(seed)
    start = time.monotonic()
    assert status(fork(train, folder / "whole", CRASH)) == 0
    seconds = time.monotonic() - start
    expected = weights_of(folder / "whole")
    killed, number, steps = 0, 0, []
    while killed < kills:
        run = folder / f"killed-{number}"
        code = -signal.SIGKILL
        while code != 0:
            resume = checkpoint.exists(run)
            pid = fork(train, run, CRASH, resume=resume)
            if killed < kills:
                time.sleep(draw.uniform(0, 0.8 * seconds))
                os.kill(pid, signal.SIGKILL)
            code = status(pid)
            assert code in (0, -signal.SIGKILL), code
            if code:
                killed += 1
                found = checkpoint.exists(run)
                steps.append(
                    checkpoint.load(run, layers="stock", which="latest").config["step"]
                    if found
                    else 0
                )
        assert_same(weights_of(run), expected)
        number += 1
    print(f"{killed} kills in {number} runs, each resumed from steps {steps}: the same weights")


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def second_dies(step):
    """For fork's child: the second process of the group dies after a step."""

    def callback(done):
        if processes.rank() == 1:
            stop_at(step, die)(done)

    return callback


def groups(folder):
    """Runs by one process and by two, and one of which a process dies and that goes on."""
    for objective in ("hard", "distill"):
        for name, parts in (("one", 1), ("parts", 2)):
            settings = replace(GROUP, accumulate=parts)
            run = folder / f"{objective}-{name}"
            assert status(fork(train, run, settings, objective=objective)) == 0
        assert group(folder / f"{objective}-ddp", GROUP, "ddp", objective) == [0, 0]
    assert group(folder / "hard-fsdp2", GROUP, "fsdp2") == [0, 0]
    run = folder / "dead-fsdp2"
    first, second = group(run, GROUP, "fsdp2", after_step=second_dies(5))
    assert first == 1, "it ends with an error, and does not wait"
    assert second == -signal.SIGKILL
    assert checkpoint.load(run, layers="stock", which="latest").config["step"] == 3
    assert group(run, GROUP, "fsdp2", resume=True) == [0, 0]


def command(*arguments):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the agent's handler came with the fork
    sys.argv = ["mbm-kernels", *arguments]
    if os.environ["RANK"] == "0":
        print("restarts:", os.environ["TORCHELASTIC_RESTART_COUNT"], flush=True)
    try:
        cli.main()
    except SystemExit as end:
        if end.code:
            raise


def elastic(*arguments):
    """As `torchrun --standalone --nproc-per-node=2 --max-restarts=1`, but for how workers begin."""
    config = LaunchConfig(
        1, 1, 2, rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=1,
        start_method="fork", run_id="test",
    )  # fmt: skip
    elastic_launch(config, command)(*arguments)


if __name__ == "__main__":
    torch.set_num_threads(1)  # before anything is computed: a pool of threads does not fork
    what, where, *numbers = sys.argv[1:]
    if what == "elastic":
        elastic(where, *numbers)
    elif what == "crash":
        crash(Path(where), *(int(x) for x in numbers))
    else:
        groups(Path(where))
