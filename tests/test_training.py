"""The two training scripts on a tiny data set: resume, processes, variants, what is not opened, refusals."""

import json
import os
import re
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    checkpoint,
    finetune,
    interrupted,
    log,
    pretrain,
    resumed,
    same,
    same_up_to_sums,
    settings,
    weights,
)

import train_finetune
import train_pretrain
import udapose
from support.comparisons import DomainDiscriminator
from support.folder import HAND, Dataset, write_folder
from support.run import InputError
from udapose import Encoder, KeypointHead, PoseEstimator

CPU = torch.device("cpu")


# ==== Resume: the same bits as a run that was not disturbed. test_survival.py does this with kill -9. ===
@pytest.mark.parametrize(
    "more",
    [
        ("--variant", "probe"),  # the optimiser has no moments of a frozen f^E
        ("--variant", "mae-dann"),
        ("--precision", "float16"),
        ("--precision", "bfloat16", "--workers", "2"),
    ],
)
def test_finetuning_resumes_bitwise(sets, pretrained, tmp_path, monkeypatch, more):
    run = resumed(monkeypatch, tmp_path, 4, finetune, sets, pretrained, *more)  # at step 6, saved: 4
    scale = checkpoint(run)["scaler"].get("scale")
    assert ("float16" in more) == (scale is not None and scale < 65536)  # without it: 65536 after a resume
    assert 5 < log(run)[-1]["source_val_epe"] < 300  # geometry is in float32


def test_half_precision_pretrains_and_resumes(sets, tmp_path, monkeypatch):
    run = resumed(monkeypatch, tmp_path, 6, pretrain, sets, "--precision", "float16")
    assert json.loads((run / "config.json").read_text())["precision"] == "float16"


@pytest.mark.parametrize("switch", [("--workers", "2"), ("--checkpointing",), ("--save-every", "2")])
def test_what_does_not_change_a_bit(sets, pretrained, finetuned, tmp_path, switch):
    pretrain(sets, tmp_path / "a", *switch)
    finetune(sets, tmp_path / "b", pretrained, *switch)
    assert same(weights(tmp_path / "a"), weights(pretrained)) and log(tmp_path / "a") == log(pretrained)
    assert same(weights(tmp_path / "b"), weights(finetuned)) and log(tmp_path / "b") == log(finetuned)


def test_seed_changes_everything_random(sets, pretrained, finetuned, tmp_path):
    pretrain(sets, tmp_path / "a", "--seed", "1")
    finetune(sets, tmp_path / "b", pretrained, "--seed", "1")
    for run, other in ((tmp_path / "a", pretrained), (tmp_path / "b", finetuned)):
        ours, theirs = weights(run), weights(other)
        assert not any(torch.equal(ours[k], theirs[k]) for k in ours if k.endswith("weight"))
    for seed in ("0", "1"):  # and the first weights
        still = ["--lr", "0", "--weight-decay", "0", "--epochs", "0.3", "--seed", seed]
        finetune(sets, tmp_path / seed, "", "--lam", "0", *still)
    ours, theirs = weights(tmp_path / "0"), weights(tmp_path / "1")
    assert not any(
        torch.equal(ours[k], theirs[k]) for k in ours if k.endswith(("proj.weight", "conv.weight"))
    )


# ==== Two processes. One start of torchrun does all the work, because starting takes longer than training.
TWO = """
import sys

sys.path[:0] = sys.argv[1:3]  # the project and its tests
import pytest
import torch

import train_finetune
import train_pretrain
import udapose
from conftest import finetuning, interrupted, pretraining
from support import run as runs

sets, masks, out = sys.argv[3:]
processes = runs.setup_distributed("cpu")
runs.setup_distributed = lambda device: processes  # one process group for all trainings
plain = torch.nn.Module.compile
torch.nn.Module.compile = lambda module, **options: plain(module, backend="aot_eager", **options)

train_pretrain.main(pretraining(sets, f"{out}/two", "--target-masks", masks, "--micro-batch", "4"))

TEN = ["--micro-batch", "2", "--checkpointing", "--log-every", "1", "--save-every", "10"]
TEN += ["--image", "32", "--batch", "8", "--validation", ""]
FINETUNING = {str(changes): (variant, changes) for variant, changes in train_finetune.VARIANTS.items()}
FINETUNING = dict(FINETUNING.values())  # of variants that differ in --init alone, one
for switch in ("--no-compile", "--compile"):
    for variant, changes in train_pretrain.VARIANTS.items():
        folder, images = f"{out}/{switch}/train_pretrain-{variant}", 48 if "target" in changes else 88
        more = [*TEN[:-2], "--seg-steps", "2", "--variant", variant, switch, "--epochs", str(80 / images)]
        more += ["--target", ""] if "target" in changes else []
        train_pretrain.main(pretraining(sets, folder, *more))
    for variant, changes in FINETUNING.items():
        folder, init = f"{out}/{switch}/train_finetune-{variant}", f"{out}/--no-compile/train_pretrain-full"
        more = [*TEN, "--variant", variant, switch, "--epochs", str(80 / 24)]
        train_finetune.main(finetuning(sets, folder, changes.get("init", init), *more))
again = [*TEN, "--variant", "mt", "--epochs", str(80 / 24), "--save-every", "8"]
again = finetuning(sets, f"{out}/mt", "", *again)
interrupted(pytest.MonkeyPatch(), 9, train_finetune.main, again)
train_finetune.main(again)
if processes[0] == 0:
    print("graphs", torch._dynamo.utils.counters["stats"]["unique_graphs"])
torch.distributed.destroy_process_group()
"""


@pytest.fixture(scope="module")
def two_processes(sets, pretrained, tmp_path_factory) -> tuple[Path, str]:
    """The folder of the runs that two processes made, and what they printed."""
    out = tmp_path_factory.mktemp("two")
    (out / "two.py").write_text(TWO)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(path) for path in (out / "two.py", ROOT, ROOT / "tests", sets, pretrained, out)]
    threads = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=threads)
    assert done.returncode == 0, done.stderr[-3000:]
    return out, done.stdout


def same_log(run: Path, other: Path, tolerance: float) -> None:
    """Fails unless a log ends as another one does, up to the order of sums."""
    lines = log(other)
    for a, b in zip(log(run)[-len(lines) :], lines, strict=True):
        assert a.pop("stage") == b.pop("stage")
        assert a == pytest.approx(b, rel=tolerance, abs=1e-4), run


def test_two_processes_and_micro_batches_give_the_same_pretraining(pretrained, two_processes):
    """With the masks of the one process: BatchNorm in f^S sees the images of its own process only."""
    one, two = weights(pretrained), weights(two_processes[0] / "two")
    assert same_up_to_sums(one, two)
    assert not same(one, two), "this test compares two different orders of summation"
    same_log(pretrained, two_processes[0] / "two", 1e-4)


def test_two_processes_resume_with_a_mean_teacher(two_processes):
    """Both teachers have the running statistics of rank 0, which are all that a checkpoint holds."""
    whole, again = (weights(two_processes[0] / name) for name in ("--no-compile/train_finetune-mt", "mt"))
    assert same(whole, again)


@pytest.mark.parametrize("script", [train_pretrain, train_finetune])
def test_every_variant_compiled_is_the_eager_one(two_processes, script):
    """Ten steps on two processes, with micro-batches and checkpointing."""
    out, printed = two_processes
    graphs = int(re.search(r"graphs (\d+)", printed)[1])
    assert 0 < graphs <= 12, f"blocks do not share their graphs: {graphs}"
    runs_made = sorted((out / "--compile").glob(f"{script.__name__}-*"))
    assert len(runs_made) == len({str(changes) for changes in script.VARIANTS.values()})
    for compiled in runs_made:
        eager = out / "--no-compile" / compiled.name
        assert checkpoint(eager)["step"] == 10
        same_log(eager, compiled, 1e-3)


# ==== What is read ======================================================================================
def test_target_labels_and_masks_are_never_opened(sets, pretrained, finetuned, tmp_path):
    bare = tmp_path / "target"
    shutil.copytree(sets / "target", bare)
    for name in ("keypoints.npy", "masks.npy", "intrinsics.npy"):
        (bare / name).write_text("not an array")
    pretrain(sets, tmp_path / "a", "--target", str(bare))
    finetune(sets, tmp_path / "b", tmp_path / "a", "--target", str(bare))
    assert same(weights(tmp_path / "a"), weights(pretrained))
    assert same(weights(tmp_path / "b"), weights(finetuned))


def test_scratch_opens_no_target(sets, tmp_path):
    finetune(sets, tmp_path / "run", "", "--variant", "scratch", "--target", "nowhere")
    assert all("L_attn" not in line for line in log(tmp_path / "run"))


def test_memory_does_not_grow_with_the_data_set(tmp_path):
    """1,000 and 1,000,000 images, a sparse file of 10.8 GB. The order of an epoch takes 8 MB."""
    peak = {}
    for count in (1000, 1_000_000):
        folder = tmp_path / f"sparse{count}"
        folder.mkdir()
        np.lib.format.open_memmap(folder / "images.npy", "w+", np.uint8, (count, 60, 60, 3))
        (folder / "meta.json").write_text(json.dumps({"format": 1, "name": "", **HAND}))
        more = ["--source", str(folder), "--target", "", "--variant", "source-only-mae"]
        more += ["--epochs", str(2 * 16 / count)]
        tracemalloc.start()
        pretrain(tmp_path, tmp_path / f"run{count}", *more)
        peak[count] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak[1_000_000] - peak[1000] < 40e6, peak


def test_auto_is_the_sibling_folder_of_the_benchmark_and_nothing_else():
    s = settings(train_pretrain)
    assert (s.target, s.unconstrained) == ("datasets/hands/target_train", "datasets/hands/unconstrained")
    s = settings(train_finetune, "--task", "human")
    assert s.target == "datasets/bodies/target_train" and s.validation == "datasets/bodies/source_val"
    assert (s.out, s.init) == ("runs/tiny-human/full-seed0", "runs/tiny-human/pretrain-full-seed0")
    for source in ("mine/source_train", "datasets/hands/mine", "datasets/freihand/source_train"):
        s = settings(train_finetune, "--source", source, "--lam", "0")  # no folder of ours
        assert s.target == s.validation == ""
    assert settings(train_finetune, "--target", "mine", "--variant", "no-ar").target == "mine"
    assert settings(train_finetune, "--variant", "no-xc-ar").init == "runs/tiny/pretrain-no-xc-seed0"


# ==== Variants: each switch changes its own term ========================================================
def batch_of(sets: Path, *arguments: str):
    """The first batch of pre-training."""
    s = settings(train_pretrain, "--batch", "16", *arguments)
    source, target = Dataset(sets / "source", "masks"), Dataset(sets / "target", "masks")
    domains = [train_pretrain.Domain(source, source.masks, s.masks != "none")]
    domains.append(train_pretrain.Domain(target, target.masks, s.masks == "both"))
    reader = train_pretrain.PretrainingData(s, domains, Dataset(sets / "xc"))
    return train_pretrain.pretraining_batch(s, reader[0, slice(0, 16)], domains, CPU)


def test_variants_change_their_own_term(sets):
    full, no_fcr, no_xc, mae, source = (
        batch_of(sets, "--variant", name) for name in ("full", "no-fcr", "no-xc", "mae", "source-masks")
    )
    assert torch.equal(full.images, no_fcr.images) and torch.equal(full.weights, no_xc.weights)
    assert bool((no_fcr.weights == 1).all()) and bool((mae.weights == 1).all())
    assert torch.equal(mae.images, no_xc.images)
    weighted = (source.weights != 1).any(dim=1)  # (16,) images of the source only
    assert 0 < int(weighted.sum()) < 16
    assert torch.equal(source.weights[weighted], full.weights[weighted])
    assert torch.allclose(full.weights.mean(dim=1), torch.ones(16), atol=1e-5)
    replaced = (full.images != no_xc.images).flatten(1).any(dim=1)  # (16,) about half of the images
    assert 2 <= int(replaced.sum()) <= 14
    assert all(torch.equal(full.noise, other.noise) for other in (no_fcr, no_xc, mae, source))


def test_lambda_is_the_weight_of_the_attention_term(sets, pretrained, tmp_path):
    for lam in ("0", "1", "1000"):
        finetune(sets, tmp_path / lam, pretrained, "--lam", lam)
    off, low, high = ([r for r in log(tmp_path / lam) if "L_kpt" in r] for lam in ("0", "1", "1000"))
    assert all("L_attn" not in line for line in off) and min(low[-1]["L_attn"], high[-1]["L_attn"]) > 0
    assert low[0]["L_kpt"] == pytest.approx(high[0]["L_kpt"], rel=0.01)  # not weighted itself
    assert not same(weights(tmp_path / "0"), weights(tmp_path / "1"))
    assert not same(weights(tmp_path / "1"), weights(tmp_path / "1000"))


def test_a_new_part_of_the_network_is_trained_or_refused():
    s = train_finetune.Settings(depth=2, layer_decay=0.5)
    encoder = Encoder((32, 32), 8, 16, 2, 2)
    estimator = PoseEstimator(encoder, KeypointHead(encoder.grid, 16, 4, 3), DomainDiscriminator(16))
    groups = train_finetune.optimiser_groups(s, estimator)
    assert sum(len(group["params"]) for group in groups) == len(list(estimator.parameters()))  # each once
    encoder.register_token = torch.nn.Parameter(torch.zeros(1, 2, 16))
    with pytest.raises(InputError, match="encoder.register_token would not be trained"):
        train_finetune.optimiser_groups(s, estimator)
    encoder.register_token.requires_grad_(False)  # frozen on purpose
    train_finetune.optimiser_groups(s, estimator)


# ==== Where fine-tuning starts from =====================================================================
def test_init_from_a_finished_run(sets, pretrained, tmp_path, monkeypatch):
    finetune(sets, tmp_path / "run", pretrained, "--lr", "0", "--weight-decay", "0", "--epochs", "0.3")
    assert same(*(checkpoint(run)["encoder"] for run in (tmp_path / "run", pretrained)))
    interrupted(monkeypatch, 6, pretrain, sets, tmp_path / "half")
    with pytest.raises(InputError, match="half: not a finished pre-training run"):
        finetune(sets, tmp_path / "other", tmp_path / "half")


def test_init_from_the_shipped_encoder(sets, tmp_path):
    shape = "--width 96 --depth 4 --heads 3 --lr 0 --weight-decay 0 --epochs 0.3".split()
    shipped = ROOT / "assets/pretrained-small.pt"
    finetune(sets, tmp_path / "run", shipped, "--patch", "8", *shape)
    theirs = torch.load(shipped, weights_only=True)["encoder"]
    ours = checkpoint(tmp_path / "run")["encoder"]
    assert all(torch.allclose(ours[key], tensor.float()) for key, tensor in theirs.items() if key in ours)
    assert len(theirs.keys() & ours.keys()) > 40


# ==== Refusals: one line, before work is lost ===========================================================
@pytest.mark.parametrize(
    "more, message",
    [
        ("--image 50", "50 x 50 px is not divisible by the patch"),
        ("--source nowhere", "nowhere: no data set here"),
        ("--micro-batch 5", "^--micro-batch 5 does not divide the 16 images of a process$"),
        ("--image 24", "32 px"),
        ("--variant source-only", "^--target .*/target: variant source-only has no target$"),
        ("--unconstrained auto", "^--unconstrained: name a folder of backgrounds"),
        ("--target-masks nowhere.npy", "nowhere.npy: missing"),
        ("--target= --target-masks nowhere.npy", "target"),
        ("--device cuda", "^--device cuda: torch finds no CUDA device"),
        ("--init /dev/null", "null: "),
        ("tune --init nowhere", "^--init nowhere: neither a pre-training run"),
        ("tune --width 32 --heads 4", "another .* width 16 there, 32 here, heads 2 there, 4 here$"),
        ("tune --init= --lam 3", "needs a pre-trained f"),
        ("tune --target=", "^--target: name the folder of target images"),
        ("tune --target nowhere", "nowhere: no data set here"),
        ("tune --micro-batch 3", "^--micro-batch 3 does not divide the 8 images"),
    ],
)
def test_refusals(sets, pretrained, tmp_path, more, message):
    """Before f^S is trained, and before the folder belongs to settings that cannot be."""
    run = tmp_path / "run"
    with pytest.raises(InputError, match=message) as error:
        if more.startswith("tune "):
            finetune(sets, run, pretrained, *more.split()[1:])
        else:
            pretrain(sets, run, *more.split())
    assert "\n" not in str(error.value) and not (run / "config.json").exists()


def changed(sets: Path, tmp_path: Path, name: str, **arrays) -> str:
    """A copy of a data set with other arrays. Its checksums would no longer fit and are left out."""
    folder = tmp_path / name
    if not folder.exists():
        shutil.copytree(sets / name, folder)
    meta = json.loads((folder / "meta.json").read_text())
    meta.pop("crc", None)
    (folder / "meta.json").write_text(json.dumps(meta | arrays.pop("meta", {})))
    for field, array in arrays.items():
        np.save(folder / f"{field}.npy", array)
    return str(folder)


def test_masks_of_0_and_1_are_refused(sets, tmp_path):
    masks = np.load(sets / "source/masks.npy") // 255
    source = changed(sets, tmp_path, "source", masks=masks)
    np.save(tmp_path / "ones.npy", np.load(sets / "target/masks.npy") // 255)
    with pytest.raises(InputError, match="ones.npy: the largest value is 1, no foreground: write"):
        pretrain(sets, tmp_path / "run", "--target-masks", f"{tmp_path}/./ones.npy")
    with pytest.raises(InputError, match="source/masks.npy: the largest value is 1, no foreground: write"):
        pretrain(sets, tmp_path / "run", "--source", source)
    pretrain(sets, tmp_path / "run", "--source", source, "--masks", "none", "--xc", "0", "--epochs", "0.2")


@pytest.mark.parametrize("flag, name", [("--source", "source"), ("--validation", "source_test")])
def test_labels_without_a_root_are_refused(sets, tmp_path, flag, name):
    """What no labelled set may contain is in test_data.py."""
    keypoints = np.load(sets / name / "keypoints.npy")
    keypoints[:, HAND["root"]] = np.nan
    other = changed(sets, tmp_path, name, keypoints=keypoints)
    with pytest.raises(InputError, match=f"{name}/keypoints.npy: no image has a label of the root, wrist"):
        finetune(sets, tmp_path / "run", "", "--lam", "0", flag, other)


def test_validation_set_of_another_skeleton_is_refused(sets, tmp_path):
    other = changed(sets, tmp_path, "source_test", meta={"joints": [f"own_{i}" for i in range(21)]})
    with pytest.raises(InputError, match='name another --validation, or "" for none$'):
        finetune(sets, tmp_path / "run", "", "--lam", "0", "--validation", other)


# ==== Run folders: one run, its settings, its data ======================================================
def test_a_finished_run_says_so_and_changes_nothing(sets, pretrained, finetuned, capsys):
    before = {path: path.read_bytes() for run in (pretrained, finetuned) for path in run.iterdir()}
    pretrain(sets, pretrained)
    finetune(sets, finetuned, pretrained)
    out = capsys.readouterr().out
    assert out.count(f"finished: {pretrained}") == 1 and out.count(f"finished: {finetuned}") == 1
    assert "continues" not in out
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("name, folder", [("source", "source"), ("validation", "source_test")])
def test_other_data_are_refused(sets, pretrained, finetuned, tmp_path, name, folder):
    """In the same place, as far as the settings say: other content."""
    shutil.copytree(finetuned, tmp_path / "run")
    other = changed(sets, tmp_path, folder, meta={"name": "changed"})
    config = json.loads((tmp_path / "run/config.json").read_text())
    config["settings"][name] = other
    (tmp_path / "run/config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=f"other settings.*{name}'s data: .* there, .* now"):
        finetune(sets, tmp_path / "run", pretrained, f"--{name}", other)


def test_target_masks_are_predicted_again(sets, pretrained, tmp_path):
    """If they were removed, or if the run begins again: then they may be those of another f^S."""
    run, masks = tmp_path / "run", np.load(pretrained / "target_masks.npy")
    shutil.copytree(pretrained, run)
    (run / "target_masks.npy").unlink()
    pretrain(sets, run)
    assert np.array_equal(np.load(run / "target_masks.npy"), masks)
    for path in run.glob("*.pt"):
        path.unlink()
    np.save(run / "target_masks.npy", masks + 1)
    pretrain(sets, run)
    assert np.array_equal(np.load(run / "target_masks.npy"), masks)


def test_a_loss_that_is_not_finite_stops_the_run(sets, pretrained, tmp_path, monkeypatch):
    """It names its step and term. The last checkpoint stays as it was."""
    with pytest.raises(InputError, match="^L_WMAE is (nan|inf) at step [2-7]; the last checkpoint is intact"):
        pretrain(sets, tmp_path / "a", "--variant", "mae", "--lr", "1e6")
    assert not (tmp_path / "a/checkpoint.pt").exists()
    plain, calls = udapose.attention_loss, iter(range(99))
    spoilt = lambda *maps: plain(*maps) * (float("nan") if next(calls) == 4 else 1)  # noqa: E731
    monkeypatch.setattr(udapose, "attention_loss", spoilt)
    with pytest.raises(InputError, match="^L_attn is nan at step 5; the last checkpoint is intact"):
        finetune(sets, tmp_path / "b", pretrained)
    state = checkpoint(tmp_path / "b")
    assert state["step"] == 4 and all(tensor.isfinite().all() for tensor in weights(tmp_path / "b").values())


def test_own_data_with_another_joint_set(sets, tmp_path):
    """Three joints, root in the middle, through both scripts; the target has images only."""
    rng = np.random.default_rng(0)
    arrays = {
        "images": rng.integers(0, 255, (24, 60, 60, 3), dtype=np.uint8),
        "masks": np.uint8(255) * (rng.random((24, 60, 60)) < 0.3),
        "keypoints": np.float32(rng.uniform(-60, 60, (24, 3, 3)) + (0, 0, 500)),
        "intrinsics": np.tile(np.float32([[200, 0, 29.5], [0, 200, 29.5], [0, 0, 1]]), (24, 1, 1)),
    }
    meta = {"name": "lamp", "joints": ["foot", "hinge", "shade"], "root": 1, "depth_range": 300}
    meta["bones"] = [[1, 0], [1, 2]]
    write_folder(tmp_path / "source", meta, 24, [arrays])
    write_folder(tmp_path / "target", meta, 24, [{"images": arrays["images"]}])
    own = ["--source", f"{tmp_path}/source", "--target", f"{tmp_path}/target"]
    pretrain(sets, tmp_path / "a", *own)
    finetune(sets, tmp_path / "b", tmp_path / "a", *own, "--validation", f"{tmp_path}/source")
    state = checkpoint(tmp_path / "b")
    assert state["skeleton"]["joints"] == meta["joints"] and state["skeleton"]["root"] == 1
    assert state["head"]["conv.weight"].shape[0] == 3 * 24  # K S channels, S = 4 x 6 patches
    assert 5 < log(tmp_path / "b")[-1]["source_val_epe"] < 500


# ==== What users bring: public weights, masks of another run, few target images, changed validation images
def test_stage_1_starts_from_public_weights(sets, pretrained, tmp_path, capsys):
    state = checkpoint(pretrained)
    torch.save({"model": state["encoder"] | state["decoder"]}, tmp_path / "mae.pth")  # MAE's key names
    pretrain(sets, tmp_path / "run", "--variant", "mae", "--init", f"{tmp_path}/mae.pth", "--lr", "0")
    assert same(weights(tmp_path / "run"), weights(pretrained))
    said = capsys.readouterr().out
    assert "mae.pth" in said and "MAE: only 7 steps" in said and "--epochs 1.3" in said


def test_target_masks_of_another_run(sets, pretrained, tmp_path):
    pretrain(sets, tmp_path / "run", "--target-masks", str(pretrained))
    assert same(weights(tmp_path / "run"), weights(pretrained))
    assert not (tmp_path / "run/segmentation.pt").exists()  # f^S is not trained again
    with pytest.raises(InputError, match="belong to other target images"):
        pretrain(sets, tmp_path / "other", "--target", f"{sets}/xc", "--target-masks", str(pretrained))
