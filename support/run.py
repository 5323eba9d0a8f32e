"""Everything about runs that is not the method: processes, precision, settings, checkpoints, one-line errors.

Needed by all three scripts. Someone who only changes the method can skip it.
"""

import argparse
import contextlib
import dataclasses
import datetime
import fcntl
import inspect
import json
import math
import operator
import os
import re
import signal
import sys
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, distributed, nn

PATIENCE = datetime.timedelta(minutes=20)  # how long a process waits for the others: rank 0 may be rendering


class InputError(Exception):
    """A mistake that the user can fix: a file, a setting, a value. Scripts print it as one line and stop."""


def first_line(error: Exception) -> str:
    """The first line of an error's text, or its type if it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0][:120]


def run_script(main) -> None:
    """Call main() and exit. A user's mistake is printed as one line, with exit status 2.

    Ctrl-C ends with status 130 and SIGTERM with 143. Neither saves: the same command repeats the steps since
    the last checkpoint. One of several processes leaves by `os._exit`, because threads of the process group
    can abort the interpreter while it shuts down.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    leave, text = os._exit if "RANK" in os.environ else sys.exit, ""
    try:
        status = main() or 0
        sys.stdout.flush()
        if several_processes():
            distributed.destroy_process_group()
    except (InputError, OSError) as error:
        status, text = 2, f"error: {error}"
        leave = os._exit if isinstance(error, OSError) else leave  # no room to print: none at the exit either
    except torch.OutOfMemoryError as error:
        status, text = 2, f"error: the GPU is out of memory ({first_line(error)}); lower --micro-batch"
    except (KeyboardInterrupt, SystemExit) as error:
        status = 130 if isinstance(error, KeyboardInterrupt) else error.code
        if status in (130, 143):
            text = "stopped; the same command continues from the last checkpoint"
    with contextlib.suppress(OSError):
        if text:
            print(text, file=sys.stderr, flush=True)
        sys.stdout.flush()  # os._exit does not
    leave(status)


# ==========================================================================================================
# Processes
# ==========================================================================================================
def setup_distributed(device: str = "auto") -> tuple[int, int, torch.device]:
    """Rank, number of processes, and device. `python` starts one process, `torchrun` several."""
    cuda = torch.cuda.is_available() if device == "auto" else device == "cuda"
    if cuda and not torch.cuda.is_available():
        raise InputError("--device cuda: torch finds no CUDA device; choose --device cpu")
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return 0, 1, torch.device("cuda" if cuda else "cpu")
    if "LOCAL_RANK" not in os.environ:
        raise InputError("WORLD_SIZE is set, but LOCAL_RANK is not: start processes with torchrun")
    local = int(os.environ["LOCAL_RANK"])
    if cuda:
        torch.cuda.set_device(local)
    distributed.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=PATIENCE)
    return *rank_and_world(), torch.device("cuda", local) if cuda else torch.device("cpu")


def several_processes() -> bool:
    """Whether this is one of several processes."""
    return distributed.is_available() and distributed.is_initialized()


def rank_and_world() -> tuple[int, int]:
    """Rank and number of processes."""
    return (distributed.get_rank(), distributed.get_world_size()) if several_processes() else (0, 1)


def from_all_ranks(value) -> list:
    """The values of all processes, in the order of their ranks."""
    values = [value] * rank_and_world()[1]
    if several_processes():
        distributed.all_gather_object(values, value)
    return values


def on_rank_0(function, *arguments):
    """What function(*arguments) returns on rank 0, in every process. An error there is raised in all."""
    box = [None]
    if rank_and_world()[0] == 0:
        try:
            box[0] = function(*arguments)
        except (InputError, OSError) as error:
            box[0] = error
    if several_processes():
        distributed.broadcast_object_list(box, src=0)
    if isinstance(box[0], Exception):
        raise box[0]
    return box[0]


def mean_over_processes(values: Tensor) -> Tensor:
    """The mean of a tensor over all processes, in place."""
    if several_processes():
        distributed.all_reduce(values)
        values /= rank_and_world()[1]
    return values


def statistics_of_rank_0(module: nn.Module) -> None:
    """Copy BatchNorm's running statistics from rank 0: each process has updated them with its own images."""
    for buffer in module.buffers() if several_processes() else ():
        distributed.broadcast(buffer, 0)


def sync_gradients(model: nn.Module, now: bool):
    """Context of a backward pass: gradients travel between processes with the last micro-batch only."""
    return contextlib.nullcontext() if now or not hasattr(model, "no_sync") else model.no_sync()


def compile_blocks(*stacks: nn.ModuleList) -> None:
    """Compile transformer blocks one by one. All blocks of a stack share one graph, so this takes seconds."""
    for blocks in stacks:
        for block in blocks:
            block.compile(dynamic=False)


def micro_batches(batch: int, micro_batch: int, rank: int, world: int, flag: str = "--batch") -> list[slice]:
    """The slices of the global batch that this process works on, one per micro-batch."""
    if batch % world:
        raise InputError(f"{flag} {batch} does not divide evenly among {world} processes")
    own = batch // world
    micro = min(micro_batch or own, own)
    if own % micro:
        raise InputError(f"--micro-batch {micro} does not divide the {own} images of a process")
    return [slice(rank * own + i, rank * own + i + micro) for i in range(0, own, micro)]


# ==========================================================================================================
# Arithmetic: threads, precision, random numbers
# ==========================================================================================================
def configure_torch(threads: int = 0, deterministic: bool = False) -> None:
    """Set the CPU threads (0: torch's choice), and turn TensorFloat-32 off.

    With TF32, pixels and millimetres would have three digits. `deterministic` gives the same bits on each run
    of a GPU, more slowly; a CPU gives them anyway.
    """
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    if threads:
        torch.set_num_threads(threads)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it at its first product
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The type of matrix products. "auto": bfloat16 if the hardware has it, else float16 (CUDA), float32."""
    if precision != "auto":
        return getattr(torch, precision)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    names = "_is_avx512_bf16_supported", "_is_amx_tile_supported"
    fast = any(getattr(torch.cpu, name, bool)() for name in names)  # bool() is False
    return torch.bfloat16 if fast else torch.float32


def autocast(device: torch.device, dtype: torch.dtype):
    """Context in which matrix products use `dtype`.

    The weight cache is off: with it, gradients of an encoder that is used twice in one step are summed in
    bfloat16.
    """
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32, cache_enabled=False)


def random_generator(seed: int, purpose: str, step: int = 0) -> np.random.Generator:
    """Random numbers that depend on (seed, purpose, step) alone, so that a resumed run draws the same ones.

    SeedSequence mixes the three. A sum would make seed 1 at step 0 repeat seed 0 at step 1.
    """
    return np.random.default_rng(np.random.SeedSequence([seed, zlib.crc32(purpose.encode()), step]))


# ==========================================================================================================
# Settings from the command line
# ==========================================================================================================
def setting(default, **bounds):
    """A field of a Settings class with bounds: above < value < below, low <= value <= high, or `choices`."""
    return dataclasses.field(default=default, metadata=bounds)


def check_bounds(field: dataclasses.Field, value) -> None:
    """InputError if a number is out of the bounds that its field declares. argparse checks `choices`."""
    if isinstance(value, (str, bool)):
        return
    bounds = dict(field.metadata)
    if not {"below", "high"} & set(bounds):
        bounds["high"] = 1e6  # no setting makes sense beyond it, and some would overflow
    kinds = {"above": (operator.gt, "above"), "low": (operator.ge, "not below"),
             "below": (operator.lt, "below"), "high": (operator.le, "not above")}
    asked = [(*kinds[name], bound) for name, bound in bounds.items()]
    if not all(fits(value, bound) for fits, _, bound in asked):  # NaN fits no bound
        words = " and ".join(f"{text} {bound:g}" for _, text, bound in asked)
        raise InputError(f"--{field.name.replace('_', '-')} {value}: give a number {words}")


def run_group(preset: str, task: str = "hand") -> str:
    """Folder below runs/, and first word of a row in tables: tiny, tiny-human, paper-hand, paper-human."""
    return preset if task == "hand" or preset.endswith(task) else f"{preset}-{task}"


def parse_settings(cls, doc: str, presets: dict, variants: dict, arguments, tasks: dict):
    """Settings of a script: the dataclass's defaults, then task, preset, variant, then the flags given.

    A flag's help is the comment after its field, followed by its default and the presets' values.
    """
    notes = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(cls), re.M))
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=doc, allow_abbrev=False, formatter_class=shape)
    named = {"preset": presets, "variant": variants, "task": tasks}
    for field in dataclasses.fields(cls):
        kind = {"type": field.type, "metavar": field.type.__name__.upper()}
        choices = named.get(field.name) or field.metadata.get("choices")
        if choices:
            kind = {"choices": list(choices), "metavar": "|".join(filter(None, choices))}
        if field.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        values = [f"{k} {v[field.name]}" for k, v in (presets | tasks).items() if field.name in v]
        usual = "; ".join(filter(None, [str(field.default), *values]))
        text = f"{notes.get(field.name, '')}{f' [{usual}]' if usual else ''}".replace("%", "%%")
        parser.add_argument(f"--{field.name.replace('_', '-')}", default=argparse.SUPPRESS, help=text, **kind)
    given = vars(parser.parse_args(arguments))
    preset, variant = given.get("preset", cls.preset), given.get("variant", cls.variant)
    task = presets[preset].get("task", given.get("task", cls.task))
    chosen = {"preset": preset, "variant": variant, "task": task}
    if given.get("task", task) != task:
        raise InputError(f"--task {given['task']}: preset {preset} is for {task}")
    settings = cls(**(tasks[task] | presets[preset] | variants[variant] | given | chosen))
    for field in dataclasses.fields(cls):
        check_bounds(field, getattr(settings, field.name))
    if settings.save_every % settings.log_every:
        given = f"--save-every {settings.save_every}: give a multiple of --log-every {settings.log_every}"
        raise InputError(given)
    return settings


# ==========================================================================================================
# Files: written whole or not at all, read without running anything that is in them
# ==========================================================================================================
def write_atomically(path: str | Path, write) -> None:
    """Call write(temporary), flush to disk, rename: a reader sees the old file or the new one, never half.

    For one writer at a time: run folders and conversions are locked.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.part")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        temporary.unlink(missing_ok=True)
        kept = "the previous one is intact" if path.exists() else "nothing was saved"
        raise InputError(f"{path}: could not be written ({first_line(error)}); {kept}") from error


def lock(folder: Path):
    """Make the folder, and return an open file: until it is closed, this process alone writes there."""
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / "lock", "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InputError(f"{folder}: another process writes here; wait, or name another place") from error
    return file


def write_json(path: str | Path, value) -> None:
    """Write a JSON file, whole or not at all."""
    write_atomically(path, lambda part: part.write_text(json.dumps(value, indent=1) + "\n"))


def read_json(path: str | Path):
    """The content of a JSON file of a run or a data set."""
    try:
        return json.loads(Path(path).read_text())
    except ValueError as error:
        raise InputError(f"{path}: not a readable JSON file ({first_line(error)}); remove it") from error


def file_checksum(path: str | Path) -> str:
    """CRC-32 of a file, or of the checkpoint in a run folder, as eight hexadecimal digits."""
    path = Path(path) / "checkpoint.pt" if Path(path).is_dir() else Path(path)
    return f"{zlib.crc32(np.memmap(path, mode='r')):08x}"


def torch_load(path: str | Path):
    """The content of a torch file: tensors, plain values, an argparse.Namespace. Nothing in it is executed.

    Compressed parts are refused, because a few bytes could unpack to any size.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            if any(part.compress_type != zipfile.ZIP_STORED for part in file.infolist()):
                raise ValueError("its parts are compressed, which torch.save never does")
    with torch.serialization.safe_globals([argparse.Namespace]):  # official MAE files hold one
        return torch.load(path, map_location="cpu", weights_only=True)


def read_checkpoint(path: str | Path) -> dict:
    """A checkpoint of this project: weights, settings, step."""
    try:
        state = torch_load(path)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such checkpoint; train it first (same --preset and --seed)") from error
    except Exception as error:
        raise InputError(f"{path}: not a readable checkpoint ({first_line(error)})") from error
    if not isinstance(state, dict) or not isinstance(state.get("settings"), dict) or "step" not in state:
        raise InputError(f"{path}: not a checkpoint of this project")
    return state


def load_parts(path: str | Path, state: dict, **modules: nn.Module) -> None:
    """Copy the weights state[name] into each module. InputError names what does not fit."""
    for name, module in modules.items():
        if not isinstance(state.get(name), dict):
            raise InputError(f"{path}: contains no {name}; it is a checkpoint of another kind")
        try:
            module.load_state_dict(state[name])
        except RuntimeError as error:  # the second line names the first key
            says = str(error).splitlines()[1].strip()
            raise InputError(f"{path}: another architecture: {name}: {says}") from error


def require_finite(whose: str, tensors: dict[str, Tensor]) -> None:
    """InputError if a tensor has values that are not finite."""
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise InputError(f"{whose}.{key} has values that are not finite")


# ==========================================================================================================
# Runs
# ==========================================================================================================
class Progress:
    """One line every few seconds: done, values, images per second, time left.

    `total` counts `unit`s; `images` is the number of images in each.
    """

    def __init__(self, name: str, total: int, unit="steps", images=1, start=0, quiet=False, every=10.0):
        self.name, self.total, self.unit, self.images, self.start = name, total, unit, images, start
        self.quiet, self.every = quiet, every
        self.begin = self.shown = time.perf_counter()

    def show(self, done: int, values: dict[str, float] | None = None, final: bool = False) -> None:
        """Print the line, unless the last one is recent."""
        now = time.perf_counter()
        if self.quiet or (now - self.shown < self.every and not final):
            return
        self.shown = now
        rate = (done - self.start) / (now - self.begin + 1e-9)
        left = int((self.total - done) / rate) if rate else 0
        text = "".join(f" | {name} {value:.4g}" for name, value in (values or {}).items())
        print(f"{self.name}: {done}/{self.total} {self.unit}{text} | {rate * self.images:.0f} images/s | "
              f"{left // 60}:{left % 60:02d} left", flush=True)


def mean_losses(window: list[Tensor], done: int, *names: str) -> dict[str, float]:
    """Average the losses of the last steps, over all processes too. A loss that is not finite stops the run.

    window: one tensor (len(names),) per step, the last of them that of step `done`.
    """
    losses = mean_over_processes(torch.stack(window))  # (steps, len(names))
    for step, values in enumerate(losses.tolist(), done - len(window) + 1):
        for name, value in zip(names, values, strict=True):
            if not math.isfinite(value):
                raise InputError(f"{name} is {value} at step {step}; the last checkpoint is intact. Lower "
                                 "the learning rate, or use --precision float32, with another --out")
    return dict(zip(names, losses.mean(dim=0).tolist(), strict=True))


def machine(device: torch.device) -> str:
    """The kind of hardware. A run gives the same bits only on the same kind."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{os.uname().machine} {torch.backends.cpu.get_cpu_capability()}"


class Run:
    """A run folder: config.json, log.jsonl, checkpoints, and a lock that a killed process releases.

    settings: the dataclass. facts: what else must not change in a resume, such as the data's fingerprints.
    Raises InputError if another process uses the folder, or if it holds a run with other settings.
    """

    MAY_DIFFER = {"out", "compile", "checkpointing", "workers", "save_every", "log_every"}  # not the result
    NOTED = {"machine", "torch", "threads"}  # they change bits, not the method

    def __init__(self, folder: str | Path, settings, facts: dict, rank: int, device: torch.device):
        self.folder, self.rank, self.begin, self.lock = Path(folder), rank, time.perf_counter(), None
        self.settings = dataclasses.asdict(settings)
        self.defaults = {field.name: field.default for field in dataclasses.fields(settings)}
        facts = facts | {"machine": machine(device), "torch": torch.__version__,
                         "threads": 0 if device.type == "cuda" else torch.get_num_threads()}
        precision = str(choose_dtype(settings.precision, device)).removeprefix("torch.")
        config = {"settings": self.settings, "facts": facts, "precision": precision}
        self.config = on_rank_0(self.claim, config)
        self.dtype = getattr(torch, self.config["precision"])  # a resume keeps the first choice
        if rank == 0:
            print(f"{self.folder}: {self.config['precision']} on {facts['machine']}", flush=True)

    def claim(self, config: dict) -> dict:
        """Lock the folder. Write config.json, or compare the one that is there and return it."""
        self.lock = lock(self.folder)
        path, config = self.folder / "config.json", json.loads(json.dumps(config))
        if not any(self.folder.glob("*.pt")):  # nothing is lost by beginning again
            write_json(path, config)
            return config
        there = read_json(path)
        old, now = ({**self.defaults, **c["settings"], **c["facts"]} for c in (there, config))
        changed = {key: f"{key}: {old.get(key)} there, {value} now" for key, value in now.items()
                   if key not in self.MAY_DIFFER and old.get(key) != value}
        if others := [text for key, text in changed.items() if key not in self.NOTED]:
            raise InputError(f"{self.folder}: this run was made with other settings "
                             f"({'; '.join(others[:4])}); use those, or give another --out")
        for text in changed.values():
            print(f"{text}: the run continues, but not bit for bit as it would have", flush=True)
        return there

    def save(self, name: str, step: int, steps: int, optimiser, scaler, modules: dict, **values) -> None:
        """Save settings, step, weights, optimiser, scaler. Refuses weights that are not finite."""
        if self.rank:
            return
        weights = {key: module.state_dict() for key, module in modules.items()}
        for key, tensors in weights.items():
            require_finite(f"step {step}: not saved, the last checkpoint is intact: {key}", tensors)
        state = {"settings": self.settings, "step": step, "steps": steps, **weights, **values}
        state |= {"optimiser": optimiser.state_dict(), "scaler": scaler.state_dict()}
        state["seconds"] = time.perf_counter() - self.begin
        write_atomically(self.folder / name, lambda path: torch.save(state, path))

    def resume(self, name: str, optimiser, scaler, modules: dict[str, nn.Module], stage: str) -> int:
        """Load a checkpoint, if there is one, and return its step; 0 if there is none.

        Lines of log.jsonl after that step are removed, because those steps are repeated.
        """
        path, step, seconds = self.folder / name, 0, 0.0
        if on_rank_0(path.exists):
            state = read_checkpoint(path)
            load_parts(path, state, **modules)
            optimiser.load_state_dict(state["optimiser"])
            scaler.load_state_dict(state["scaler"])
            step, seconds = state["step"], state["seconds"]
            if self.rank == 0:
                what = "already finished" if step == state["steps"] else f"continues after step {step}"
                print(f"{path}: {what}", flush=True)
        log = self.folder / "log.jsonl"
        if self.rank == 0 and log.exists():
            lines = log.read_text().rpartition("\n")[0].splitlines()  # a kill can cut the last line
            kept = [line for line in lines if (v := json.loads(line))["stage"] != stage or v["step"] <= step]
            write_atomically(log, lambda part: part.write_text("".join(line + "\n" for line in kept)))
        self.begin = time.perf_counter() - seconds
        return step

    def log(self, **values) -> None:
        """Append a line to log.jsonl."""
        if self.rank == 0:
            with open(self.folder / "log.jsonl", "a") as file:
                file.write(json.dumps(values) + "\n")


def masks_of(place: str, fingerprint: str) -> Path:
    """The file that --target-masks names: a .npy file, or that of a run with a target of this fingerprint."""
    path = Path(place)
    if not path.is_dir():
        return path
    if read_json(path / "config.json")["facts"].get("target's data") != fingerprint:
        raise InputError(f"--target-masks {place}: the masks of this run belong to other target images")
    return path / "target_masks.npy"
