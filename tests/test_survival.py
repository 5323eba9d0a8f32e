"""Runs that are killed or stopped: the same command continues, to the same bits.

The scripts run in forks of a server that has imported torch and computed nothing, so a start is fast.
"""

import json
import multiprocessing.forkserver
import os
import signal
import socket
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import torch._dynamo  # noqa: F401  optimisers import it; here once instead of in every fork
from conftest import ROOT, finetuning, pretraining

import train_finetune
import train_pretrain
from support import rendering
from support import run as runs

FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["test_survival"])
OUT = Path("run")  # in the folder that a script is started in
BENCHMARK = {"source_train": ("source", 50), "target_train": ("target", 60), "unconstrained": (None, 20)}


@pytest.fixture(scope="module", autouse=True)
def server():
    with pytest.MonkeyPatch.context() as patch:  # where the server finds this file
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
        multiprocessing.forkserver.ensure_running()


def render() -> None:
    """The embedded benchmark, which is built as public data sets are converted: shard by shard."""
    rendering.CHUNK = 10
    rendering.make_benchmark("hands", OUT, BENCHMARK, 40, 1)


def stages(sets: Path, pretrained: Path) -> dict:
    """What each stage calls; all write into OUT."""
    return {
        "rendering": render,
        "pre-training": partial(train_pretrain.main, pretraining(sets, OUT)),
        "fine-tuning": partial(train_finetune.main, finetuning(sets, OUT, pretrained, "--epochs", "4")),
    }


def die_in_write(count: int) -> None:
    """This process kills itself at its `count`-th fsync, when half of the file is written."""
    fsync, left = os.fsync, iter(range(count - 1, -1, -1))

    def cut(file: int) -> None:
        if next(left) == 0:
            name = os.readlink(f"/proc/self/fd/{file}")
            os.truncate(name, os.path.getsize(name) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(file)

    os.fsync = cut


def forked(place: Path, main, dies_in_write: int, environment: dict) -> None:
    """What a process does: call main() as a script does, in a folder, and print into a file there."""
    os.chdir(place)
    output = os.open(f"printed-{os.getpid()}", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a background job
    if dies_in_write:
        die_in_write(dies_in_write)
    runs.run_script(main)


def begin(place: Path, main, dies_in_write: int = 0, **environment: str):
    """Start main() in `place`."""
    place.mkdir(exist_ok=True)
    process = FORK.Process(target=forked, args=(place, main, dies_in_write, environment))
    process.start()
    return process


def two_ranks(place: Path, main) -> list:
    """Two processes of one run, as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    return [begin(place, main, RANK=str(rank), LOCAL_RANK=str(rank), **shared) for rank in (0, 1)]


def until_logged(process, place: Path, lines: int) -> None:
    """Wait for so many lines of the log, or for the end of the process."""
    path, end = place / OUT / "log.jsonl", time.monotonic() + 120
    while process.is_alive() and not (path.exists() and path.read_bytes().count(b"\n") >= lines):
        assert time.monotonic() < end, "it hangs"
        time.sleep(0.001)


def ended(process, place: Path) -> tuple[int, str]:
    """Exit status, negative for the signal that killed it, and what it printed."""
    process.join(120)
    process.kill()  # if it hangs
    process.join()
    return process.exitcode, (place / f"printed-{process.pid}").read_text()


def contents(place: Path) -> dict:
    """Every file of a run, except for what a killed write left. Times are no part of the result."""

    def plain(value):
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items() if k != "seconds"}
        if isinstance(value, (list, tuple)):
            return [plain(v) for v in value]
        return (value.dtype, value.numpy().tobytes()) if isinstance(value, torch.Tensor) else value

    read = {".pt": runs.read_checkpoint, ".json": runs.read_json}
    files = [path for path in (place / OUT).rglob("*") if path.is_file() and path.suffix != ".part"]
    return {path.relative_to(place): plain(read.get(path.suffix, Path.read_bytes)(path)) for path in files}


@pytest.mark.parametrize("stage", ["rendering", "pre-training", "fine-tuning"])
def test_kill_9(sets, pretrained, tmp_path, stage):
    """In a write and between writes. At most --save-every steps, 4, are repeated."""
    main, place, killed = stages(sets, pretrained)[stage], tmp_path / "killed", []
    for writes, lines in [(1, 0), (0, 1), (2, 0), (0, 3), (1, 0), (0, 5), (2, 0)]:
        if lines and stage == "rendering":
            continue  # it has no log
        process = begin(place, main, dies_in_write=writes)
        if lines:
            until_logged(process, place, lines)
            process.kill()
        killed.append(ended(process, place)[0] == -signal.SIGKILL)
        path = place / OUT / "checkpoint.pt"
        if path.exists():
            last = json.loads((place / OUT / "log.jsonl").read_text().splitlines()[-1])["step"]
            assert last - runs.read_checkpoint(path)["step"] <= 4
    assert sum(killed) >= 4, killed
    for folder in (place, tmp_path / "whole"):
        status, text = ended(begin(folder, main), folder)
        assert status == 0, text
    assert contents(place) == contents(tmp_path / "whole")


LONG = ["--epochs", "999", "--save-every", "1000"]
MAE = ["--variant", "mae", *LONG]


@pytest.mark.parametrize("name", ["f^S", "workers", "two processes"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_stop_without_saving(sets, pretrained, tmp_path, name, number):
    main = {
        "f^S": partial(train_pretrain.main, pretraining(sets, OUT, "--seg-steps", "999", *LONG)),
        "workers": partial(train_finetune.main, finetuning(sets, OUT, pretrained, "--workers", "2", *LONG)),
        "two processes": partial(train_pretrain.main, pretraining(sets, OUT, *MAE)),
    }[name]
    ranks = two_ranks(tmp_path, main) if name == "two processes" else [begin(tmp_path, main)]
    until_logged(ranks[0], tmp_path, 3)
    for rank in ranks:
        os.kill(rank.pid, signal.SIGSTOP)  # so that both get the signal before one can miss the other
    for rank in ranks:
        os.kill(rank.pid, number)
        os.kill(rank.pid, signal.SIGCONT)
    for rank in ranks:
        status, text = ended(rank, tmp_path)
        assert status == 128 + number and text.count("stopped; the same command") == 1, text
        assert name == "workers" or "Traceback" not in text  # a worker of torch may print one
    assert not list((tmp_path / OUT).glob("*.pt"))
