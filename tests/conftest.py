"""Fixtures and helpers of the tests that train: a tiny data set, and one run of each stage.

Every test finds the project's files, computes on one thread and draws the same numbers in any order.
"""

import json
import sys
from pathlib import Path

import pytest
import torch

pytest_plugins = ["publishers"]  # fixtures of the publishers' files
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
torch.set_num_threads(1)  # tiny tensors: a second thread costs more than it computes

import train_finetune  # noqa: E402
import train_pretrain  # noqa: E402
from support import rendering  # noqa: E402
from support import run as runs  # noqa: E402
from support.folder import HAND, write_folder  # noqa: E402

TINY = "--image 48 --width 16 --depth 2 --heads 2 --threads 1 --device cpu --precision float32".split()
TINY += "--log-every 2 --save-every 4".split()
DECODER = "--decoder-width 16 --decoder-heads 2 --batch 16".split()
SEGMENTATION = "--seg-channels 4 --seg-steps 6 --seg-batch 8".split()
HEAD = "--head-channels 8 --labels 24 --batch 8 --warmup 2 --validate-every 4".split()


@pytest.fixture(autouse=True)
def same_random_numbers():
    torch.manual_seed(0)


def passes_only(check, right, wrong: dict) -> None:
    """`check` must fail for every wrong variant by an AssertionError: a crash would prove nothing."""
    check(right)
    for name, variant in wrong.items():
        try:
            check(variant)
        except AssertionError:
            continue
        pytest.fail(f"not rejected: {name}")


def write_set(folder: Path, domain: str | None, count: int) -> None:
    """A data set of `count` rendered hands, or of X_C (domain None), 60 px."""
    rng = runs.random_generator(0, folder.name)
    arrays = {"images": rendering.render_unconstrained(rng, count, 60)}
    if domain:
        arrays = rendering.render("hands", rng, domain, count, 60)
    skeleton = {key: value for key, value in HAND.items() if key != "box"}
    write_folder(folder, {"name": folder.name, "margin": 1.25, **skeleton}, count, [arrays])


@pytest.fixture(scope="session")
def sets(tmp_path_factory) -> Path:
    """48 source, 40 target and 16 X_C images, and two test sets."""
    root = tmp_path_factory.mktemp("sets")
    write_set(root / "source", "source", 48)
    write_set(root / "target", "target", 40)
    write_set(root / "xc", None, 16)
    write_set(root / "source_test", "source", 12)
    write_set(root / "target_test", "target", 12)
    return root


def settings(script, *arguments: str):
    """The settings of a training script with these flags."""
    s = runs.parse_settings(script.Settings, "", script.PRESETS, script.VARIANTS, arguments, script.TASKS)
    script.complete(s, *([1] if script is train_pretrain else []))
    return s


def pretraining(sets: Path, out: Path, *more: str) -> list[str]:
    """Arguments of train_pretrain.py: 6 steps of f^S, 7 of the masked autoencoder."""
    folders = ["--source", f"{sets}/source", "--target", f"{sets}/target", "--unconstrained", f"{sets}/xc"]
    return [*TINY, *DECODER, *SEGMENTATION, *folders, "--epochs", "1.3", "--out", str(out), *more]


def finetuning(sets: Path, out: Path, init: Path | str, *more: str) -> list[str]:
    """Arguments of train_finetune.py: 6 steps."""
    folders = ["--source", f"{sets}/source", "--target", f"{sets}/target"]
    folders += ["--validation", f"{sets}/source_test"]
    return [*TINY, *HEAD, *folders, "--epochs", "2", "--out", str(out), "--init", str(init), *more]


def pretrain(sets: Path, out: Path, *more: str) -> None:
    train_pretrain.main(pretraining(sets, out, *more))


def finetune(sets: Path, out: Path, init: Path | str, *more: str) -> None:
    train_finetune.main(finetuning(sets, out, init, *more))


def interrupted(monkeypatch, lines: int, stage, *arguments) -> None:
    """Run a stage, with Ctrl-C after so many lines of the log."""
    write, left = runs.Run.log, iter(range(lines - 1, -1, -1))

    def counted(run, **values):
        write(run, **values)
        if next(left) == 0:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(runs.Run, "log", counted)
        stage(*arguments)


@pytest.fixture(scope="session")
def pretrained(sets, tmp_path_factory) -> Path:
    """A finished run of stage 1. Tests that write to it work on a copy."""
    run = tmp_path_factory.mktemp("runs") / "pretrained"
    pretrain(sets, run)
    return run


@pytest.fixture(scope="session")
def finetuned(sets, pretrained) -> Path:
    """A finished run of stage 2, from `pretrained`."""
    run = pretrained.parent / "finetuned"
    finetune(sets, run, pretrained)
    return run


def checkpoint(run: Path, name: str = "checkpoint.pt") -> dict:
    return runs.read_checkpoint(run / name)


def weights(run: Path) -> dict[str, torch.Tensor]:
    """All weights of a run."""
    state = checkpoint(run)
    parts = "encoder", "decoder", "head", "discriminator", "student_encoder", "student_head"
    return {f"{part}.{key}": tensor for part in parts for key, tensor in state.get(part, {}).items()}


def log(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def same(a: dict, b: dict) -> bool:
    """Whether all weights are bitwise equal."""
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def same_up_to_sums(a: dict, b: dict) -> bool:
    """Whether weights are equal up to the order of sums.

    The bias of a key cancels in the softmax. Its gradient is rounding noise, which Adam scales to full steps.
    """
    return all(torch.allclose(a[key], b[key], atol=2e-4) for key in a if not key.endswith("qkv.bias"))


def resumed(monkeypatch, folder: Path, lines: int, stage, sets: Path, *arguments) -> Path:
    """A run that is interrupted and continued. Fails unless it has the bits of an undisturbed one."""
    whole, run = folder / "whole", folder / "run"
    stage(sets, whole, *arguments)
    interrupted(monkeypatch, lines, stage, sets, run, *arguments)
    stage(sets, run, *arguments)
    assert same(weights(run), weights(whole)) and log(run) == log(whole)
    assert checkpoint(run)["scaler"] == checkpoint(whole)["scaler"]
    return run
