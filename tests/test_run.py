"""support/run.py: processes, precision, randomness, settings, files, run folders, one-line errors."""

import contextlib
import dataclasses
import json
import os
import re
import resource
import signal
import subprocess
import sys
import types
import zipfile

import numpy as np
import pytest
import torch
from conftest import ROOT, passes_only

from support import run as runs
from support.run import InputError

CPU = torch.device("cpu")


# ==========================================================================================================
# Randomness and shares of a batch
# ==========================================================================================================
def check_generator(function):
    """The same numbers for the same (seed, purpose, step) in any order of calls; others for all others."""
    purposes = ("order", "noise", "esion")  # one length; two have the same letters
    keys = [(seed, purpose, step) for seed in range(4) for purpose in purposes for step in range(4)]
    draws = {key: function(*key).random(8).tolist() for key in keys}
    for key in reversed(keys):
        assert function(*key).random(8).tolist() == draws[key]
    firsts = [x for draw in draws.values() for x in draw]
    assert len(set(firsts)) == len(firsts), "two streams share numbers"


WRONG_GENERATORS = {
    "a sum: seed 1 is seed 0 one step on": lambda s, p, i: np.random.default_rng(s + i + len(p)),
    "purposes of one length alike": lambda s, p, i: np.random.default_rng([s, len(p), i]),
    "no step": lambda s, p, i: np.random.default_rng([s, ord(p[0])]),
    "no seed": lambda s, p, i: np.random.default_rng(),
}


def test_random_generator():
    passes_only(check_generator, runs.random_generator, WRONG_GENERATORS)


def test_micro_batches_by_hand():
    assert runs.micro_batches(8, 2, 1, 2) == [slice(4, 6), slice(6, 8)]
    assert runs.micro_batches(8, 0, 1, 2) == [slice(4, 8)]  # 0: all of them at once
    assert runs.micro_batches(8, 100, 0, 4) == [slice(0, 2)]
    for batch, micro, world, says in (
        (10, 0, 4, "^--batch 10 .* 4 processes$"),
        (8, 3, 2, "^--micro-batch 3 .* 4 images"),
    ):
        with pytest.raises(InputError, match=says):
            runs.micro_batches(batch, micro, 0, world)


# ==========================================================================================================
# Processes and precision
# ==========================================================================================================
def test_one_process_on_the_cpu(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert runs.setup_distributed("cpu") == (0, 1, CPU)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert runs.setup_distributed("auto") == (0, 1, CPU)
    with pytest.raises(InputError, match="no CUDA device"):
        runs.setup_distributed("cuda")
    assert runs.mean_over_processes(torch.tensor([3.0])).tolist() == [3]


def test_a_process_takes_its_gpu_before_the_processes_meet(monkeypatch):
    order = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda gpu: order.append(f"device {gpu}"))
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, **_: order.append(backend))
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(InputError, match="LOCAL_RANK is not: start processes with torchrun$"):
        runs.setup_distributed("cuda")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert runs.setup_distributed("cuda")[2] == torch.device("cuda", 1)
    assert order == ["device 1", "cpu:gloo,cuda:nccl"]


def test_precision_follows_the_hardware(monkeypatch):
    for avx, amx, chosen in ((True, False, "bfloat16"), (False, True, "bfloat16"), (False, False, "float32")):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has=avx: has, raising=False)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda has=amx: has, raising=False)
        assert runs.choose_dtype("auto", CPU) == getattr(torch, chosen)
        assert runs.choose_dtype("float16", CPU) == torch.float16
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.delattr(torch.cpu, name)  # as in an older torch
    assert runs.choose_dtype("auto", CPU) == torch.float32
    for has, chosen in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, has=has: has)
        assert runs.choose_dtype("auto", torch.device("cuda")) == chosen


def test_autocast_only_below_float32_and_without_its_cache():
    for dtype in (torch.float32, torch.bfloat16):
        with runs.autocast(CPU, dtype):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
            assert dtype == torch.float32 or not torch.is_autocast_cache_enabled()


def test_configure_torch(monkeypatch):
    """Float32 is not rounded to fewer digits; --deterministic keeps a user's own workspace."""
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("high")
    runs.configure_torch()
    assert torch.get_float32_matmul_precision() == "highest" and not torch.backends.cudnn.allow_tf32
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    try:
        runs.configure_torch(1, deterministic=True)
        assert torch.are_deterministic_algorithms_enabled() and torch.get_num_threads() == 1
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
        assert not torch.utils.deterministic.fill_uninitialized_memory
    finally:
        torch.use_deterministic_algorithms(False)


# ==========================================================================================================
# Settings
# ==========================================================================================================
@dataclasses.dataclass
class Settings:
    preset: str = "tiny"  # sizes
    task: str = "hand"  # which benchmark
    variant: str = "full"  # row of the table
    out: str = ""  # run folder
    width: int = runs.setting(8, above=0, high=64)  # width of f^E, 100 % of it (Table 5)
    lr: float = runs.setting(1e-3, low=0)  # learning rate (paper Sec. 7)
    share: float = runs.setting(0.5, above=0, below=1)  # share
    kind: str = runs.setting("", choices=("", "a", "b"))  # which kind
    norm_pix: bool = False  # pixels normalised per patch
    precision: str = "float32"  # of products
    save_every: int = 10  # steps between checkpoints
    log_every: int = 5  # steps between lines of the log


PRESETS = {"tiny": {}, "large": {"width": 64, "lr": 5e-4}, "people": {"task": "human"}}
VARIANTS = {"full": {}, "slow": {"lr": 1e-5, "norm_pix": True}}
TASKS = {"hand": {}, "human": {"width": 16}}


def settings(*arguments):
    return runs.parse_settings(Settings, "what it does", PRESETS, VARIANTS, list(arguments), TASKS)


def test_settings_task_then_preset_then_variant_then_flags():
    assert settings() == Settings()
    large = settings("--preset", "large", "--task", "human")
    assert (large.preset, large.width, large.lr, large.task) == ("large", 64, 5e-4, "human")
    assert settings("--task", "human").width == settings("--preset", "people").width == 16
    both = settings("--variant", "slow", "--preset", "large")
    assert (both.width, both.lr, both.norm_pix) == (64, 1e-5, True)
    mine = settings("--preset", "large", "--variant", "slow", "--lr", "0.5", "--no-norm-pix", "--width", "3")
    assert (mine.width, mine.lr, mine.norm_pix, mine.variant) == (3, 0.5, False, "slow")
    assert settings("--lr", "1e-3", "--preset", "large").lr == 1e-3  # a flag that repeats the default
    with pytest.raises(InputError, match="^--task hand: preset people is for human$"):
        settings("--preset", "people", "--task", "hand")


@pytest.mark.parametrize("arguments", ["--unknown 1", "--preset huge", "--wid 3", "--kind c"])
def test_unknown_flags_and_choices_exit_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        settings(*arguments.split())
    assert stop.value.code == 2 and "error:" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, says",
    [
        ("--width 65", "--width 65: give a number above 0 and not above 64"),
        ("--lr -1", "--lr -1.0: give a number not below 0 and not above 1e+06"),
        ("--lr nan", "--lr nan: give a number not below 0 and not above 1e+06"),
        ("--lr inf", "--lr inf: give a number not below 0 and not above 1e+06"),
        ("--share 1", "--share 1.0: give a number above 0 and below 1"),
        ("--save-every 12", "--save-every 12: give a multiple of --log-every 5"),
    ],
)
def test_bounds_are_part_of_a_setting(arguments, says):
    with pytest.raises(InputError) as error:
        settings(*arguments.split())
    assert str(error.value) == says
    settings("--width", "64", "--lr", "0")  # the bounds themselves


def test_help_is_the_comment_after_the_field(capsys):
    with pytest.raises(SystemExit) as stop:
        settings("-h")
    text = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert stop.value.code == 0 and "what it does" in text
    for says in (
        "--width INT width of f^E, 100 % of it (Table 5) [8; large 64; human 16]",
        "--lr FLOAT learning rate (paper Sec. 7) [0.001; large 0.0005]",
        "--preset tiny|large|people sizes [tiny]",
        "--kind a|b which kind --",
        "--norm-pix, --no-norm-pix pixels normalised per patch [False]",
    ):
        assert says in text, says


# ==========================================================================================================
# How a script ends
# ==========================================================================================================
def raises(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    "main, code, says",
    [
        (lambda: None, 0, ""),
        (lambda: 3, 3, ""),
        (raises(InputError("a.npy: truncated")), 2, "error: a.npy: truncated\n"),
        (raises(KeyboardInterrupt()), 130, "stopped; the same command continues from the last checkpoint\n"),
        (
            lambda: signal.raise_signal(signal.SIGTERM),
            143,
            "stopped; the same command continues from the last",
        ),
        (
            raises(torch.OutOfMemoryError("CUDA out of memory.\nmore")),
            2,
            "error: the GPU is out of memory (CUDA out of",
        ),
        (raises(PermissionError(13, "denied", "x.npy")), 2, "error: [Errno 13] denied: 'x.npy'\n"),
    ],
)
def test_a_script_ends_in_one_line(main, code, says, capsys, monkeypatch):
    handler, ended = signal.getsignal(signal.SIGTERM), []
    monkeypatch.setattr(sys, "exit", lambda status: ended.append(status) or raises(SystemExit(status))())
    monkeypatch.setattr(os, "_exit", ended.append)
    try:
        with contextlib.suppress(SystemExit):
            runs.run_script(main)
    finally:
        signal.signal(signal.SIGTERM, handler)
    err = capsys.readouterr().err
    assert ended[-1] == code and err.startswith(says) and err.count("\n") == bool(says)


def test_a_bug_of_ours_keeps_its_traceback():
    with pytest.raises(ValueError):
        runs.run_script(raises(ValueError("a bug")))


def test_no_room_for_what_is_printed():
    """One line, and no second complaint of Python's at the end."""
    code = "from support import run\nrun.run_script(lambda: print('x'))"
    buffered = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=buffered)
    assert done.stderr == "error: [Errno 28] No space left on device\n" and done.returncode == 2


# ==========================================================================================================
# Files
# ==========================================================================================================
@contextlib.contextmanager
def small_disk():
    """No file may grow beyond 20,000 bytes, which is what a full disk does to a writer in mid-file."""
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("values", [3_000, 5_100, 100_000])  # the limit is met by different writes
def test_a_full_disk_keeps_the_old_checkpoint(tmp_path, values):
    path, large = tmp_path / "checkpoint.pt", torch.randn(values, dtype=torch.float64)
    with small_disk(), pytest.raises(InputError, match="checkpoint.pt: could not .*; nothing was saved$"):
        runs.write_atomically(path, lambda part: torch.save({"w": large}, part))
    assert list(tmp_path.iterdir()) == []
    runs.write_atomically(path, lambda part: torch.save({"w": large[:10]}, part))
    old = path.read_bytes()
    with small_disk(), pytest.raises(InputError, match="the previous one is intact$") as error:
        runs.write_atomically(path, lambda part: torch.save({"w": large}, part))
    assert "\n" not in str(error.value) and path.read_bytes() == old and list(tmp_path.iterdir()) == [path]


def test_a_file_is_on_the_disk_before_it_takes_the_name(tmp_path, monkeypatch):
    order, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: order.append("sync") or fsync(file))
    monkeypatch.setattr(os, "replace", lambda a, b: order.append("rename") or replace(a, b))
    runs.write_json(tmp_path / "a.json", [1])
    assert order == ["sync", "rename"] and runs.read_json(tmp_path / "a.json") == [1]


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"\x80\x04.", b"PK\x03\x04 and no more"])
def test_garbage_is_no_checkpoint(tmp_path, content):
    (tmp_path / "c.pt").write_bytes(content)
    with pytest.raises(InputError, match="c.pt: not a readable checkpoint") as error:
        runs.read_checkpoint(tmp_path / "c.pt")
    assert "\n" not in str(error.value)


def test_checkpoints_that_are_not_plain_whole_and_ours_are_refused(tmp_path):
    path = tmp_path / "c.pt"
    with pytest.raises(InputError, match="c.pt: no such checkpoint"):
        runs.read_checkpoint(path)
    for state in ({"model": {}}, [1], torch.ones(2), {"settings": {}}, {"settings": 3, "step": 1}):
        torch.save(state, path)
        with pytest.raises(InputError, match="c.pt: not a checkpoint of this project"):
            runs.read_checkpoint(path)
    state = {"settings": {}, "step": 1, "w": torch.ones(1000)}
    torch.save(state | {"path": types.SimpleNamespace()}, path)  # an object of another class
    with pytest.raises(InputError, match="not a readable checkpoint"):
        runs.read_checkpoint(path)
    torch.save(state, path)
    assert torch.equal(runs.read_checkpoint(path)["w"], state["w"])
    with (
        zipfile.ZipFile(path) as plain,
        zipfile.ZipFile(tmp_path / "z.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    with pytest.raises(InputError, match="z.pt: .*its parts are compressed"):
        runs.read_checkpoint(tmp_path / "z.pt")


def part(width):
    return torch.nn.Sequential(torch.nn.Linear(width, 2), torch.nn.BatchNorm1d(2))


@pytest.mark.parametrize(
    "state, says",
    [
        ({"decoder": {}}, "c.pt: contains no encoder"),
        ({"encoder": part(4).state_dict()}, "another architecture: encoder: size mismatch for 0.weight: "),
        ({"encoder": part(3)[:1].state_dict()}, 'encoder: Missing key.*"1.weight"'),
        ({"encoder": part(3).state_dict() | {"2.g": torch.ones(5)}}, 'encoder: Unexpected key.*"2.g"'),
    ],
)
def test_load_parts_names_the_key(state, says):
    with pytest.raises(InputError, match=says):
        runs.load_parts("c.pt", state, encoder=part(3))


# ==========================================================================================================
# Run folders
# ==========================================================================================================
class Stage:
    """A small model in training, and its run folder."""

    def __init__(self, folder, rank=0, facts=None, **changes):
        self.run = runs.Run(str(folder), Settings(**changes), facts or {"n": 5}, rank, CPU)
        self.net = part(3)
        self.optimiser = torch.optim.AdamW(self.net.parameters(), lr=0.1, fused=True)
        self.scaler = torch.amp.GradScaler("cpu", enabled=changes.get("precision") == "float16")

    def train(self):
        self.scaler.scale(self.net(torch.randn(4, 3)).square().sum()).backward()
        self.scaler.step(self.optimiser)
        self.scaler.update()
        return self

    def save(self, step=2, **values):
        self.run.save("checkpoint.pt", step, 9, self.optimiser, self.scaler, {"net": self.net}, **values)
        return self

    def resume(self):
        return self.run.resume("checkpoint.pt", self.optimiser, self.scaler, {"net": self.net}, "a")

    def close(self):
        """As when the process ends."""
        self.run.lock.close()


def test_a_run_writes_its_settings_and_is_taken_up_again(tmp_path):
    first = Stage(tmp_path / "deep" / "a").train().save()
    config = json.loads((tmp_path / "deep" / "a" / "config.json").read_text())
    assert config["settings"] == dataclasses.asdict(Settings()) and config["precision"] == "float32"
    assert config["facts"]["n"] == 5 and config["facts"]["torch"] == torch.__version__
    assert config["facts"]["threads"] == 1
    with pytest.raises(InputError, match="another process writes here"):
        Stage(tmp_path / "deep" / "a")
    first.close()
    assert Stage(tmp_path / "deep" / "a").run.config == config


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"facts": {"n": 6}}, "n: 5 there, 6 now"),
        ({"lr": 2e-3, "norm_pix": True}, "lr: 0.001 there, 0.002 now; norm_pix: False there, True now"),
    ],
)
def test_other_settings_are_refused_with_the_difference(tmp_path, changes, says):
    Stage(tmp_path).save().close()
    with pytest.raises(InputError, match="made with other settings") as error:
        Stage(tmp_path, **changes)
    assert says in str(error.value) and str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_other_settings_begin_anew_while_nothing_is_saved(tmp_path):
    """As after the advice of a full GPU at the first step: another --micro-batch, in the same folder."""
    Stage(tmp_path).close()
    again = Stage(tmp_path, norm_pix=True)
    assert json.loads((tmp_path / "config.json").read_text())["settings"]["norm_pix"] is True
    again.save().close()
    Stage(tmp_path, norm_pix=True, save_every=99, out="elsewhere")  # these change no result


def test_resume_restores_everything_and_cuts_the_log(tmp_path):
    """Steps after the checkpoint are repeated and logged again; those of another stage stay.

    A kill can cut the last line.
    """
    first = Stage(tmp_path, precision="float16")
    assert first.resume() == 0
    first.run.log(stage="segmentation", step=99)
    for step in (1, 2, 3):
        first.train().run.log(stage="a", step=step)
        if step == 2:
            first.scaler.update(32.0)
            first.save()
            kept = {key: tensor.clone() for key, tensor in first.net.state_dict().items()}
            moment = first.optimiser.state_dict()["state"][0]["exp_avg_sq"].clone()
            scale = first.scaler.get_scale()
    first.close()
    (tmp_path / "log.jsonl").write_text((tmp_path / "log.jsonl").read_text() + '{"stage": "a", "st')
    again = Stage(tmp_path, precision="float16")
    assert again.resume() == 2
    assert all(torch.equal(again.net.state_dict()[key], tensor) for key, tensor in kept.items())
    assert torch.equal(again.optimiser.state_dict()["state"][0]["exp_avg_sq"], moment) and moment.any()
    assert again.scaler.get_scale() == scale
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["step"]) for line in lines] == [("segmentation", 99), ("a", 1), ("a", 2)]
    again.train()


@pytest.mark.parametrize("key", ["0.weight", "1.running_var"])
def test_saving_refuses_weights_and_statistics_that_are_not_finite(tmp_path, key):
    stage = Stage(tmp_path).train().save(step=2)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    stage.net.state_dict()[key].view(-1)[0] = torch.nan
    with pytest.raises(InputError, match=f"^step 9: not saved, the last checkpoint is intact: net.{key} has"):
        stage.save(step=9)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_losses_are_averaged_and_one_that_is_not_finite_is_named():
    window = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 6.0])]
    assert runs.mean_losses(window, 8, "a", "b") == {"a": 2.0, "b": 4.0}
    window.insert(1, torch.tensor([0.0, torch.inf]))
    with pytest.raises(InputError, match="^b is inf at step 7; the last checkpoint is intact"):
        runs.mean_losses(window, 8, "a", "b")


def test_a_folder_that_cannot_be_made_and_a_log_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OSError, match="file"):
            Stage(folder)
    stage = Stage(tmp_path / "run")
    (tmp_path / "run/log.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        stage.run.log(stage="a", step=1)


def test_another_machine_torch_or_thread_count_is_said_and_may_continue(tmp_path, capsys):
    Stage(tmp_path).save().close()
    Stage(tmp_path).close()
    assert "not bit for bit" not in capsys.readouterr().out
    config = json.loads((tmp_path / "config.json").read_text())
    config["facts"] |= {"machine": "a GPU", "threads": 99}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert Stage(tmp_path).resume() == 2
    out = capsys.readouterr().out
    assert f"machine: a GPU there, {runs.machine(CPU)} now: the run continues, but not bit for bit" in out
    assert "threads: 99 there, 1 now" in out


def test_progress_line(monkeypatch, capsys):
    clock = [100.0]
    monkeypatch.setattr(runs, "time", types.SimpleNamespace(perf_counter=lambda: clock[0]))
    progress = runs.Progress("MAE", 100, images=32, start=10)
    clock[0] = 105.0
    progress.show(15, {"loss": 1.0})  # too early for a line
    clock[0] = 120.0
    progress.show(30, {"loss": 0.25})
    assert capsys.readouterr().out == "MAE: 30/100 steps | loss 0.25 | 32 images/s | 1:10 left\n"
