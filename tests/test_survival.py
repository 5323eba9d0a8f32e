"""Runs that are disturbed: the short form of tests/soak.py, and files of a run that were damaged."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import soak
from conftest import finetune, log, pretrain, same, weights

from support.run import InputError


# ==========================================================================================================
# Kills, signals, lost processes, full disks: in processes forked from one that has only imported (soak.py)
# ==========================================================================================================
@pytest.fixture(scope="module")
def soaked() -> dict:
    """What `soak.py --quick` found, part by part."""
    command = [sys.executable, str(Path(soak.__file__)), "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.stdout, done.stderr[-3000:]
    return {found["part"]: found for found in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("part", soak.PARTS)
def test_survives(soaked, part):
    """Each part is explained by the docstring of its function in soak.py."""
    assert "BROKEN" not in soaked[part], soaked[part]["BROKEN"]


def test_kills_were_real(soaked):
    assert soaked["kills"]["kills"] >= 5 and soaked["disk"]["refused"] >= 8


# ==========================================================================================================
# A run's own files, damaged: the command that made them says which. A log may lose its last line.
# ==========================================================================================================
DAMAGE = {
    "half": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "another type": lambda content: b"[1, 2]\n",
    "the middle": lambda content: (
        content[: len(content) // 3] + b"\xff" * 500 + content[len(content) // 3 + 500 :]
    ),
    "HTML": lambda content: b"<html>404</html>" * 100,
}


@pytest.mark.parametrize("name", ["config.json", "segmentation.pt", "checkpoint.pt", "target_masks.npy"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_of_a_run_are_named(sets, pretrained, tmp_path, name, damage):
    run = tmp_path / "run"
    shutil.copytree(pretrained, run)
    damaged = DAMAGE[damage]((run / name).read_bytes())
    (run / name).write_bytes(damaged)
    with pytest.raises(InputError, match=name) as error:
        pretrain(sets, run)
    assert "\n" not in str(error.value) and str(run) in str(error.value)
    assert (run / name).read_bytes() == damaged  # the script removes nothing of yours


@pytest.mark.parametrize("damage", ["half", "empty"])
def test_a_log_that_was_cut_does_not_stop_a_run(sets, pretrained, tmp_path, damage):
    run = tmp_path / "run"
    shutil.copytree(pretrained, run)
    (run / "log.jsonl").write_bytes(DAMAGE[damage]((run / "log.jsonl").read_bytes()))
    pretrain(sets, run)
    assert same(weights(run), weights(pretrained))
    lines = log(pretrained)
    assert log(run) == lines[: len(log(run))]


def test_a_checkpoint_of_the_other_stage_is_refused(sets, pretrained, finetuned, tmp_path):
    """The keys of f^E fit, those of the other modules do not."""
    run = tmp_path / "run"
    shutil.copytree(finetuned, run)
    shutil.copy(pretrained / "checkpoint.pt", run)
    with pytest.raises(InputError, match="run/checkpoint.pt: made with other settings"):
        finetune(sets, run, pretrained)
