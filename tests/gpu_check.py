"""The first ten minutes with a GPU: every part that only a GPU can test, once, with one line for each.

    python tests/gpu_check.py FOLDER [STEP ..]    all steps, or some; without a GPU, what a CPU can show

FOLDER gets all that a step prints; its line has its end, its seconds and its figure. Nothing is tested twice:
this file calls the tests, the scripts and the benchmark. The exit status is the number of failed steps.
"""

import collections
import contextlib
import copy
import functools
import inspect
import json
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

import benchmark
import conftest  # puts the project's files on the path
import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import evaluate
import train_finetune
import train_pretrain
import udapose
from support import run as runs

STAGES = {"pretrain": train_pretrain, "finetune": train_finetune}


def settings(stage: str, folder: Path, device: str, out: str, *more: str) -> list[str]:
    """Arguments of a training script: the tests' small networks, 10 to 13 steps, on the device."""
    arguments = conftest.pretraining(folder / "sets", folder / out)
    if stage == "finetune":
        arguments = conftest.finetuning(folder / "sets", folder / out, folder / "pretrained", "--epochs", "4")
    return [*arguments, "--device", device, "--precision", "auto", "--workers", "1", *more]


def stage_1(folder: Path, device: str) -> None:
    """Draw small data sets, and train stage 1 with two reading processes. Later steps start from its run."""
    (folder / "sets").mkdir(exist_ok=True)
    for name, count in {"source": 128, "target": 32, "source_test": 60, "target_test": 60}.items():
        conftest.write_set(folder / "sets" / name, name.split("_")[0], count)
    conftest.write_set(folder / "sets/xc", None, 64)
    train_pretrain.main(settings("pretrain", folder, device, "pretrained", "--workers", "2"))


def copied(x, device: str = "cpu"):
    """A copy of an argument on the device. Tensors of real numbers get a gradient."""
    if isinstance(x, nn.Module):
        return copy.deepcopy(x).to(device)
    return x.detach().clone().to(device).requires_grad_(x.is_floating_point()) if isinstance(x, Tensor) else x


class Twice:
    """A pytest plugin: what a test computes with udapose.py is computed again, on CPU and device."""

    def __init__(self, device: str):
        self.device, self.calls = device, []
        for name, member in inspect.getmembers(udapose, lambda m: getattr(m, "__module__", "") == "udapose"):
            if inspect.isfunction(member):
                setattr(udapose, name, self.recorded(member))
            elif issubclass(member, nn.Module):
                member.forward = self.recorded(member.forward)

    def recorded(self, function):
        @functools.wraps(function)
        def wrapped(*arguments, **named):
            kept = tree_map(copied, (arguments, named))  # before the call, which may change them
            result = function(*arguments, **named)
            if any(isinstance(x, Tensor) for x in tree_leaves(kept)):
                self.calls.append((function, *kept))
            return result

        return wrapped

    def results(self, function, arguments, named, device: str) -> list[Tensor]:
        """What a call returns, and the gradients of its arguments and weights."""
        arguments, named = tree_map(lambda x: copied(x, device), (arguments, named))
        parts = [x.parameters() if isinstance(x, nn.Module) else [x] for x in tree_leaves((arguments, named))]
        inputs = [x for part in parts for x in part if isinstance(x, Tensor) and x.requires_grad]
        values = [x for x in tree_leaves(function(*arguments, **named)) if isinstance(x, Tensor)]
        sums = [x.double().square().sum() for x in values if x.requires_grad]
        gradients = torch.autograd.grad(sum(sums), inputs, allow_unused=True) if sums else []
        return [x.detach().cpu() for x in [*values, *gradients] if x is not None]

    def pytest_runtest_teardown(self) -> None:
        """Compare the first twenty calls of a test, to 1e-4 of the largest value."""
        for call in self.calls[:20]:
            for a, b in zip(*(self.results(*call, place) for place in ("cpu", self.device)), strict=True):
                if a.dtype not in (torch.bfloat16, torch.float16):  # these have two or three digits
                    atol = 1e-4 * float(a.double().nan_to_num().abs().amax()) if a.numel() else 0
                    torch.testing.assert_close(b, a, rtol=0, atol=atol, equal_nan=True)
        self.calls.clear()


def equations(folder: Path, device: str) -> int:
    """The tests of the equations and of the fast forms."""
    files = [str(conftest.ROOT / f"tests/test_{name}.py") for name in ("equations", "fast_forms")]
    return pytest.main(["-q", "--no-header", "-p", "no:cacheprovider", *files], plugins=[Twice(device)])


def variants(folder: Path, device: str, precision: str) -> None:
    """Ten steps or more of every variant of both stages. A loss that is not finite would stop one."""
    if precision == "float16" and device == "cpu":
        return print("left out: a CPU emulates it, and takes a quarter of an hour")
    for stage, script in STAGES.items():
        for name, fields in script.VARIANTS.items():
            print(f"variant {name}", flush=True)
            more = [f"--variant={name}", f"--precision={precision}"]
            more += [f"--{key}=" for key in ("target", "init") if fields.get(key) == ""]
            script.main(settings(stage, folder, device, f"{precision}-{stage}-{name}", *more))
    print(" + ".join(str(len(script.VARIANTS)) for script in STAGES.values()), "variants, losses finite")


def sync(folder: Path, device: str) -> None:
    """Both stages. Count the places that wait for the GPU; one that does so in every step is an error."""
    if device == "cpu":
        return print("left out: a CPU does not wait for itself")
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for stage, kind in [(stage, kind) for stage in STAGES for kind in ("bfloat16", "float16")]:
            more = ["--precision", kind, "--micro-batch", "4"]
            STAGES[stage].main(settings(stage, folder, device, f"sync-{stage}-{kind}", *more))
    caught = [w for w in caught if "synchronizing CUDA operation" in str(w.message)]
    places = collections.Counter(f"{Path(w.filename).name}:{w.lineno}" for w in caught)
    print(*places.items(), sep="\n")
    files = "run.py", "module.py", "storage.py", "serialization.py"  # check, move and save weights one by one
    often = [place for place, count in places.items() if count >= 20 and not place.startswith(files)]
    assert not often, often
    print(f"{len(places)} places wait, none of them in every step")


def deterministic(folder: Path, device: str) -> None:
    """--deterministic twice, and a third time with `kill -9` after the first checkpoint and a resume."""
    for stage in STAGES:
        outs = [f"{stage}-{i}" for i in range(3)]
        more = ["--deterministic", "--epochs", "8"]
        command = [sys.executable, conftest.ROOT / f"train_{stage}.py"]
        process = subprocess.Popen(command + settings(stage, folder, device, outs[2], *more))
        while not (folder / outs[2] / "checkpoint.pt").exists() and process.poll() is None:
            time.sleep(0.001)
        process.kill()
        assert process.wait() == -9, "it ended before it was killed"
        for out in outs:
            STAGES[stage].main(settings(stage, folder, device, out, *more))
        first, *others = (conftest.weights(folder / out) for out in outs)
        assert all(conftest.same(first, other) for other in others), f"{stage}: other bits"
    print("both stages: two runs and a resume have the same bits")


def ddp(folder: Path, device: str) -> None:
    """One process under DistributedDataParallel, with micro-batches and checkpointing, against none."""
    more = ["--micro-batch", "4", "--checkpointing", "--deterministic"]
    for stage in STAGES:
        STAGES[stage].main(settings(stage, folder, device, f"{stage}-alone", *more))
    one = type("One", (int,), {"__gt__": lambda *_: True})(1)  # `if world > 1` holds, so the scripts wrap
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, init_method=f"file://{folder}/met", rank=0, world_size=1)
    runs.setup_distributed = lambda _: (0, one, torch.device(device))
    for stage in STAGES:
        STAGES[stage].main(settings(stage, folder, device, f"{stage}-ddp", *more))
        assert conftest.same(*(conftest.weights(folder / f"{stage}-{x}") for x in ("alone", "ddp"))), stage
    torch.distributed.destroy_process_group()
    print("both stages: bitwise the weights of a run without it")


def compiled(folder: Path, device: str) -> None:
    """--compile: graphs, graph breaks and recompilations of both stages. The reasons are in the log."""
    if device == "cpu" and not shutil.which("g++"):
        return print("left out: no compiler")
    figures, dynamo = [], torch._dynamo.utils
    for stage in STAGES:
        torch._dynamo.reset()
        dynamo.counters.clear()
        dynamo.clear_compilation_metrics()
        STAGES[stage].main(settings(stage, folder, device, f"{stage}-compiled", "--compile"))
        again = [m.recompile_reason for m in dynamo.get_compilation_metrics() if m.recompile_reason]
        print(*again, *dynamo.counters["graph_break"], sep="\n")
        graphs, breaks = dynamo.counters["stats"]["unique_graphs"], dynamo.counters["graph_break"].total()
        figures.append(f"{stage} {graphs} graphs, {breaks} breaks, {len(again)} recompilations")
    print("; ".join(figures))


def speed(folder: Path, device: str) -> None:
    """tests/benchmark.py at the paper's size; on a CPU at the size of the preset `tiny`."""
    size = ["--sizes", "paper"] if device == "cuda" else ["--sizes", "tiny", "--threads", "1"]
    benchmark.main(["--device", device, *size, "--json", f"{folder}/speed.json"])
    text = "{part} {images/s:.0f} images/s, MFU {MFU:.0%}, waiting for data {waiting for data:.0%}"
    print("; ".join(text.format(**p) for p in json.loads((folder / "speed.json").read_text()) if "MFU" in p))


def evaluation(folder: Path, device: str) -> None:
    """Every number of evaluate.py on the device and on the CPU, of a run of 180 steps."""
    train_finetune.main(settings("finetune", folder, device, "trained", "--epochs=60", "--validate-every=99"))
    found, tests = [], [f"--{name}-test={folder}/sets/{name}_test" for name in ("source", "target")]
    for place in (device, "cpu"):
        evaluate.main([f"{folder}/trained", *tests, "--device", place])
        lines = map(json.loads, (folder / "trained/result.jsonl").read_text().splitlines())
        found.append([x for x in tree_leaves(list(lines)) if isinstance(x, float)])
    worst = max(abs(a - b) / max(1, abs(b)) for a, b in zip(*found, strict=True))
    assert worst < 1e-2, f"the largest difference is {worst:.1%}"
    print(f"{len(found[0])} numbers, largest difference {worst:.1g}")


STEPS = {"stage 1": (120, stage_1), "equations": (240, equations)}  # name: (time limit in s, function)
STEPS |= {k: (180, functools.partial(variants, precision=k)) for k in ("bfloat16", "float16", "float32")}
STEPS |= {"sync": (120, sync), "deterministic": (240, deterministic), "ddp": (120, ddp)}
STEPS |= {"compile": (400, compiled), "speed": (400, speed), "evaluation": (120, evaluation)}


def main(folder: str, *names: str) -> int:
    """Run the steps, each in a process of its own, and print their lines. As such a process, run one."""
    if names[:1] == ("--child",):
        return STEPS[names[1]][1](Path(folder), names[2]) or 0
    device, patience, failed = ("cuda", 1, 0) if torch.cuda.is_available() else ("cpu", 5, 0)
    gpu = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}" if device == "cuda" else "no GPU"
    print(f"torch {torch.__version__}, {gpu}, {runs.choose_dtype('auto', torch.device(device))}", flush=True)
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name in names or STEPS:
        start, end, limit = time.perf_counter(), "FAILED", patience * STEPS[name][0]
        log = Path(folder).resolve() / f"{name}.log"
        command = [sys.executable, __file__, log.parent, "--child", name, device]
        with open(log, "w") as file, contextlib.suppress(subprocess.TimeoutExpired):
            done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, timeout=limit)
            end = "FAILED" if done.returncode else "ok"
        figure = (log.read_text().strip().splitlines() or [""])[-1]
        shown = "" if figure.startswith("left out") else end
        print(f"{name:<15}{shown:<7}{time.perf_counter() - start:4.0f} s  {figure[:150]}", flush=True)
        failed += end == "FAILED"
    return failed


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
