"""Faults at random and planted, in every stage; then the same command again, its results compared bitwise.

    python tests/soak.py                                all parts, some minutes: 60 kills and the rest
    python tests/soak.py --only kills --kills 200       one part: kills, workers, peers, torchrun, signals,
                                                        elastic, disk, folders
    python tests/soak.py --quick                        what tests/test_survival.py runs, a few of each

The scripts run in processes forked from this one, which has imported torch and computed nothing: a start
takes milliseconds. Prints one JSON line a part, and ends with status 1 where anything was not as promised.
"""
import argparse
import collections
import contextlib
import itertools
import json
import math
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import data  # noqa: E402
import evaluate  # noqa: E402
import test_data  # noqa: E402
import train_finetune  # noqa: E402
import train_pretrain  # noqa: E402
import udapose as u  # noqa: E402

SIZES = ["--image", "32", "--patch", "8", "--width", "16", "--depth", "2", "--heads", "2", "--threads", "1",
         "--device", "cpu", "--precision", "float32", "--log-every", "1", "--batch", "8"]
DECODER = ["--decoder-width", "16", "--decoder-heads", "2"]
SETS = ["--source", "hands/source_train", "--target", "hands/target_train"]
MAE = [*SIZES, *DECODER, *SETS, "--unconstrained", "hands/unconstrained", "--variant", "mae",
       "--save-every", "4"]
PRETRAIN = [*MAE, "--variant", "full", "--seg-channels", "4", "--seg-steps", "14", "--seg-batch", "8",
            "--epochs", "1"]
FINETUNE = [*SIZES, *SETS, "--validation", "hands/source_val", "--head-channels", "8", "--labels", "60",
            "--epochs", "4", "--warmup", "2", "--validate-every", "8", "--save-every", "5"]
STAGES = {  # name: script, arguments, the folders that it makes, steps between its checkpoints
    "rendering": (data, ["hands", "hands", "--side", "40", "--workers", "1"], ["hands"], 0),
    "conversion": (data, ["freihand", "FreiHAND", "freihand", "--side", "64", "--workers", "1"],
                   ["freihand"], 0),
    "pre-training": (train_pretrain, [*PRETRAIN, "--out", "runs/pretrain"], ["runs/pretrain"], 4),
    "fine-tuning": (train_finetune, [*FINETUNE, "--init", "runs/pretrain", "--out", "runs/full"],
                    ["runs/full"], 5),
    "evaluation": (evaluate, ["runs", "--source-test", "hands/source_test", "--target-test",
                              "hands/target_test", "--device", "cpu", "--threads", "1"], ["runs"], 0),
}
SMALL = {"source_train": ("source", 120), "source_val": ("source", 20), "source_test": ("source", 20),
         "target_train": ("target", 130), "target_test": ("target", 20), "unconstrained": (None, 40)}


class Broken(Exception):
    """A promise was not kept."""


def need(truth, *what) -> None:
    if not truth: raise Broken(" ".join(map(str, what)))


# ==========================================================================================================
# Processes
# ==========================================================================================================
def make_small() -> None:
    """Data sets of a hundred images, saved every few jobs, so that a kill finds something half done."""
    data.BENCHMARK, data.CHUNK, data.SAMPLES_A_JOB, test_data.N, build = SMALL, 10, 2, 10, data.build_dataset
    data.build_dataset = lambda folder, meta, jobs, count, work, workers, _, *more: \
        build(folder, meta, jobs, count, work, workers, 128, *more)


class Process:
    """A script in a fork of this process, working in the folder `place`; it prints into a pipe."""
    every: list = []

    def __init__(self, place: Path, script, arguments: list[str], before=None, **environment):
        self.place, self.status, self.text = place, None, b""
        (self.pipe, output) = os.pipe()
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid: os.close(output), os.set_blocking(self.pipe, False), self.every.append(self); return
        try:
            os.chdir(place)
            os.dup2(output, 1), os.dup2(output, 2)
            os.environ.update(environment)
            if before: before()
            u.run_script(lambda: script.main(arguments))
        except SystemExit as end: code = end.code or 0
        except BaseException:
            import traceback
            traceback.print_exc()
            code = 99
        with contextlib.suppress(OSError): sys.stdout.flush()
        os._exit(code)

    def poll(self):
        """None while it runs; then its exit status, negative for the signal that killed it."""
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid: self.status = os.waitstatus_to_exitcode(status)
        return self.status

    def wait(self, seconds: float = 300) -> int:
        end = time.perf_counter() + seconds
        while self.poll() is None and time.perf_counter() < end: time.sleep(0.002)
        if self.poll() is None: self.kill(); raise Broken(f"still at work after {seconds} s\n{self.output()}")
        return self.status

    def kill(self, number=signal.SIGKILL) -> None:
        if self.poll() is None: os.kill(self.pid, number)

    def output(self) -> str:
        with contextlib.suppress(BlockingIOError):
            while more := os.read(self.pipe, 65536): self.text += more
        return self.text.decode()


def finish(place: Path, name: str, *more: str, **options) -> Process:
    script, arguments, _, _ = STAGES[name]
    process = Process(place, script, [*arguments, *more], **options)
    need(process.wait() == 0, name, "ended with", process.status, process.output()[-3000:])
    return process


def two_ranks(place: Path, script, arguments: list[str]) -> list[Process]:
    """Two processes of one run, as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    return [Process(place, script, arguments, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2",
                    MASTER_ADDR="127.0.0.1", MASTER_PORT=port) for rank in (0, 1)]


# ==========================================================================================================
# What is left in a folder
# ==========================================================================================================
def steps(run: Path) -> tuple[str, int, int]:
    """The stage that a run is in, its last logged step, the step of its checkpoint."""
    log = run / "log.jsonl"
    text = log.read_text().rpartition("\n")[0] if log.exists() else ""
    lines = [json.loads(line) for line in text.splitlines()]
    stage = lines[-1]["stage"] if lines else "start"
    path = run / ("segmentation.pt" if stage == "segmentation" else "checkpoint.pt")
    saved = u.read_checkpoint(path)["step"] if path.exists() else 0
    if stage == "segmentation" and saved == 14: stage, path = "target masks", run / "target_masks.part.npy"
    return stage, lines[-1]["step"] if lines else 0, saved


def half_written(place: Path) -> int:
    """Bytes that the same command writes again: beyond the last save of a data set, or in `.part` files."""
    lost = sum(p.stat().st_size for p in place.rglob("*.part*") if p.is_file())
    for state in place.rglob("*.part/state.json"):
        saved = json.loads(state.read_text())
        for name, shape in saved["shape"].items():
            path, dtype = state.parent / f"{name}.npy", np.dtype(data.ARRAYS[name])
            lost += max(0, path.stat().st_size - 128 - saved["rows"] * math.prod(shape) * dtype.itemsize)
    return lost


def plain(value):
    """A checkpoint, result or config without its clock (and the CRC of a file with one), to compare by ==."""
    if isinstance(value, dict): return {k: plain(v) for k, v in value.items()
                                        if k not in ("seconds", "seg_seconds", "init")}
    if isinstance(value, (list, tuple)): return [plain(v) for v in value]
    if not isinstance(value, torch.Tensor): return value
    return str(value.dtype), value.shape, value.numpy().tobytes()


def contents(place: Path, folder: str) -> dict:
    """Every file below a folder; checkpoints and results without clock and the name of the folder."""
    found = {}
    for path in sorted((place / folder).rglob("*")):
        name = str(path.relative_to(place))
        if path.suffix == ".pt": found[name] = plain(u.read_checkpoint(path))
        elif path.name in ("result.json", "config.json"): found[name] = plain(json.loads(path.read_text()))
        elif path.is_file(): found[name] = path.read_bytes()
    return found


def same(place: Path, whole: Path, folder: str, what: str) -> None:
    """Broken unless a folder holds what it holds in `whole`; results only where all runs are looked at."""
    ours, theirs = contents(place, folder), contents(whole, folder)
    other = [name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)]
    if folder != "runs": other = [name for name in other if not name.endswith("result.json")]
    need(not other, what, "differs from the undisturbed run in", other)


# ==========================================================================================================
# Kills
# ==========================================================================================================
def mid_write(count: int, half: bool, named: str = ""):
    """The process kills itself at its `count`-th fsync (of a file with `named` in its name), with half of the
    file; or after the next rename."""
    def plant():
        calls, fsync, replace = [0], os.fsync, os.replace

        def cut(file):
            name = os.readlink(f"/proc/self/fd/{file if isinstance(file, int) else file.fileno()}")
            calls[0] += named in name
            if calls[0] == count and half and named in name:
                if ".part/" not in name: os.truncate(name, os.path.getsize(name) // 2)   # a set only grows
                os.kill(os.getpid(), signal.SIGKILL)
            fsync(file)

        def rename(a, b):
            replace(a, b)
            if calls[0] >= count and not half: os.kill(os.getpid(), signal.SIGKILL)
        os.fsync, os.replace = cut, rename
    return plant


def kill_once(place: Path, name: str, rng: random.Random, duration: float, how: str) -> bool:
    """One kill of a stage: at a random time or step, as a `.part` shows, in a write ("planted", and "masks":
    that of the target's masks). False: it finished."""
    script, arguments, folders, _ = STAGES[name]
    moment = time.perf_counter() + rng.uniform(0.1, 0.8) * duration
    anywhere = mid_write(rng.randint(1, 8), rng.random() < 0.7)
    plant = {"planted": anywhere, "masks": mid_write(1, True, "masks")}
    process = Process(place, script, arguments, plant.get(how))
    skip = rng.randint(0, 3)                                               # so many `.part` files pass
    goal = logged(place / folders[0]) + rng.randint(1, 25)                 # lines of the log
    seen = set()
    while process.poll() is None:
        if how == "time" and time.perf_counter() > moment: break
        if how == "step" and logged(place / folders[0]) >= goal: break
        if how == "part":
            now = {str(p) for folder in folders for p in [*place.glob(f"{folder}.part*"),
                                                          *place.glob(f"{folder}/*.part*")]}
            skip, seen = skip - len(now - seen), now
            if skip < 0: break
        time.sleep(0.0005)
    process.kill()
    status = process.wait()
    need(status in (0, -signal.SIGKILL), name, "ended with", status, process.output()[-3000:])
    return status != 0


def disturbed(place: Path, whole: Path, name: str, kills: int, rng, duration: float, count) -> None:
    """A stage killed up to `kills` times, to its end by the same command, and compared."""
    _, _, folders, every = STAGES[name]
    for i in range(kills):
        done = sum(n for (_, what), n in count.items() if what == "kills")
        how = ["planted", "time", "planted", "part", "step" if every else "time"][done % 5]
        if name == "pre-training" and done % 5 == 2: how = "masks"
        if not kill_once(place, name, rng, duration, how): break
        part, redone = name, 0
        if every:
            part, logged, saved = steps(place / folders[0])
            redone = max(0, logged - saved)
            need(redone <= every, name, "lost", redone, "steps, more than the", every, "between checkpoints")
            part = {"pretraining": "pre-training", "segmentation": "f^S", "finetuning": name}.get(part, part)
        count[part, "kills"] += 1
        count[part, "inside a write" if how in ("planted", "masks", "part") else "at a random time"] += 1
        count[part, "steps redone"] += redone
        count[part, "bytes written again"] += half_written(place)
    finish(place, name)
    for folder in folders: same(place, whole, folder, name)
    count[name, "runs continued and compared"] += 1


def kills(work: Path, number: int, rng: random.Random) -> dict:
    """kill -9 in every stage; weights, metrics, logs, data, pictures bitwise those of the undisturbed run."""
    whole, place, count = work / "whole", work / "killed", collections.Counter()
    for name, part in zip(STAGES, (0.15, 0.1, 0.4, 0.2, 0.15)):
        duration, folders = float((whole / f"{name}.seconds").read_text()), STAGES[name][2]
        wanted = max(1, round(part * number)) + sum(n for (_, k), n in count.items() if k == "kills")
        while sum(n for (_, k), n in count.items() if k == "kills") < wanted:
            if name == "evaluation":
                for path in place.glob("runs/**/result.json"): path.unlink()
                shutil.rmtree(place / "runs/pictures", ignore_errors=True)
            else:
                for folder in folders: shutil.rmtree(place / folder, ignore_errors=True)
            left = wanted - sum(n for (_, k), n in count.items() if k == "kills")
            disturbed(place, whole, name, min(left, rng.randint(2, 5)), rng, duration, count)
    table: dict = {}
    for (part, what), n in count.items(): table.setdefault(part, {})[what] = n
    return {"kills": sum(row.get("kills", 0) for row in table.values())} | table


def workers(work: Path, number: int, rng: random.Random) -> dict:
    """kill -9 of real processes (`python data.py hands`, two workers); the workers do not outlive it."""
    place, code = work / "workers", "import sys; sys.path.insert(0, {!r}); import soak; soak.make_small(); {}"
    place.mkdir(exist_ok=True)
    main = code.format(str(HERE), "soak.data.main(['hands', 'hands', '--side', '40', '--workers', '2'])")
    (place / "render.py").write_text(f"if __name__ == '__main__':\n    {main}\nelse:\n    "
                                     + code.format(str(HERE), "pass") + "\n")
    command, killed, seconds = [sys.executable, "render.py"], 0, []
    for i in range(100):
        process = subprocess.Popen(command, cwd=place, start_new_session=True, stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL)
        end = time.perf_counter() + rng.uniform(3, 9)
        while process.poll() is None and (killed >= number or time.perf_counter() < end): time.sleep(0.01)
        if process.poll() is not None: break
        process.kill(), process.wait()
        begin, killed = time.perf_counter(), killed + 1
        while still_there(process.pid) and time.perf_counter() < begin + 30: time.sleep(0.01)
        seconds.append(round(time.perf_counter() - begin, 2))
        need(not still_there(process.pid), "a worker outlives its parent")
    need(process.returncode == 0, "rendering by two workers ended with", process.returncode)
    same(place, work / "whole", "hands", "rendering by two workers")
    return {"kills": killed, "seconds until the workers were gone": seconds}


def still_there(session: int) -> bool:
    """Whether a process of this session is alive."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, *numbers = path.read_text().rpartition(") ")[2].split()
            if int(numbers[2]) == session and state != "Z": return True
    return False


# ==========================================================================================================
# Two processes
# ==========================================================================================================
def wait_for(truth, processes, seconds: float = 120) -> None:
    """Until truth(); Broken if a process ends before, or after so many seconds."""
    end = time.perf_counter() + seconds
    while not truth():
        ended = [p.status for p in processes if p.poll() is not None]
        need(not ended, "ended too early:", ended, processes[0].output()[-3000:])
        need(time.perf_counter() < end, "waited in vain", processes[0].output()[-3000:])
        time.sleep(0.002)


def logged(run: Path) -> int:
    """Lines of the log."""
    return (run / "log.jsonl").read_bytes().count(b"\n") if (run / "log.jsonl").exists() else 0


def fresh(work: Path, name: str) -> Path:
    """An empty place with the data sets of the undisturbed runs."""
    place = work / name
    shutil.rmtree(place, ignore_errors=True)
    (place / "runs").mkdir(parents=True)
    for folder in ("hands", "FreiHAND"): (place / folder).symlink_to(work / "whole" / folder)
    return place


def finish_two(place: Path, command: list[str]) -> None:
    for p in two_ranks(place, train_pretrain, command): need(p.wait() == 0, p.output()[-3000:])


def start(place: Path, command: list[str], world: int, script=train_pretrain) -> list[Process]:
    """A run on so many processes."""
    return (two_ranks if world == 2 else lambda *given: [Process(*given)])(place, script, command)


def peers(work: Path, number: int, rng: random.Random) -> dict:
    """One of two processes is killed in the middle of a step: the other stops at once and says why; both
    started again, as by torchrun --max-restarts, finish with the bits of two undisturbed processes."""
    command, seconds, place = [*MAE, "--epochs", "3", "--out", "runs/mae"], [], fresh(work, "peers")
    whole = fresh(work, "peers-whole")
    finish_two(whole, command)
    for i in range(number):
        ranks, victim = two_ranks(place, train_pretrain, command), i % 2
        goal = logged(place / "runs/mae") + rng.randint(5, 20)
        wait_for(lambda: logged(place / "runs/mae") >= goal, ranks)
        ranks[victim].kill()
        begin = time.perf_counter()
        need(ranks[1 - victim].wait(60) == 1, "status", ranks[1 - victim].status, ranks[0].output()[-3000:])
        seconds.append(round(time.perf_counter() - begin, 3))
        text = ranks[1 - victim].output()
        need("another process of this run is gone" in text and "Traceback" not in text, text[-3000:])
    finish_two(place, command)
    same(place, whole, "runs/mae", "a run of two processes")
    return {"kills": number, "seconds until the other stopped": seconds}


def torchrun(work: Path, number: int, rng: random.Random) -> dict:
    """The real launcher: with --max-restarts a killed process costs the steps since the last checkpoint; a
    signal to the launcher is a signal to the run, and so is one to all of its processes."""
    command, place = [*MAE, "--epochs", "8", "--out", "runs/mae"], fresh(work, "torchrun")
    whole, found = fresh(work, "torchrun-whole"), {}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]

    def run(place, *more):
        return subprocess.Popen([*launch, *more, str(HERE.parent / "train_pretrain.py"), *command], cwd=place,
                                stdout=open(place / "output", "a"), stderr=subprocess.STDOUT)
    need(run(whole).wait() == 0, (whole / "output").read_text()[-3000:])
    for number, whole_group in itertools.product((signal.SIGINT, signal.SIGTERM), (False, True)):
        process, goal = run(place), logged(place / "runs/mae") + 20
        while logged(place / "runs/mae") < goal: need(process.poll() is None, "ended"); time.sleep(0.005)
        for pid in [process.pid, *(ranks_of(process) if whole_group else [])]: os.kill(pid, number)
        begin = time.perf_counter()
        process.wait()
        saved, last = u.read_checkpoint(place / "runs/mae/checkpoint.pt")["step"], logged(place / "runs/mae")
        who = "launcher and processes" if whole_group else "launcher"      # as Slurm or a terminal does
        found[f"{number.name} to {who}: seconds, status"] = [round(time.perf_counter() - begin, 2),
                                                            process.returncode]
        need(saved == last, number.name, "saved step", saved, "of", last)
    process, goal = run(place, "--max-restarts", "1"), logged(place / "runs/mae") + 20
    while logged(place / "runs/mae") < goal: need(process.poll() is None, "ended"); time.sleep(0.005)
    ranks = ranks_of(process)
    need(len(ranks) == 2, "found", ranks)
    os.kill(rng.choice(ranks), signal.SIGKILL)
    begin = time.perf_counter()
    need(process.wait() == 0, (place / "output").read_text()[-3000:])
    need("another process of this run is gone" in (place / "output").read_text(), "no word of the lost one")
    same(place, whole, "runs/mae", "a run that torchrun started again")
    return found | {"seconds from kill to end": round(time.perf_counter() - begin, 1)}


def is_rank(environ: Path, parent: int) -> bool:
    """Whether this is the environment of a process that torchrun `parent` has started."""
    with contextlib.suppress(OSError):
        own = b"RANK=" in environ.read_bytes()
        return own and environ.with_name("stat").read_text().rpartition(") ")[2].split()[1] == str(parent)
    return False


def ranks_of(launcher: subprocess.Popen) -> list[int]:
    """The processes of a run that torchrun started."""
    return [int(path.parent.name) for path in Path("/proc").glob("[0-9]*/environ") if is_rank(path, launcher.pid)]


def signals(work: Path, number: int, rng: random.Random) -> dict:
    """SIGTERM and Ctrl-C to one process, and to one of two, in each loop: all save that step and exit so."""
    place, seconds = fresh(work, "signals"), []
    f_S = train_pretrain, [*PRETRAIN, "--seg-steps", "9999"]
    autoencoder, pose = (train_pretrain, MAE), (train_finetune, [*FINETUNE, "--variant", "scratch"])
    cases = [(1, signal.SIGTERM, f_S), (1, signal.SIGINT, pose), (1, signal.SIGINT, autoencoder),
             (2, signal.SIGINT, f_S), (2, signal.SIGTERM, autoencoder), (2, signal.SIGINT, pose)]
    for world, kind, (script, arguments) in cases:
        shutil.rmtree(place / "runs/run", ignore_errors=True)
        command = [*arguments, "--epochs", "9999", "--save-every", "9999", "--out", "runs/run"]
        ranks = start(place, command, world, script)
        wait_for(lambda: logged(place / "runs/run") >= rng.randint(3, 9), ranks)
        ranks[-1].kill(kind)
        begin = time.perf_counter()
        statuses = [p.wait(60) for p in ranks]
        seconds.append(round(time.perf_counter() - begin, 3))
        need(set(statuses) == {128 + kind}, kind, "exit", statuses, ranks[0].output()[-3000:])
        stage, last, saved = steps(place / "runs/run")
        need(last == saved, stage, kind.name, "logged", last, "saved", saved)
    return {"stops": len(cases), "seconds until all had saved and stopped": seconds}


def elastic(work: Path, number: int, rng: random.Random) -> dict:
    """Pre-training begun on one process, gone on with two, then one again: the same up to the order of sums.
    While f^S is trained, and in fine-tuning, another number of processes is refused."""
    command, place = [*MAE, "--epochs", "3", "--out", "runs/mae"], fresh(work, "elastic")
    whole = fresh(work, "elastic-whole")
    need(Process(whole, train_pretrain, command).wait() == 0, "the undisturbed run")
    for world in (1, 2):
        ranks = start(place, command, world)
        goal = logged(place / "runs/mae") + 12
        wait_for(lambda: logged(place / "runs/mae") >= goal, ranks)
        for rank in ranks: rank.kill()
        for rank in ranks: rank.wait()
    need("begun with 1 processes, goes on with 2" in ranks[0].output(), ranks[0].output())
    last = Process(place, train_pretrain, command)
    need(last.wait() == 0, last.output()[-3000:])
    one, two = (u.read_checkpoint(p / "runs/mae/checkpoint.pt") for p in (whole, place))
    far = max(float((one[part][k] - two[part][k]).abs().max()) for part in ("encoder", "decoder")
              for k in one[part] if not k.endswith("qkv.bias"))  # see test_training.same_but_for_sums
    need(far < 2e-4, "weights differ by", far)
    need(one["step"] == two["step"] == logged(place / "runs/mae"), "steps or log")
    for name in ("pre-training", "fine-tuning"):
        script, arguments, (folder,), _ = STAGES[name]
        if name == "fine-tuning": arguments = [*arguments, "--init", str(work / "whole/runs/pretrain")]
        process = Process(place, script, arguments)
        wait_for(lambda: logged(place / folder) >= 7, [process])             # a checkpoint is there
        process.kill(), process.wait()
        ranks = two_ranks(place, script, arguments)
        statuses, text = [p.wait(60) for p in ranks], ranks[0].output()
        need(statuses == [2, 2] and "world: 1 there, 2 now" in text, name, statuses, text[-3000:])
    return {"largest difference of a weight": far}


# ==========================================================================================================
# Disk and folders
# ==========================================================================================================
def no_room(size: int):
    """No file of the process may grow beyond so many bytes: a full disk, in the middle of a write."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))


def stdout_full():
    """Nothing that the process prints finds room."""
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)


def disk(work: Path, number: int, rng: random.Random) -> dict:
    """A full disk, at sizes that hit config, log, checkpoint, masks, result, pictures; no room for what is
    printed; the folder is deleted: one line, the last checkpoint intact, the same command goes on as ever."""
    place, refused = fresh(work, "disk"), collections.Counter()
    for name in ("pre-training", "fine-tuning", "evaluation"):
        script, arguments, folders, every = STAGES[name]
        for size in (100, 700, 3000, 20_000, 60_000)[::1 if number > 1 else 2]:
            before = {p: p.read_bytes() for p in place.glob("runs/*/*.pt")}
            process = Process(place, script, arguments, no_room(size) if size != 3000 else stdout_full)
            status = process.wait()
            text = process.output()
            need(status in (0, 2) and "Traceback" not in text, name, size, status, text[-3000:])
            for path in place.glob("runs/*/*.pt"): u.read_checkpoint(path)
            kept = [p for p, content in before.items() if not p.exists()]
            need(not kept and text.count("error: ") == (status == 2), name, "lost", kept, text[-3000:])
            refused[name] += status == 2
        finish(place, name)
        same(place, work / "whole", folders[0], f"{name} after a full disk")
    stages = ("pre-training", "fine-tuning")
    for name, file in itertools.product(stages[:number], ("log.jsonl", "checkpoint.pt")):
        script, arguments, (folder,), _ = STAGES[name]                     # no room from some moment on
        shutil.rmtree(place / folder)
        process, checkpoint = Process(place, script, arguments), place / folder / "checkpoint.pt"
        wait_for(lambda: checkpoint.exists() and logged(place / folder) >= 5, [process])
        process.kill(signal.SIGSTOP)
        room = (place / folder / file).stat().st_size + (20 if file == "log.jsonl" else -1000)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
        process.kill(signal.SIGCONT)
        text = (process.wait(), process.output())[1]
        need(process.status == 2 and text.count("error: ") == 1 and f"{folder}/{file}: " in text, name, text)
        need(checkpoint.exists() and u.read_checkpoint(checkpoint), name, "has lost its checkpoint")
        finish(place, name)
        same(place, work / "whole", folder, f"{name} after a disk that filled")
        refused[f"{name}, {file} finds no more room"] += 1
    for name in stages:
        script, arguments, (folder,), _ = STAGES[name]
        if name == "pre-training": arguments = [*arguments, "--out", (folder := "runs/deleted")]
        else: shutil.rmtree(place / folder)
        process = Process(place, script, arguments)
        wait_for(lambda: logged(place / folder) >= 3, [process])
        shutil.rmtree(place / folder, ignore_errors=True)
        while (place / folder).exists(): shutil.rmtree(place / folder, ignore_errors=True)
        need(process.wait() == 2 and process.output().count("error: ") == 1, process.output()[-3000:])
        refused[f"{name}, folder deleted"] += 1
    return dict(refused)


def folders(work: Path, number: int, rng: random.Random) -> dict:
    """Two runs in one folder; its lock after a kill; other settings; a finished run; one command twice."""
    place, command = fresh(work, "folders"), [*MAE, "--epochs", "4", "--out", "runs/mae"]
    first = Process(place, train_pretrain, command)
    wait_for(lambda: logged(place / "runs/mae") >= 6, [first])               # a checkpoint is there
    first.kill(signal.SIGSTOP)                                             # it lives, and does not end
    second = Process(place, train_pretrain, command)
    need(second.wait() == 2 and "another run is at work here" in second.output(), second.output()[-3000:])
    first.kill(), first.wait()
    other = Process(place, train_pretrain, [*command, "--lr", "0.5"])
    need(other.wait() == 2 and "lr: 0.0015 there, 0.5 now" in other.output(), other.output()[-3000:])
    need(Process(place, train_pretrain, command).wait() == 0, "the killed run goes on")
    before = contents(place, "runs")
    again = Process(place, train_pretrain, command)
    need(again.wait() == 0 and "finished: runs/mae" in again.output(), again.output()[-3000:])
    need(contents(place, "runs") == before, "a finished run changes")
    twice = fresh(work, "twice")
    need(Process(twice, train_pretrain, [*command, "--deterministic"]).wait() == 0, "--deterministic")
    ours, theirs = (u.read_checkpoint(p / "runs/mae/checkpoint.pt") for p in (place, twice))
    need(plain(ours["encoder"]) == plain(theirs["encoder"]), "the same command twice gives other weights")
    return {"runs": 6}


PARTS = {part.__name__: part for part in (kills, workers, peers, torchrun, signals, elastic, disk, folders)}
QUICK = {"kills": 5, "peers": 1, "signals": 1, "elastic": 1, "disk": 1, "folders": 1}


def prepare(work: Path) -> None:
    """What the parts start from: a small FreiHAND, and the undisturbed runs with their durations."""
    for name in ("whole", "killed"): (work / name).mkdir()
    test_data.write_freihand(work / "whole/FreiHAND", test_data.windows())
    (work / "killed/FreiHAND").symlink_to(work / "whole/FreiHAND")
    for name in STAGES:
        begin = time.perf_counter()
        finish(work / "whole", name)
        (work / f"whole/{name}.seconds").write_text(str(time.perf_counter() - begin))


def main() -> int:
    plain_text = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain_text)
    parser.add_argument("--kills", type=int, default=60, help="of the part `kills` [60]")
    parser.add_argument("--only", default="", help="parts, with commas between")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the faults [0]")
    parser.add_argument("--quick", action="store_true", help="a few of each, without workers and torchrun")
    parser.add_argument("--work", help="folder to work in, kept [a temporary one]")
    a = parser.parse_args()
    torch.set_num_threads(1)
    make_small()
    if a.quick: STAGES["evaluation"][1].extend(["--pictures", "none"])
    counts = QUICK if a.quick else {name: 6 for name in PARTS} | {"kills": a.kills, "workers": 3}
    wanted = a.only.split(",") if a.only else list(counts)
    work, failed = Path(a.work or tempfile.mkdtemp(prefix="soak")), 0
    work.mkdir(exist_ok=True)
    begin = time.perf_counter()
    prepare(work)
    print(json.dumps({"part": "undisturbed", "seconds": round(time.perf_counter() - begin, 1)}), flush=True)
    for name in wanted:
        begin = time.perf_counter()
        try: found = PARTS[name](work, counts.get(name, 6), random.Random(f"{a.seed} {name}"))
        except (Broken, OSError) as error: found, failed = {"BROKEN": str(error)}, 1
        for process in Process.every: process.kill()                       # those of a broken part
        Process.every.clear()
        seconds = round(time.perf_counter() - begin, 1)
        print(json.dumps({"part": name, "seconds": seconds} | found), flush=True)
    if failed: return 1  # what it left stays
    if not a.work: shutil.rmtree(work)
    return 0


if __name__ == "__main__": sys.exit(main())
