"""Runs that are disturbed: the short form of tests/soak.py, and files of a run that were damaged."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import soak
from conftest import log, pretrain, same, weights


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
    assert soaked["kills"]["kills"] >= 5


def test_a_log_that_was_cut_does_not_stop_a_run(sets, pretrained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(pretrained, run)
    content = (run / "log.jsonl").read_bytes()
    (run / "log.jsonl").write_bytes(content[: len(content) // 2])
    pretrain(sets, run)
    assert same(weights(run), weights(pretrained))
    lines = log(pretrained)
    assert log(run) == lines[: len(log(run))]
