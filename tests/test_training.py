"""The two training scripts on a tiny data set: resume, processes, variants, what is not opened, refusals."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
import evaluate
import train_finetune
import train_pretrain
import udapose as u

ROOT = Path(__file__).parent.parent
SMALL = ["--width", "16", "--depth", "2", "--heads", "2", "--threads", "1", "--device", "cpu",
         "--precision", "float32", "--log-every", "2", "--save-every", "3"]


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> Path:
    """Folders as of the embedded benchmark: 48 source, 40 target, 16 X_C images and two test sets, 60 px."""
    root = tmp_path_factory.mktemp("sets")
    for name, domain, count in (("source", "source", 48), ("target", "target", 40), ("xc", None, 16),
                                ("source_test", "source", 12), ("target_test", "target", 12)):
        rng = u.random_generator(0, name)
        arrays = data.render("hands", rng, domain, count, 60) if domain else \
            {"images": data.render_unconstrained(rng, count, 60)}
        writer = data.Writer(root / name, {"name": name, "margin": 1.25, "joints": data.HAND_JOINTS,
                                           "bones": data.HAND_BONES, "root": 0, "depth_range": 300.0})
        writer.append(arrays)
        writer.finish()
    return root


def pretrain(sets: Path, run: Path, *more: str) -> int:
    return train_pretrain.main(SMALL + [
        "--source", f"{sets}/source", "--target", f"{sets}/target", "--unconstrained", f"{sets}/xc",
        "--out", str(run), "--decoder-width", "16", "--decoder-heads", "2", "--seg-channels", "4",
        "--seg-steps", "4", "--seg-batch", "8", "--batch", "16", "--epochs", "1.3", *more])


def plain_mae(sets: Path) -> list[str]:
    """Arguments of a pre-training without f^S."""
    return SMALL + ["--source", f"{sets}/source", "--target", f"{sets}/target", "--variant", "mae",
                    "--decoder-width", "16", "--decoder-heads", "2", "--batch", "16"]


def finetune(sets: Path, run: Path, init: str, *more: str) -> int:
    return train_finetune.main(SMALL + [
        "--source", f"{sets}/source", "--target", f"{sets}/target", "--validation", f"{sets}/source_test",
        "--out", str(run), "--init", init, "--head-channels", "8", "--labels", "24", "--batch", "8",
        "--epochs", "2", "--warmup", "2", "--validate-every", "4", *more])


@pytest.fixture(scope="module")
def pretrained(sets, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "pretrained"
    assert pretrain(sets, run) == 0
    return run


@pytest.fixture(scope="module")
def finetuned(sets, pretrained) -> Path:
    run = pretrained.parent / "finetuned"
    assert finetune(sets, run, str(pretrained)) == 0
    return run


def weights(run: Path, *parts: str) -> dict:
    state = u.read_checkpoint(run / "checkpoint.pt")
    return {f"{part}.{k}": t for part in parts for k, t in state[part].items()}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def same_but_for_sums(a: dict, b: dict) -> bool:
    """Equal up to the order of sums. A key's bias cancels in the softmax, so its gradient is rounding noise
    alone, which Adam scales to full steps: it is left out."""
    return all(torch.allclose(a[k], b[k], atol=2e-4) for k in a if not k.endswith("qkv.bias"))


def stop_after(monkeypatch, steps: int) -> None:
    """As Ctrl-C would, once `steps` steps are done: the loop saves and main returns 130."""
    calls = iter(range(10 ** 6))
    monkeypatch.setattr(u.StopSignal, "requested", lambda self: next(calls) + 1 >= steps)


def test_pretraining_resumes_bitwise(sets, pretrained, tmp_path, monkeypatch, capsys):
    for steps in (2, 3, 4):  # inside f^S; between f^S and the masked autoencoder; inside the latter
        with monkeypatch.context() as patch:
            stop_after(patch, steps)
            assert pretrain(sets, tmp_path / "run") == 130
    capsys.readouterr()
    assert pretrain(sets, tmp_path / "run") == 0
    assert capsys.readouterr().out.count("run/checkpoint.pt: goes on after step") == 1   # f^S is done
    assert same(weights(tmp_path / "run", "encoder", "decoder"), weights(pretrained, "encoder", "decoder"))
    assert (tmp_path / "run/log.jsonl").read_text() == (pretrained / "log.jsonl").read_text()
    masks = [np.load(run / "target_masks.npy") for run in (tmp_path / "run", pretrained)]
    assert np.array_equal(*masks) and masks[0].shape == (40, 60, 60)


def test_images_smaller_than_the_networks_are_named(sets, tmp_path, capsys):
    """60 px with a margin of 1.25 are 48 px: enough for the preset's crop, not for one of 56 px."""
    assert finetune(sets, tmp_path / "a", "", "--variant", "scratch", "--epochs", "0.3") == 0
    assert "enlarged" not in capsys.readouterr().out
    assert finetune(sets, tmp_path / "b", "", "--variant", "scratch", "--epochs", "0.3", "--image", "56") == 0
    assert f"{sets}/source: crops of 48 px are enlarged to 56" in capsys.readouterr().out


def test_masks_of_fewer_images_than_processes(sets, tmp_path, monkeypatch):
    """A process that has no image to predict waits for the others; what they wrote stays."""
    monkeypatch.setattr(u, "mean_over_processes", lambda share: share)
    target, s = data.Dataset(sets / "target"), train_pretrain.Settings(image=48)
    (n, H), part = target.images.shape[:2], tmp_path / "target_masks.part.npy"
    np.save(part, np.full((n, H, H), 7, np.uint8))
    run, stop = SimpleNamespace(rank=n, folder=tmp_path), SimpleNamespace(requested=lambda: False)
    assert train_pretrain.predict_masks(s, u.UNet(4).eval(), target, tmp_path / "target_masks.npy", run, stop,
                                        n + 1, torch.device("cpu"), torch.float32)
    assert (np.load(part) == 7).all()


def test_finetuning_resumes_bitwise(sets, pretrained, finetuned, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        assert finetune(sets, tmp_path / "run", str(pretrained)) == 130
    assert finetune(sets, tmp_path / "run", str(pretrained)) == 0
    assert same(weights(tmp_path / "run", "encoder", "head"), weights(finetuned, "encoder", "head"))
    assert (tmp_path / "run/log.jsonl").read_text() == (finetuned / "log.jsonl").read_text()


def test_bfloat16_trains_and_measures(sets, pretrained, tmp_path):
    """Under autocast too, losses and geometry are in float32: bfloat16 rounds a pixel to a half."""
    assert pretrain(sets, tmp_path / "a", "--precision", "bfloat16") == 0
    assert finetune(sets, tmp_path / "b", str(tmp_path / "a"), "--precision", "bfloat16") == 0
    log = [json.loads(line) for line in (tmp_path / "b/log.jsonl").read_text().splitlines()]
    assert 5 < [r for r in log if "source_val_epe" in r][-1]["source_val_epe"] < 300


def test_float16_scales_its_gradients_and_resumes_bitwise(sets, tmp_path, monkeypatch):
    """Loss scaling belongs to the state of a run: without it a resumed run would start at 65536 again."""
    half = ["--precision", "float16", "--lam", "0"]
    assert finetune(sets, tmp_path / "whole", "", *half) == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        assert finetune(sets, tmp_path / "run", "", *half) == 130
    assert finetune(sets, tmp_path / "run", "", *half) == 0
    ours, theirs = (u.read_checkpoint(tmp_path / run / "checkpoint.pt") for run in ("run", "whole"))
    assert ours["scaler"] == theirs["scaler"] and ours["scaler"]["scale"] < 65536
    assert same(weights(tmp_path / "run", "encoder", "head"), weights(tmp_path / "whole", "encoder", "head"))


def test_checkpointing_changes_memory_alone(sets, pretrained, finetuned, tmp_path):
    kept, stored = [], torch.autograd.graph.saved_tensors_hooks
    encoder = u.Encoder((48, 48), 8, 16, 4, 2)
    for encoder.checkpointing in (False, True):
        kept.append(0)
        def keep(x): kept[-1] += x.numel(); return x
        with stored(keep, lambda x: x): encoder(torch.rand(2, 3, 48, 48)).sum().backward()
    assert kept[1] < kept[0] / 3
    finetune(sets, tmp_path / "run", str(pretrained), "--checkpointing")
    assert same(weights(tmp_path / "run", "encoder", "head"), weights(finetuned, "encoder", "head"))


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_pretraining_is_the_same(sets, tmp_path):
    base = plain_mae(sets) + ["--epochs", "0.5", "--compile"]
    for switch in ("on", "off"):
        assert train_pretrain.main(base + [switch, "--out", str(tmp_path / switch)]) == 0
    assert json.loads((tmp_path / "on/config.json").read_text())["compile"] is True
    one, two = (weights(tmp_path / run, "encoder", "decoder") for run in ("on", "off"))
    assert same_but_for_sums(one, two)


def test_seed_changes_everything_random(sets, finetuned, pretrained, tmp_path):
    finetune(sets, tmp_path / "run", str(pretrained), "--seed", "1")
    assert not same(weights(tmp_path / "run", "head"), weights(finetuned, "head"))


def test_target_labels_and_masks_are_never_opened(sets, pretrained, finetuned, tmp_path):
    bare = tmp_path / "target"
    bare.mkdir()
    for name in ("images.npy", "meta.json"): os.link(sets / "target" / name, bare / name)
    for name in ("keypoints.npy", "masks.npy", "intrinsics.npy"): (bare / name).write_text("not an array")
    pretrain(sets, tmp_path / "a", "--target", str(bare))
    finetune(sets, tmp_path / "b", str(tmp_path / "a"), "--target", str(bare))
    assert same(weights(tmp_path / "a", "encoder", "decoder"), weights(pretrained, "encoder", "decoder"))
    assert same(weights(tmp_path / "b", "encoder", "head"), weights(finetuned, "encoder", "head"))


def test_scratch_opens_no_target(sets, tmp_path):
    scratch = ["--variant", "scratch", "--lam", "0", "--target", "nowhere"]
    assert finetune(sets, tmp_path / "run", "", *scratch) == 0


def test_micro_batches_give_the_same_pretraining(sets, pretrained, tmp_path):
    pretrain(sets, tmp_path / "run", "--micro-batch", "4")
    ours, theirs = weights(tmp_path / "run", "encoder"), weights(pretrained, "encoder")
    assert same_but_for_sums(ours, theirs)
    assert not same(ours, theirs), "this test compares two different orders of summation"


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_micro_batches_are_prepared_one_by_one(sets, pretrained, tmp_path, monkeypatch, stage):
    """Not a whole step of them at once: a GPU holds those that are ready."""
    sizes, prefetch = [], data.prefetch

    def spy(batches, device): return prefetch((sizes.append(len(batch[0])) or batch for batch in batches), device)
    monkeypatch.setattr(data, "prefetch", spy)
    if stage == "pretrain": pretrain(sets, tmp_path, "--variant", "mae", "--micro-batch", "4")
    else: finetune(sets, tmp_path, str(pretrained), "--micro-batch", "4")
    assert sizes == {"pretrain": 7 * 4, "finetune": 6 * 2}[stage] * [4]


def torchrun(script: str, *arguments: str) -> str:
    """What the script prints on two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(ROOT / script), *arguments]
    traced = os.environ | {"PYTHONFAULTHANDLER": "1"}                      # where one aborts, say where
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=traced)
    assert done.returncode == 0, done.stderr[-9000:]
    return done.stdout


def test_two_processes_give_the_same_pretraining(sets, tmp_path):
    """torchrun with two processes; without f^S, whose BatchNorm sees one process's images only."""
    base = plain_mae(sets) + ["--epochs", "1"]
    torchrun("train_pretrain.py", *base, "--out", str(tmp_path / "two"))
    assert train_pretrain.main(base + ["--out", str(tmp_path / "one")]) == 0
    one, two = (weights(tmp_path / run, "encoder", "decoder") for run in ("one", "two"))
    assert same_but_for_sums(one, two)


def test_sigterm_saves_and_the_same_command_continues(sets, pretrained, tmp_path):
    command = [sys.executable, str(ROOT / "train_pretrain.py"), *plain_mae(sets), "--epochs", "4000",
               "--out", str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "run/checkpoint.pt").exists() and process.poll() is None: time.sleep(0.05)
    with pytest.raises(u.InputError, match="another run is at work"):  # the folder is locked meanwhile
        train_pretrain.main(command[2:])
    process.send_signal(signal.SIGTERM)
    try: assert process.wait(timeout=60) == 143, process.stderr.read()
    finally: process.kill()
    assert process.stdout.read().endswith("stopped; all is saved, the same command goes on\n")
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    state = u.read_checkpoint(tmp_path / "run/checkpoint.pt")
    assert state["step"] >= log[-1]["step"] > 0 and state["step"] < state["steps"]


ANONYMOUS = """
import json, sys, pathlib, re, train_pretrain
train_pretrain.main(sys.argv[1:])
print("kB", re.search(r"RssAnon:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's own count")
def test_memory_does_not_grow_with_the_data_set(tmp_path):
    """Anonymous memory after 8 steps on 1,000 images and on 1,000,000 (a sparse file of 10.8 GB): the order
    of an epoch takes 8 MB, and a few more go to chance."""
    kB = {}
    for count in (1000, 1_000_000):
        folder = tmp_path / f"sparse{count}"
        folder.mkdir()
        np.lib.format.open_memmap(folder / "images.npy", "w+", np.uint8, (count, 60, 60, 3))
        (folder / "meta.json").write_text(json.dumps({"format": 1, "name": "", "margin": 1.25, **data.HAND}))
        command = [sys.executable, "-c", ANONYMOUS, *SMALL, "--source", str(folder), "--variant",
                   "source-only-mae", "--decoder-width", "16", "--decoder-heads", "2", "--batch", "64",
                   "--epochs", str(8 * 64 / count), "--out", str(tmp_path / f"run{count}")]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr[-2000:]
        kB[count] = int(done.stdout.split("kB")[-1])
    assert kB[1_000_000] - kB[1000] < 40_000, kB


# ---- variants: each switch changes its own term ------------------------------------------------------------
def pretraining_settings(*arguments: str):
    script = train_pretrain
    return u.parse_settings(script.Settings, "", script.PRESETS, script.VARIANTS, arguments)


def batch_of(sets: Path, *arguments: str):
    s = pretraining_settings("--batch", "16", "--seg-batch", "16", *arguments)
    source, target = data.Dataset(sets / "source", "masks"), data.Dataset(sets / "target", "masks")
    domains = [(source, source.masks, s.masks != "none"), (target, target.masks, s.masks == "both")]
    return train_pretrain.pretraining_batch(s, 0, slice(0, 16), domains, data.Dataset(sets / "xc"),
                                            torch.device("cpu"))


def test_variants_change_their_own_term(sets):
    full, no_fcr, no_xc, mae = (batch_of(sets, "--variant", v) for v in ("full", "no-fcr", "no-xc", "mae"))
    source_masks = batch_of(sets, "--variant", "source-masks")
    assert torch.equal(full[0], no_fcr[0]) and bool((no_fcr[1] == 1).all()) and bool((full[1] != 1).any())
    assert torch.equal(full[1], no_xc[1]) and not torch.equal(full[0], no_xc[0])
    assert torch.equal(mae[0], no_xc[0]) and bool((mae[1] == 1).all())
    weighted = (source_masks[1] != 1).any(dim=1)                           # (16,) images of the source only
    assert 0 < int(weighted.sum()) < 16 and torch.equal(source_masks[1][weighted], full[1][weighted])
    assert torch.allclose(full[1].mean(dim=1), torch.ones(16), atol=1e-5)
    replaced = (full[0] != no_xc[0]).any(dim=1).flatten(1).any(dim=1)      # (16,) about half of the images
    assert 2 <= int(replaced.sum()) <= 14
    assert pretraining_settings("--variant", "source-only").target == ""


def test_a_share_is_a_slice_of_the_global_batch(sets):
    s = pretraining_settings("--batch", "16")
    source = data.Dataset(sets / "source", "masks")
    make = lambda own: train_pretrain.pretraining_batch(  # noqa: E731
        s, 3, own, [(source, source.masks, True)], data.Dataset(sets / "xc"), torch.device("cpu"))
    whole, half = make(slice(0, 16)), make(slice(8, 16))
    for a, b in zip(whole, half): assert torch.allclose(a[8:], b, atol=1e-6)


def test_ar_is_one_term_and_lambda_its_weight(sets, pretrained, tmp_path):
    def log(run): return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    finetune(sets, tmp_path / "off", str(pretrained), "--lam", "0")
    finetune(sets, tmp_path / "on", str(pretrained), "--lam", "1000")
    off, on = ([r for r in log(tmp_path / run) if "L_kpt" in r] for run in ("off", "on"))
    assert all(r["L_attn"] == 0 for r in off) and on[-1]["L_attn"] > 0
    assert on[-1]["lam L_attn / L_kpt"] == pytest.approx(1000 * on[-1]["L_attn"] / on[-1]["L_kpt"])


def test_expanded_and_written_eq_5_train_alike(sets, pretrained, finetuned, tmp_path):
    """keypoint_loss_expanded against keypoint_loss, Eq. (5), through six whole optimiser steps."""
    finetune(sets, tmp_path / "run", str(pretrained), "--no-expanded")
    a, b = weights(tmp_path / "run", "head"), weights(finetuned, "head")
    assert all(torch.allclose(a[k].float(), b[k].float(), atol=2e-3) for k in a)


# ---- evaluation --------------------------------------------------------------------------------------------
def test_two_processes_make_the_same_masks_again(sets, tmp_path):
    """Each has moved BatchNorm's statistics by its own images; the checkpoint, and the masks, know rank 0's."""
    command = SMALL + ["--source", f"{sets}/source", "--target", f"{sets}/target", "--unconstrained",
                       f"{sets}/xc", "--out", str(tmp_path), "--decoder-width", "16", "--decoder-heads", "2",
                       "--seg-channels", "8", "--seg-steps", "30", "--seg-batch", "8", "--batch", "16",
                       "--epochs", "0.2"]
    torchrun("train_pretrain.py", *command)
    first = np.load(tmp_path / "target_masks.npy")
    for name in ("target_masks.npy", "checkpoint.pt"): (tmp_path / name).unlink()      # as after a kill
    torchrun("train_pretrain.py", *command)
    assert np.array_equal(np.load(tmp_path / "target_masks.npy"), first)


def test_two_processes_measure_the_same(sets, pretrained, finetuned, tmp_path):
    """Test sets of one chunk, where the second process has nothing to do, and of two; all of result.json."""
    arrays = {field: np.load(sets / f"target/{field}.npy")
              for field in ("images", "masks", "keypoints", "intrinsics")}
    (tmp_path / "large").mkdir()
    for field, array in arrays.items(): np.save(tmp_path / f"large/{field}.npy", np.concatenate([array] * 3))
    meta = json.loads((sets / "target/meta.json").read_text()) | {"rows": 120}
    (tmp_path / "large/meta.json").write_text(json.dumps(meta))
    for run in (pretrained, finetuned): shutil.copytree(run, tmp_path / "two" / run.name)
    shutil.copytree(tmp_path / "two", tmp_path / "one")
    command = ["--source-test", f"{sets}/source_test", "--target-test", str(tmp_path / "large"), "--pictures",
               "none", "--threads", "1"]
    assert evaluate.main([str(tmp_path / "one"), *command]) == 0
    printed = torchrun("evaluate.py", str(tmp_path / "two"), *command)
    assert printed.count("chance: constant mean pose") == 1 and printed.count("measuring") == 2
    for run in (pretrained, finetuned):
        one, two = (json.loads((tmp_path / number / run.name / "result.json").read_text())
                    for number in ("one", "two"))
        assert one == two and one["tests"] == two["tests"]
    assert two["target"]["images"] == 120 and two["source"]["images"] == 12


def test_evaluate_measures_and_tabulates(sets, pretrained, finetuned, tmp_path, capsys):
    assert evaluate.main([str(pretrained.parent), "--source-test", f"{sets}/source_test", "--target-test",
                          f"{sets}/target_test", "--pictures", "none", "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    assert "chance" in text and "tiny finetuned" in text
    result = json.loads((finetuned / "result.json").read_text())
    assert 5 < result["target"]["epe"] < 300 and len(result["target"]["per_joint"]) == 21
    assert result["target"]["per_joint"][0] == 0  # the root is aligned
    assert len(result["target"]["attention"]["lift"]) == 2
    again = evaluate.read_results([str(pretrained.parent)])
    assert {r["kind"] for r in again} == {"pretraining", "finetuning"}


def test_other_test_sets_do_not_overwrite_a_result(sets, finetuned):
    quiet = ["--pictures", "none", "--device", "cpu", "--source-test", f"{sets}/source_test"]
    evaluate.main([str(finetuned), *quiet, "--target-test", f"{sets}/target_test"])
    before = (finetuned / "result.json").read_text()
    evaluate.main([str(finetuned), *quiet, "--target-test", f"{sets}/target"])
    assert (finetuned / "result.json").read_text() == before and (finetuned / "target.json").exists()


def test_another_joint_set_is_refused(sets, finetuned, tmp_path):
    """A model of 21 joints is not measured on a test set of 20."""
    other = tmp_path / "test"
    other.mkdir()
    for name in ("images.npy", "masks.npy", "intrinsics.npy"):
        os.link(sets / "target_test" / name, other / name)
    np.save(other / "keypoints.npy", np.load(sets / "target_test/keypoints.npy")[:, :20])
    meta = json.loads((sets / "target_test/meta.json").read_text())
    meta |= {"joints": meta["joints"][:20], "bones": meta["bones"][:19]}
    (other / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(u.InputError, match="20 joints, not 21 as the model"):
        evaluate.main([str(finetuned), "--source-test", f"{sets}/source_test", "--target-test", str(other)])


# ---- refusals: one line, before work is lost ---------------------------------------------------------------
@pytest.mark.parametrize("more, message", [
    (["--image", "50"], "50 x 50 px is not divisible by the patch"),
    (["--source", "nowhere"], "nowhere: no data set here"),
    (["--mask-ratio", "1.5"], "between 0 and 1"),
    (["--mask-ratio", "0.99"], "visible"),
    (["--xc", "7"], "between 0 and 1"),
    (["--masks", "some"], "choose both, source or none"),
    (["--batch", "16", "--micro-batch", "5"], "does not divide"),
    (["--heads", "5"], "not divisible by the number of heads"),
    (["--precision", "int8"], "^--precision int8: choose auto, float32, bfloat16, float16$"),
    (["--compile", "yes"], "^--compile yes: choose auto, on, off$"),
    (["--patch", "24", "--decoder-width", "15"], "width 15 is not divisible"),
    (["--image", "24"], "f.S needs images of 32 px or more"), (["--alpha", "165"], "^--alpha 165: exp"),
    (["--warmup", "40"], "^--warmup 40: here a share of the steps"),
    (["--jitter", "1.5"], "^--jitter 1.5: give a number below 1$"), (["--seg-jitter", "2"], "^--seg-jitter 2.0: give"),
    (["--variant", "source-only"], "^--target .*/target: variant source-only is without a target"),
    (["--batch", "16", "--epochs", "inf"], "^--epochs inf: give a number below inf$"),
    (["--seed", str(2 ** 64)], f"^--seed {2 ** 64}: give a number below 9.22337e.18$"),
    (["--threads", "5000"], "^--threads 5000: give a number below 1025$"),
    (["--target", "", "--target-masks", "nowhere.npy"], "--target-masks nowhere.npy: nothing here uses"),
    (["--masks", "source", "--xc", "0", "--target-masks", "nowhere.npy"], "nothing here uses masks of a target"),
    (["--target-masks", "nowhere.npy"], "nowhere.npy: missing"),
    (["--micro-batch", "-1"], "^--micro-batch -1: give a number not below 0$"),
    (["--lr", "-0.001"], "^--lr -0.001: give a number not below 0$"),
    (["--lr", "nan"], "^--lr nan: give"), (["--seed", "-1"], "^--seed -1: give"),
    (["--image", "0"], "^--image 0: give a number above 0$"),
    (["--out", "/dev/null/run"], "cannot hold a run"),
])
def test_pretraining_refuses(sets, tmp_path, more, message):
    """Before f^S is trained, and before the folder belongs to settings that cannot be."""
    with pytest.raises(u.InputError, match=message): pretrain(sets, tmp_path / "run", *more)
    assert not (tmp_path / "run/config.json").exists()


@pytest.mark.parametrize("largest", [0, 1])
def test_masks_of_0_and_1_are_refused(sets, tmp_path, largest):
    shutil.copytree(sets / "source", tmp_path / "source")
    (tmp_path / "source/checksums.npy").unlink()
    masks = np.load(sets / "source/masks.npy")
    np.save(tmp_path / "source/masks.npy", (masks >= 128).astype(np.uint8) * largest)
    own = ["--source", str(tmp_path / "source"), "--epochs", "0.2"]
    with pytest.raises(u.InputError, match=f"source/masks.npy: the largest value is {largest}, no foreground: write"):
        pretrain(sets, tmp_path / "run", *own)
    assert pretrain(sets, tmp_path / "run", *own, "--masks", "none", "--xc", "0") == 0
    np.save(tmp_path / "masks.npy", (np.load(sets / "target/masks.npy") >= 128).astype(np.uint8) * largest)
    with pytest.raises(u.InputError, match=f"path/masks.npy: .* {largest}, no foreground".replace("path", str(tmp_path))):
        pretrain(sets, tmp_path / "run2", "--target-masks", f"{tmp_path}/masks.npy")


def test_weights_of_eq_2_are_finite_to_the_largest_alpha():
    """At the paper's 256 patches, half of them foreground."""
    masks = torch.zeros(1, 1, 256, 256)
    masks[..., :128, :] = 1
    assert u.foreground_weights(masks, 16, 160.0).isfinite().all()
    assert not u.foreground_weights(masks, 16, 180.0).isfinite().all()       # what --alpha refuses


def test_finetuning_on_another_target_than_was_pretrained_on_says_so(sets, pretrained, tmp_path, capsys):
    says = f"f^A was pre-trained on {sets}/target; L_attn holds its attention on {sets}/xc"
    assert finetune(sets, tmp_path / "a", str(pretrained), "--epochs", "0.3", "--target", f"{sets}/xc") == 0
    assert says in capsys.readouterr().out
    assert finetune(sets, tmp_path / "b", str(pretrained), "--epochs", "0.3") == 0
    assert finetune(sets, tmp_path / "c", str(pretrained), "--epochs", "0.3", "--target", f"{sets}/xc", "--lam", "0") == 0
    assert "f^A was" not in capsys.readouterr().out


def test_a_warm_up_longer_than_the_training_is_said(sets, pretrained, tmp_path, capsys):
    assert finetune(sets, tmp_path / "a", str(pretrained), "--epochs", "1", "--warmup", "4") == 0     # 3 steps
    assert "--warmup 4: the learning rate only rises in 3 steps" in capsys.readouterr().out
    assert finetune(sets, tmp_path / "b", str(pretrained), "--epochs", "1", "--warmup", "3") == 0
    assert "--warmup" not in capsys.readouterr().out


def test_unknown_flag_and_preset(sets, tmp_path, capsys):
    for wrong in (["--no-such-flag", "1"], ["--preset", "huge"], ["--epochs", "many"]):
        with pytest.raises(SystemExit) as stopped: pretrain(sets, tmp_path / "run", *wrong)
        assert stopped.value.code == 2


def test_finetuning_refuses(sets, pretrained, finetuned, tmp_path):
    refuse = lambda message, *a: pytest.raises(u.InputError, match=message)  # noqa: E731
    with refuse("--init nowhere: neither a pre-training run"): finetune(sets, tmp_path / "a", "nowhere")
    with refuse("--init mae.pth: neither"): finetune(sets, tmp_path / "a", "mae.pth")
    (tmp_path / "a").mkdir()
    with refuse("a/checkpoint.pt: no such checkpoint"): finetune(sets, tmp_path / "b", str(tmp_path / "a"))
    with refuse("full/checkpoint.pt: the checkpoint of a run, not a file of weights; give the run's folder"):
        shutil.copytree(pretrained, tmp_path / "full")
        finetune(sets, tmp_path / "b", f"{tmp_path}/full/checkpoint.pt")
    with refuse("^--layer-decay 0.0: give a number above 0"):
        finetune(sets, tmp_path / "b", str(pretrained), "--layer-decay", "0")
    with refuse("another architecture"): finetune(sets, tmp_path / "b", str(pretrained), "--width", "32")
    with refuse("other settings.*lam: 100.0 there, 3.0 now"):
        finetune(sets, finetuned, str(pretrained), "--lam", "3")
    with refuse("needs a pre-trained f"): finetune(sets, tmp_path / "c", "", "--lam", "3")
    with refuse("--labels -5: give"): finetune(sets, tmp_path / "c", str(pretrained), "--labels", "-5")
    with refuse("--micro-batch 3 does not"): finetune(sets, tmp_path / "c", str(pretrained), "--micro-batch", "3")
    for name in "bc": assert not (tmp_path / name).exists()


def test_a_source_of_which_no_joint_counts(sets, tmp_path):
    """As where the root has no label, or lies behind the camera: nothing would be trained."""
    shutil.copytree(sets / "source", tmp_path / "source")
    (tmp_path / "source/checksums.npy").unlink(missing_ok=True)
    labelled = np.load(sets / "source/keypoints.npy")

    def run(keypoints, *more):
        np.save(tmp_path / "source/keypoints.npy", keypoints)
        return finetune(sets, tmp_path / "run", "", "--lam", "0", "--source", str(tmp_path / "source"),
                        "--validation", "", *more)
    unlabelled = labelled.copy()
    unlabelled[:, data.HAND["root"]] = np.nan
    for keypoints in (unlabelled, -labelled, labelled + (1e4, 0, 0)):
        with pytest.raises(u.InputError, match=r"source: no joint of the first 24 images \(--labels\) counts"):
            run(np.float32(keypoints))
    unlabelled[23] = labelled[23]                                          # one: in most steps nothing counts
    assert run(unlabelled, "--log-every", "1", "--batch", "2") == 0
    losses = [json.loads(line)["L_kpt"] for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert len(losses) == 24 and sorted(losses)[-3] == 0 < sorted(losses)[-2]


def test_a_validation_set_without_a_root_is_refused(sets, tmp_path):
    shutil.copytree(sets / "source_test", tmp_path / "val")
    keypoints = np.load(tmp_path / "val/keypoints.npy")
    keypoints[:, data.HAND["root"]] = np.nan
    np.save(tmp_path / "val/keypoints.npy", keypoints)
    (tmp_path / "val/checksums.npy").unlink()
    with pytest.raises(u.InputError, match="val/keypoints.npy: no image has a label of the root, wrist"):
        finetune(sets, tmp_path / "run", "", "--lam", "0", "--validation", str(tmp_path / "val"))


def test_validation_of_other_joints_names_the_flag(sets, tmp_path):
    shutil.copytree(sets / "source", tmp_path / "other")
    meta = json.loads((tmp_path / "other/meta.json").read_text())
    meta["joints"] = [f"own_{name}" for name in meta["joints"]]
    (tmp_path / "other/meta.json").write_text(json.dumps(meta))
    with pytest.raises(u.InputError, match="other: joints is .* as .*source; name another --validation, or \"\" for none$"):
        finetune(sets, tmp_path / "run", "", "--lam", "0", "--validation", str(tmp_path / "other"))


def test_own_data_as_the_readme_says(tmp_path, monkeypatch):
    """Its ten lines and its commands, word for word but for the length of training; three joints of our own."""
    section = (ROOT / "README.md").read_text().partition("\n## Your own data\n")[2].partition("\n## ")[0]
    (writer,), (commands,) = (re.findall(f"```{kind}\n(.*?)```", section, re.S) for kind in ("python", "sh"))
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    known = {"images": rng.integers(0, 255, (40, 60, 60, 3), dtype=np.uint8), "names": ["a", "b", "c"],
             "masks": np.uint8(255) * (rng.random((40, 60, 60)) < 0.3),
             "keypoints": np.float32(rng.uniform(-60, 60, (40, 3, 3)) + (0, 0, 500)),
             "intrinsics": np.float32([[[200, 0, 29.5], [0, 200, 29.5], [0, 0, 1]]] * 40)}
    exec(writer, known)
    for name in ("mine_test", "mine_target_test", "mine_target", "mine_xc"): shutil.copytree("mine", name)
    for name in ("keypoints", "masks", "intrinsics"): Path(f"mine_target/{name}.npy").unlink()
    meta = json.loads(Path("mine/meta.json").read_text()) | {"joints": [], "bones": []}
    Path("mine_xc/meta.json").write_text(json.dumps(meta))
    for script, shorter in (("pretrain", "--seg-steps 2 --epochs 1"), ("finetune", "--epochs 1")):
        commands = commands.replace(f"train_{script}.py", f"train_{script}.py {shorter}")
    commands = commands.replace("python ", f"{sys.executable} {ROOT}/")
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", commands], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "starts from runs/mine/pretrain-full" in done.stdout
    assert [line.split("|")[0].split() for line in done.stdout.splitlines() if line.startswith("tiny ")] == [
        ["tiny", "full"], ["tiny", "scratch"], ["tiny", "full"]]           # pre-training, then both rows
    assert {p.stem for p in Path("runs/mine/pictures/mine_target_test").iterdir()} >= {"attention", "poses", "pck", "curves"}


def test_unfinished_pretraining_is_refused(sets, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 7)  # four steps of f^S, a chunk of masks, two steps
        pretrain(sets, tmp_path / "half")
    with pytest.raises(u.InputError, match="stands at step 2 of"):
        finetune(sets, tmp_path / "run", str(tmp_path / "half"))


def test_finished_run_says_so(sets, pretrained, finetuned, capsys):
    assert finetune(sets, finetuned, str(pretrained)) == pretrain(sets, pretrained) == 0
    assert capsys.readouterr().out.count("finished already") == 2


def test_changed_data_is_noticed(sets, finetuned, pretrained, tmp_path):
    """A run goes on with the data it began with, or not at all."""
    other = tmp_path / "source"
    other.mkdir()
    for path in (sets / "source").iterdir():
        if path.name != "meta.json": os.link(path, other / path.name)
    meta = json.loads((sets / "source/meta.json").read_text())
    (other / "meta.json").write_text(json.dumps(meta | {"crc": {"images": 1}}))
    arguments = [str(sets / "source"), str(other)]
    config = json.loads((finetuned / "config.json").read_text())
    config["settings"]["source"] = arguments[1]
    copy = tmp_path / "run"
    copy.mkdir()
    config["settings"]["out"] = str(copy)
    (copy / "config.json").write_text(json.dumps(config))
    shutil.copy(finetuned / "checkpoint.pt", copy)
    with pytest.raises(u.InputError, match="other settings.*data"):
        finetune(sets, copy, str(pretrained), "--source", arguments[1])


def test_infinite_loss_stops_the_run(sets, tmp_path):
    with pytest.raises(u.InputError, match=r"L_WMAE is not finite for \d+ images of .* at step 2; .*--lr"):
        pretrain(sets, tmp_path / "run", "--variant", "mae", "--lr", "1e30")


def test_a_new_part_of_the_network_is_trained_or_refused():
    s = train_finetune.Settings(depth=2, layer_decay=0.5)
    encoder = u.Encoder((32, 32), 8, 16, 2, 2)
    estimator = u.PoseEstimator(encoder, u.KeypointHead(encoder.grid, 16, 4, 3), u.DomainDiscriminator(16))
    groups = train_finetune.optimiser_groups(s, estimator)
    assert sum(len(g["params"]) for g in groups) == len(list(estimator.parameters()))        # each once
    encoder.register_token = torch.nn.Parameter(torch.zeros(1, 2, 16))
    with pytest.raises(u.InputError, match="^optimiser_groups: encoder.register_token would not be trained"):
        train_finetune.optimiser_groups(s, estimator)
    encoder.register_token.requires_grad_(False)                           # frozen on purpose
    train_finetune.optimiser_groups(s, estimator)
