"""Disturb runs at random and on purpose, give the same command again, and compare bitwise. See DESIGN: runs.

    python tests/soak.py            some minutes: 60 kills, signals, lost peers
    python tests/soak.py --quick    what tests/test_survival.py runs, a few of each

The scripts run in processes forked from this one, which has imported torch and computed nothing, so a start
takes milliseconds. Prints one JSON line per part, and ends with status 1 if a promise was broken.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch
import torch._dynamo  # optimisers import it; here once instead of in every fork

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import train_finetune  # noqa: E402
import train_pretrain  # noqa: E402
from support import rendering  # noqa: E402
from support import run as runs  # noqa: E402

SIZES = "--image 32 --width 16 --depth 2 --heads 2 --threads 1 --device cpu --precision float32".split()
SIZES += "--log-every 1 --batch 8 --source hands/source_train --target hands/target_train".split()
MAE = [*SIZES, *"--decoder-width 16 --decoder-heads 2 --variant mae --save-every 4".split()]
PRETRAIN = [*MAE, *"--variant full --unconstrained hands/unconstrained --seg-channels 4".split()]
PRETRAIN += "--seg-steps 14 --seg-batch 8 --epochs 1".split()
FINETUNE = [*SIZES, *"--validation hands/source_val --head-channels 8 --labels 50 --epochs 3".split()]
FINETUNE += "--warmup 2 --validate-every 8 --save-every 5".split()
FOLDERS = {"source_train": ("source", 50), "source_val": ("source", 10)}
FOLDERS |= {"target_train": ("target", 60), "unconstrained": (None, 20)}


def render() -> None:
    """The embedded benchmark, which is built as public data sets are converted: in shards, by one process."""
    rendering.make_benchmark("hands", "hands", FOLDERS, 40, 1)


def pretrain(*more: str):
    return lambda: train_pretrain.main([*PRETRAIN, "--out", "runs/pretrain", *more])


def finetune(*more: str):
    return lambda: train_finetune.main([*FINETUNE, "--init", "runs/pretrain", "--out", "runs/full", *more])


def autoencoder(*more: str):
    return lambda: train_pretrain.main([*MAE, "--epochs", "3", "--out", "runs/mae", *more])


STAGES = {  # what runs, the folder that it makes, steps between its checkpoints
    "rendering": (render, "hands", 0),
    "pre-training": (pretrain(), "runs/pretrain", 4),
    "fine-tuning": (finetune(), "runs/full", 5),
}


class Broken(Exception):
    """A promise was not kept."""


def need(truth, *what) -> None:
    if not truth:
        raise Broken(" ".join(map(str, what))[-3000:])


class Process:
    """A fork of this process that calls main() in the folder `place` and prints into a file."""

    alive: list = []

    def __init__(self, place: Path, main, before=None, **environment):
        self.status, self.printed = None, Path(tempfile.mkstemp(dir=place, prefix="printed")[1])
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid:
            self.alive.append(self)
            return
        try:
            os.chdir(place)
            output = os.open(self.printed, os.O_WRONLY)
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.environ.update(environment)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            if before:
                before()
            runs.run_script(main)
        except SystemExit as end:
            with contextlib.suppress(OSError):
                sys.stdout.flush()
            os._exit(end.code or 0)
        except BaseException:
            traceback.print_exc()
            os._exit(99)

    def running(self) -> bool:
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = os.waitstatus_to_exitcode(status) if pid else None
        return self.status is None

    def wait(self, seconds: float = 120) -> int:
        """The exit status, negative for the signal that killed it."""
        end = time.perf_counter() + seconds
        while self.running():
            need(time.perf_counter() < end, "still running after", seconds, "s:", self.text())
            time.sleep(0.002)
        return self.status

    def until(self, condition) -> "Process":
        while not condition():
            need(self.running(), "ended too early with", self.status, self.text())
            time.sleep(0.001)
        return self

    def send(self, number) -> None:
        if self.running():
            os.kill(self.pid, number)

    def text(self) -> str:
        return self.printed.read_text()


def finish(place: Path, main) -> None:
    """Run main() to its end."""
    process = Process(place, main)
    need(process.wait() == 0 and "Traceback" not in process.text(), process.status, process.text())


def two_ranks(place: Path, main) -> list[Process]:
    """Two processes of one run, as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    return [Process(place, main, RANK=f"{rank}", LOCAL_RANK=f"{rank}", **shared) for rank in (0, 1)]


def logged(folder: Path) -> int:
    """Lines of a run's log."""
    path = folder / "log.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def plain(value):
    """A checkpoint or config without its clock and what depends on it, to compare by ==."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items() if k not in ("seconds", "init")}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return (value.dtype, value.numpy().tobytes()) if isinstance(value, torch.Tensor) else value


def contents(folder: Path) -> dict:
    """Every file below a folder, but for what a killed write left, which the next one does not look at."""
    read = {".pt": runs.read_checkpoint, ".json": runs.read_json}
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".part"]
    return {path.relative_to(folder): plain(read.get(path.suffix, Path.read_bytes)(path)) for path in files}


def same(folder: Path, whole: Path) -> None:
    ours, theirs = contents(folder), contents(whole)
    other = [name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)]
    need(not other, folder, "differs from the undisturbed run in", other)


def fresh(work: Path, name: str) -> Path:
    """A folder with the data sets and the undisturbed pre-training."""
    place = work / name
    (place / "runs").mkdir(parents=True)
    (place / "hands").symlink_to(work / "whole/hands")
    (place / "runs/pretrain").symlink_to(work / "whole/runs/pretrain")
    return place


# ==== The parts: each returns what it counted ===========================================================
def in_a_write(count: int):
    """The process kills itself at its `count`-th fsync, when half of the file is written."""

    def plant():
        calls, fsync = [0], os.fsync

        def cut(file):
            calls[0] += 1
            if calls[0] == count:
                name = os.readlink(f"/proc/self/fd/{file if isinstance(file, int) else file.fileno()}")
                os.truncate(name, os.path.getsize(name) // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            fsync(file)

        os.fsync = cut

    return plant


def kills(work: Path, number: int, rng: random.Random) -> dict:
    """kill -9 in every stage, in a write or at a random time. At most --save-every steps are lost."""
    place, count = work / "killed", 0
    place.mkdir()
    for (name, (main, folder, every)), share in zip(STAGES.items(), (0.2, 0.5, 0.3), strict=True):
        seconds = float((work / f"{name}.seconds").read_text())
        for i in range(max(2, round(share * number))):
            plant = None if i % 2 else in_a_write(rng.randint(1, 6))
            process, end = Process(place, main, plant), time.perf_counter() + rng.uniform(0.1, 0.9) * seconds
            while process.running() and (plant or time.perf_counter() < end):
                time.sleep(0.0005)
            process.send(signal.SIGKILL)
            need(process.wait() in (0, -signal.SIGKILL), name, process.status, process.text())
            count += process.status != 0
            path, log = place / folder / "checkpoint.pt", place / folder / "log.jsonl"
            if every and path.exists():
                logged_step = json.loads(log.read_text().splitlines()[-1])["step"]
                lost = logged_step - runs.read_checkpoint(path)["step"]
                need(lost <= every, name, "lost", lost, "steps")
            if process.status == 0 and i % 2:  # finished: begin anew
                shutil.rmtree(place / folder)
        finish(place, main)
        same(place / folder, work / "whole" / folder)
    return {"kills": count}


def signals(work: Path, number: int, rng: random.Random) -> dict:
    """Ctrl-C and SIGTERM: one line, 130 or 143, nothing saved. To one process, one with workers, and two."""
    place, f_S = fresh(work, "signals"), pretrain("--seg-steps", "999", "--out", "runs/s")
    pose, both = finetune("--epochs", "999", "--workers", "2"), autoencoder("--epochs", "999")
    cases = [(f_S, "runs/s", 2), (pose, "runs/full", 15), (pose, "runs/full", 2), (both, "runs/mae", 15)]
    for main, folder, kind in cases:
        ranks = two_ranks(place, main) if main is both else [Process(place, main)]
        ranks[0].until(lambda folder=folder: logged(place / folder) >= 6)
        for rank in ranks:
            rank.send(signal.SIGSTOP)
        before = {path: path.stat().st_mtime_ns for path in (place / folder).glob("*.pt")}
        for rank in ranks:
            rank.send(kind)
            rank.send(signal.SIGCONT)
        for rank in ranks:
            need(rank.wait(30) == 128 + kind, rank.status, rank.text())
            need(rank.text().count("stopped; the same command") == 1, rank.text())
            need(main is pose or "Traceback" not in rank.text(), rank.text())  # a torch worker may print one
        need({path: path.stat().st_mtime_ns for path in (place / folder).glob("*.pt")} == before, "it saved")
        shutil.rmtree(place / folder)
    return {"stops": len(cases)}


def peers(work: Path, number: int, rng: random.Random) -> dict:
    """One of two processes is killed: the other ends with one line, and the same command continues."""
    place, whole = fresh(work, "peers"), fresh(work, "peers-whole")
    for rank in two_ranks(whole, autoencoder()):
        need(rank.wait() == 0, rank.text())
    for i in range(number):
        goal = logged(place / "runs/mae") + rng.randint(3, 9)
        ranks = two_ranks(place, autoencoder())
        ranks[0].until(lambda goal=goal: logged(place / "runs/mae") >= goal)
        ranks[i % 2].send(signal.SIGKILL)
        other = ranks[1 - i % 2]
        need(other.wait(60) == 1 and "Traceback" not in other.text(), other.status, other.text())
        need(other.text().count("another process of this run was lost") == 1, other.text())
    for rank in two_ranks(place, autoencoder()):
        need(rank.wait() == 0, rank.text())
    same(place / "runs/mae", whole / "runs/mae")
    return {"kills": number}


PARTS = {part.__name__: part for part in (kills, signals, peers)}


def main() -> int:
    quick, failed = "--quick" in sys.argv, False
    torch.set_num_threads(1)
    rendering.BENCHMARK, rendering.CHUNK = FOLDERS, 10
    script = train_pretrain
    warm = runs.parse_settings(script.Settings, "", script.PRESETS, script.VARIANTS, MAE, script.TASKS)
    script.complete(warm, 1)  # torch imports what it needs once, not in every fork
    counts = {"kills": 8, "peers": 1} if quick else {"kills": 60, "peers": 6}
    with tempfile.TemporaryDirectory(prefix="soak") as folder:
        work = Path(folder)
        (work / "whole").mkdir()
        for name, (stage, _, _) in STAGES.items():
            begin = time.perf_counter()
            finish(work / "whole", stage)
            (work / f"{name}.seconds").write_text(str(time.perf_counter() - begin))
        for name, part in PARTS.items():
            try:
                found = part(work, counts.get(name), random.Random(name))
            except (Broken, OSError, runs.InputError) as error:
                found, failed = {"BROKEN": str(error)}, True
            for process in Process.alive:
                process.send(signal.SIGKILL)
            print(json.dumps({"part": name} | found), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
