"""Runs that survive: the short form of tests/soak.py, and losses that are not finite."""
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import evaluate
import soak
import train_finetune
import train_pretrain
import udapose as u
from test_training import finetune, finetuned, plain_mae, pretrain, pretrained, sets, stop_after  # noqa: F401


# ==========================================================================================================
# Kills, peers, signals, disks: in processes forked from one that has only imported (see soak.py)
# ==========================================================================================================
@pytest.fixture(scope="module")
def soaked() -> dict:
    """What `soak.py --quick` found, part by part."""
    command = [sys.executable, str(Path(soak.__file__)), "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.stdout, done.stderr[-3000:]
    return {found["part"]: found for found in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("part", soak.QUICK)
def test_survives(soaked, part):
    """Each is explained by the docstring of its function in soak.py."""
    assert "BROKEN" not in soaked[part], soaked[part]["BROKEN"]


def test_kills_were_many_and_everywhere(soaked):
    found = soaked["kills"]
    assert found["kills"] >= soak.QUICK["kills"]
    for stage in soak.STAGES: assert found[stage]["runs continued and compared"] >= 1


# ==========================================================================================================
# Losses that are not finite
# ==========================================================================================================
def spoil(monkeypatch, name: str, row: int) -> None:
    """One image of the data set `name` comes out of the augmentation with a pixel that is no number."""
    crops = data.crops

    def spoiled(dataset, rows, *more):
        x, m, A = crops(dataset, rows, *more)
        if dataset.folder.name == name: x[np.flatnonzero(rows == row), 0, 0, 0] = torch.nan
        return x, m, A
    monkeypatch.setattr(data, "crops", spoiled)


@pytest.mark.parametrize("stage, name, term, file, order", [
    ("pretrain", "source", "L_seg", "segmentation.pt", (48, "segmentation order", 8)),
    ("pretrain", "target", "L_WMAE", "checkpoint.pt", (88, "pretraining order", 16)),
    ("finetune", "source", "L_kpt", "checkpoint.pt", (24, "finetuning order", 8)),
    ("finetune", "target", "L_attn", "checkpoint.pt", (40, "target order", 8))])
def test_an_image_whose_loss_is_not_finite(sets, pretrained, tmp_path, monkeypatch,  # noqa: F811
                                           stage, name, term, file, order):
    """The run stops at that very step and names it, the term and the image; the state before it is saved."""
    def run(out, *more):
        if stage == "finetune": return finetune(sets, out, str(pretrained), *more)
        return pretrain(sets, out, *(["--variant", "mae"] if term == "L_WMAE" else []), *more)
    (count, purpose, batch), step = order, 2
    row = max(data.batch_rows(count, 0, purpose, step, batch)) - 48 * (term == "L_WMAE")  # of the union
    with monkeypatch.context() as patch:
        stop_after(patch, step)
        assert run(tmp_path / "whole") == 130                              # where the other one has to stop
    spoil(monkeypatch, name, row)
    says = rf"^{term} is not finite for 1 images of {sets}/{name} \(rows {row}\) at step {step + 1};"
    for _ in range(2):                                                     # and once more, from there
        with pytest.raises(u.InputError, match=says): run(tmp_path / "run")
        ours, theirs = (soak.plain(u.read_checkpoint(tmp_path / place / file)) for place in ("run", "whole"))
        ours["settings"]["out"] = theirs["settings"]["out"]
        for state in (ours, theirs):                                       # a step's rate is set before it
            for group in state["optimiser"]["param_groups"]: del group["lr"]
        assert ours == theirs and ours["step"] == step


def test_a_gradient_that_is_not_finite(sets, tmp_path, monkeypatch):  # noqa: F811
    """A loss can be a number where its gradient is none: sqrt at 0. No weight ever becomes one."""
    loss = u.weighted_mae_loss
    monkeypatch.setattr(u, "weighted_mae_loss", lambda x, *more: loss(x, *more) + (0 * x.sum()).sqrt())
    with pytest.raises(u.InputError, match="the gradient is not finite.* at step 1; the checkpoint holds"):
        train_pretrain.main(plain_mae(sets) + ["--out", str(tmp_path), "--epochs", "1"])
    state = u.read_checkpoint(tmp_path / "checkpoint.pt")
    assert state["step"] == 0 and all(t.isfinite().all() for t in state["encoder"].values())


@pytest.mark.parametrize("fault", ["value", "float16", "gradient"])
def test_on_a_gpu_nothing_changes_until_the_flag_is_read(fault):
    """The steps of a GPU, where `check` comes later: here by a guard that does not look at each step."""
    net = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    optimiser, sums, saved = torch.optim.AdamW(net.parameters(), fused=True), torch.zeros(2), []
    scaler = torch.amp.GradScaler("cpu", enabled=fault == "float16", init_scale=2.0)
    state = lambda: soak.plain([net.state_dict(), optimiser.state_dict(), sums, scaler.get_scale()])  # noqa: E731
    guard = u.Guard(optimiser, scaler, net, sums, saved.append, lambda step: [
        ("L", torch.tensor(value), data_set, i) for i, value in enumerate((1.0, torch.nan, torch.inf))])
    data_set = type("DataSet", (), {"folder": "set"})
    check, guard.check, states = guard.check, lambda: None, []
    for step in range(6):
        guard.start()
        states.append(state())
        loss = net(torch.randn(4, 3) if step != 3 or fault == "gradient" else torch.full((4, 3), torch.nan))
        loss = loss.square().mean() + ((0 * loss.sum()).sqrt() if step == 3 else 0)
        scaler.scale(loss).backward()
        sums += torch.stack([loss.detach(), torch.ones(())])
        guard.step(step, sums)
        if step == 1: sums.zero_(), check()                                # where the loop logs: nothing yet
    assert states[1] != states[2] != states[3]
    with pytest.raises(u.InputError, match=r"^L is not finite for 2 .* \(rows 1, 2\) at step 4;"): check()
    assert saved == [3] and state() == states[3]


def test_a_float16_gradient_that_is_never_finite():
    """The scaler skips the step and halves its scale each time: not to the end, without a word."""
    net, sums, saved = torch.nn.Linear(3, 3), torch.zeros(2), []
    optimiser, scaler = torch.optim.AdamW(net.parameters(), fused=True), torch.amp.GradScaler("cpu")
    data_set = type("DataSet", (), {"folder": "set"})
    guard = u.Guard(optimiser, scaler, net, sums, saved.append, lambda step: [("L", sums[0], data_set, 0)])
    with pytest.raises(u.InputError, match="gradient is not finite, though L of each image is, at step 27;"):
        for step in range(99):
            guard.start()
            loss = net(torch.randn(4, 3)).square().mean()
            loss = loss + (0 * loss.sum()).sqrt()                          # a gradient of 0 / 0
            scaler.scale(loss).backward()
            sums += torch.stack([loss.detach(), torch.ones(())])
            guard.step(step, sums)
    assert saved == [26] and sums[1] == 26 and scaler.get_scale() == 2.0 ** (16 - 26)


def test_two_words_for_many_images():
    losses = [("L", "a", row, False) for row in range(40)] + [("M", "b", 3, True), ("M", "c", 4, False)]
    assert u.blame(losses) == ("L is not finite for 40 images of a (rows 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, "
                               "11, 12, 13, 14, 15, ..), M is not finite for 1 images of c (rows 4)")


# ==========================================================================================================
# A run's own files, damaged: the command that made them, and evaluate.py, say which
# ==========================================================================================================
OWN = {"half": lambda b: b[:len(b) // 2], "empty": lambda b: b"", "a list": lambda b: b"[1, 2]\n",
       "a bit": lambda b: b[:len(b) // 3] + bytes([b[len(b) // 3] ^ 0x55]) + b[len(b) // 3 + 1:],
       "not text": lambda b: b"\xff\xfe" + b, "a word": lambda b: b'{"kind": "finetuning"}\n'}


@pytest.mark.parametrize("name, which", [  # file; commands that read it: measure, --table, pretrain
    ("config.json", (2,)), ("log.jsonl", (0, 2)), ("segmentation.pt", (0,)), ("target_masks.npy", (2,)),
    ("checkpoint.pt", (0, 2)), ("result.json", (0, 1))])
def test_damaged_files_of_a_run(sets, pretrained, tmp_path, name, which):  # noqa: F811
    def measure(*more):
        pictures = f"{tmp_path}/pictures" if name == "log.jsonl" else "none"
        return evaluate.main([f"{tmp_path}/run", "--source-test", f"{sets}/source_test", "--target-test",
                              f"{sets}/target_test", "--pictures", pictures, "--device", "cpu", *more])
    for kind, change in OWN.items():
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.copytree(pretrained, tmp_path / "run")
        commands = [measure, lambda: measure("--table"), lambda: pretrain(sets, tmp_path / "run")]
        if name == "result.json": measure()
        path = tmp_path / "run" / name
        path.write_bytes(change(path.read_bytes()))
        damaged, said = path.read_bytes(), 0
        for i in which:
            try: commands[i]()
            except u.InputError as error: said += name in str(error) and path.read_bytes() == damaged
        # a log's half ends as a kill may leave it; without a checksum, a bit in a text or in masks may pass
        a_bit = kind == "a bit" and not name.endswith(".pt")
        assert said or a_bit or (name, kind) in {("log.jsonl", "half"), ("log.jsonl", "empty")}


def test_a_damaged_record_of_a_conversion(tmp_path):
    for change in OWN.values():
        writer = data.Writer(tmp_path / "set", {"name": "set"})
        writer.append({"images": np.zeros((3, 8, 8, 3), np.uint8)})
        writer.save()
        path = tmp_path / "set.part/state.json"
        path.write_bytes(change(path.read_bytes()))
        del writer
        with pytest.raises(u.InputError, match="set.part"):
            data.Writer(tmp_path / "set", {"name": "set"}).finish()
        shutil.rmtree(tmp_path / "set.part", ignore_errors=True)


# ==========================================================================================================
# Folders and settings
# ==========================================================================================================
def test_a_checkpoint_of_another_kind_is_refused(sets, pretrained, finetuned, tmp_path):  # noqa: F811
    """f^E's keys fit, the optimiser's do not: one line, no traceback."""
    run = u.Run(str(tmp_path), train_finetune.Settings(), {}, 0)
    encoder = u.Encoder((48, 48), 8, 16, 2, 2)
    (tmp_path / "checkpoint.pt").write_bytes((pretrained / "checkpoint.pt").read_bytes())
    optimiser = torch.optim.AdamW(encoder.parameters())
    with pytest.raises(u.InputError, match="checkpoint.pt: not what it should be"):
        run.resume("checkpoint.pt", optimiser, {"encoder": encoder})


def test_other_numbers_of_processes(tmp_path, capsys):
    """Free where it changes no more than the order of sums; then the threads of a process are free, too."""
    def claim(world, folder="a", **more):
        run = u.Run(str(tmp_path / folder), train_pretrain.Settings(), {"world": world}, 0, **more)
        run.lock.close()
    for folder in ("a", "b"):
        claim(1, folder)
        (tmp_path / folder / "checkpoint.pt").touch()
    claim(1, elastic=True)
    assert "goes on" not in capsys.readouterr().out
    claim(2, elastic=True)
    assert "begun with 1 processes, goes on with 2" in capsys.readouterr().out
    with pytest.raises(u.InputError, match="world: 1 there, 2 now"): claim(2, "b")
    config = json.loads((tmp_path / "a/config.json").read_text())
    config["facts"]["threads"] = 99
    (tmp_path / "a/config.json").write_text(json.dumps(config))
    claim(2, elastic=True)
    with pytest.raises(u.InputError, match="threads: 99 there"): claim(1, elastic=True)


def test_one_writer_to_a_data_set(tmp_path):
    """Two trainings that are started at once would both render the benchmark."""
    meta = {"name": "", "joints": [], "bones": [], "root": 0, "depth_range": 1}
    rows = {"images": np.zeros((2, 5, 5, 3), np.uint8)}
    first = data.Writer(tmp_path / "set", meta)
    first.append(rows)
    with pytest.raises(u.InputError, match="set.part: another process writes it"):
        data.Writer(tmp_path / "set", meta)
    first.save(), first.close()
    second = data.Writer(tmp_path / "set", meta)
    second.append(rows), second.finish()
    assert len(data.Dataset(tmp_path / "set")) == 4
    names = {path.name for path in (tmp_path / "set").iterdir()}
    assert names == {"images.npy", "checksums.npy", "meta.json"}


def test_no_room_for_what_is_printed(capfd, monkeypatch):
    """One line, and no second complaint of Python's at the end."""
    ended = []
    monkeypatch.setattr(u.os, "_exit", ended.append)
    def main(): raise OSError(28, "No space left on device")
    u.run_script(main)
    assert ended == [2] and capfd.readouterr().err == "error: standard output: No space left on device\n"


def test_deterministic_setting(sets, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")                 # the user's own stays
    try:
        assert pretrain(sets, tmp_path, "--deterministic") == 0
        assert torch.are_deterministic_algorithms_enabled()
        assert not u.wants_compile("auto", torch.device("cuda"), 10 ** 6)
        assert finetune(sets, tmp_path / "b", str(tmp_path), "--deterministic") == 0
    finally: torch.use_deterministic_algorithms(False)


def test_a_peer_that_is_gone_is_not_reported_as_a_full_disk(sets, tmp_path, monkeypatch):  # noqa: F811
    def lost(): raise RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer")
    monkeypatch.setattr(u, "wait_for_all", lost)
    with pytest.raises(RuntimeError, match="^.../gloo"): pretrain(sets, tmp_path)


def test_a_peer_is_told_from_other_errors(monkeypatch):
    lost = RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1")
    assert not u.peer_is_gone(lost)                                        # one process has no peer
    monkeypatch.setattr(u, "distributed", lambda: True)
    assert u.peer_is_gone(lost) and u.peer_is_gone(torch.distributed.DistBackendError("NCCL error"))
    assert not u.peer_is_gone(RuntimeError("shapes do not fit"))
