"""Measure finished runs, print them as one table, draw what the paper's figures show.

    python evaluate.py                                  every finished run under runs/, table and pictures
    python evaluate.py runs/tiny/full-seed0             these runs
    python evaluate.py --table assets/results runs      the table alone, from result.json files that exist
    python evaluate.py --table --paper runs             in the paper's order, its numbers beside ours
    python evaluate.py --sweep lam runs                 error against a setting, table and picture
    python evaluate.py --image PHOTO [--box X Y W H]    predict the pose on your own picture
    torchrun --nproc_per_node 8 evaluate.py runs        large test sets, shared out among processes

Errors are EPE (hands) or MPJPE (humans), Sec. 4.1: mean joint distance in mm with the roots aligned, on test
images that no training script opens. MPJPE is taken over the joints that the test set's meta.json lists under
"compare", else over all but the root. Each run's numbers go to its result.json.
"""
import argparse
import dataclasses
import itertools
import json
import re
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

import data
import train_finetune
import train_pretrain
import udapose as u

PCK_LIMIT = {"EPE": 50.0, "MPJPE": 150.0}  # mm: the PCK curve is taken over thresholds 0 .. so much


# ==========================================================================================================
# Metrics
# ==========================================================================================================
def pck_curve(errors: Tensor, limit: float, points: int = 101) -> tuple[Tensor, float]:
    """Share of joints within each threshold 0..limit mm, and the area under it; NaN does not count."""
    errors = errors[errors.isfinite()]
    thresholds = torch.linspace(0, limit, points)
    curve = torch.searchsorted(errors.sort().values, thresholds, right=True) / len(errors)   # (points,)
    return curve, float(torch.trapezoid(curve, thresholds) / limit)


def metric(joints: list[str]) -> str:
    """What the mean joint error of this skeleton is called."""
    return "MPJPE" if joints == data.HUMAN_JOINTS else "EPE"


def pose_metrics(predicted: Tensor, truth: Tensor, meta: dict) -> dict:
    """Errors of predicted (n, K, 3) against truth (n, K, 3), mm, camera: what a row of a table needs.

    meta: of the test set. pa_epe is after alignment by similarity, pa_rigid without scale, both on the
    compared joints.
    in_plane, depth: mean distance in x, y and mean |z|, roots aligned: what the camera sees, and what not.
    """
    errors, own = u.joint_errors(predicted, truth, meta["root"]), data.compared(meta)   # (n, K) mm
    p, t = predicted[:, own], truth[:, own]                                # (n, C, 3) mm, C compared joints
    few = t.isfinite().all(-1).sum(dim=1) < 3                              # two joints can always be aligned
    t = torch.where(few[:, None, None], torch.nan, t)
    similar, rigid = ((u.procrustes_align(p, t, rigid) - t).norm(dim=-1).nanmean() for rigid in (False, True))
    curve, auc = pck_curve(errors[:, own], PCK_LIMIT[metric(meta["joints"])])
    flat, deep = (u.joint_errors(predicted[..., part], truth[..., part], meta["root"])[:, own].nanmean()
                  for part in (slice(2), slice(2, 3)))
    return {"epe": float(errors[:, own].nanmean()), "in_plane": float(flat), "depth": float(deep),
            "pa_epe": float(similar), "pa_rigid": float(rigid), "auc": auc,
            "images": int(errors[:, own].isfinite().any(dim=1).sum()),
            "pck": [round(float(share), 4) for share in curve],
            "per_joint": [round(float(e), 3) for e in errors.nanmean(dim=0)],
            "compared": [meta["joints"][i] for i in own], "protocol": meta.get("protocol", "")}


def attention_lift(maps: Tensor, masks: Tensor, patch: int) -> tuple[Tensor, Tensor]:
    """Fig. 5 as numbers: the foreground's share of the attention, (n, L), and of the area, (n,).

    maps a_cls (n, L, N); masks (n, 1, H, W) in 0..1. The shares' ratio is 1 where attention ignores it.
    """
    area = u.foreground_share(masks, patch)                                # (n, N)
    share = (maps * area[:, None]).sum(-1) / maps.sum(-1)                  # (n, L)
    return share, area.mean(dim=1)


def overlap(predicted: Tensor, truth: Tensor) -> Tensor:
    """Pixels of the intersection and of the union of masks (n, 1, H, W), cut at 0.5: (n, 2)."""
    p, t = predicted.flatten(1) >= 0.5, truth.flatten(1) >= 0.5
    return torch.stack([(p & t).sum(dim=1), (p | t).sum(dim=1)], dim=1)


def mean_pose_error(labelled: data.Dataset, count: int, test: data.Dataset) -> float:
    """Chance: the error of answering every image with the mean root-relative pose of the labelled images."""
    root = test.meta["root"]
    poses = torch.from_numpy(np.array(labelled.keypoints[:count]))
    mean = (poses - poses[:, root:root + 1]).nanmean(dim=0, keepdim=True)  # (1, K, 3) mm
    truth = torch.from_numpy(np.array(test.keypoints))
    return float(u.joint_errors(mean.expand_as(truth), truth, root)[:, data.compared(test.meta)].nanmean())


# ==========================================================================================================
# Measuring one run
# ==========================================================================================================
@torch.no_grad()
def over_images(dataset: data.Dataset, what: str, measured) -> Tensor:
    """measured(rows) (b, ..) of all images of a test set, (n, ..), on the CPU, on every process.

    Of several processes each takes its turn, chunk by chunk; an image's values do not depend on their number.
    """
    rank, world = u.place_among_processes()
    progress, parts = u.Progress(f"{dataset.folder.name}, {what}", len(dataset), 1, rank=rank), []
    for rows in data.chunks(len(dataset))[rank::world]:
        parts.append(measured(rows).cpu())
        progress.show(int(rows[-1]) + 1)
    turns = itertools.zip_longest(*u.from_all_ranks(parts))
    return torch.cat([part for turn in turns for part in turn if part is not None])


def measure_pose(estimator, dataset: data.Dataset, side: int, device) -> dict:
    """Errors over a whole test set."""
    pairs = over_images(dataset, "poses", lambda rows: torch.stack(
        data.predict(estimator, dataset, rows, side, device), dim=1))                    # (n, 2, K, 3) mm
    return pose_metrics(*pairs.unbind(1), dataset.meta)


def with_masks(dataset: data.Dataset, rows: np.ndarray, side: int, device) -> tuple[Tensor, Tensor]:
    """Images of a test set (b, 3, H, W), normalised, with their true masks (b, 1, H, W)."""
    x, m, _ = data.crops(dataset, rows, data.no_augmentation(len(rows)), side, device, dataset.masks)
    return data.normalise(x), m


def measure_attention(encoder, dataset: data.Dataset, side: int, device) -> dict:
    """Lift of every block on a test set: the true foreground's share of attention over its area's."""
    def measured(rows):
        x, m = with_masks(dataset, rows, side, device)
        share, area = attention_lift(encoder.attention_maps(x), m, encoder.patch)
        return torch.cat([share, area[:, None]], dim=1)                                  # (b, L + 1)
    *share, area = over_images(dataset, "attention", measured).mean(dim=0)               # L + 1 scalars
    return {"lift": [round(float(v / area), 3) for v in share], "area": round(float(area), 4)}


def reconstruction_error(predicted: Tensor, patches: Tensor, m: Tensor, area: Tensor) -> Tensor:
    """(n, 2, 3): of an image's hidden patches the sum of the squared errors (a pixel's mean) and the number;
    on the foreground (half of the patch or more), on its edge (a tenth or more), and beside it.

    predicted, patches (n, N, P*P*3); m (n, N), 1 = hidden; area (n, N): share of foreground in a patch.
    """
    error = (predicted.float() - patches).square().mean(-1)                # (n, N)
    kinds = torch.stack([area >= 0.5, (area >= 0.1) & (area < 0.5), area < 0.1], dim=1)      # (n, 3, N)
    kinds &= m[:, None] > 0
    return torch.stack([(kinds * error[:, None]).sum(-1), kinds.sum(-1)], dim=1)             # (n, 2, 3)


def measure_reconstruction(mae, dataset: data.Dataset, s: dict, device) -> list[float]:
    """`reconstruction_error` of f^E and f^D as means over a whole test set: what Eq. (2) is worth."""
    N = (s["image"] // s["patch"]) ** 2
    noise = u.random_generator(0, "reconstruction").random((len(dataset), N), np.float32)

    def measured(rows):
        x, mask = with_masks(dataset, rows, s["image"], device)
        patches = u.patchify(x, s["patch"])                                              # (b, N, P*P*3)
        predicted, m = mae(x, torch.from_numpy(noise[rows]).to(device), s["mask_ratio"])
        if s["norm_pix"]: patches = u.normalise_patches(patches)                   # in the units of the loss
        return reconstruction_error(predicted, patches, m, u.foreground_share(mask, s["patch"]))
    total, count = over_images(dataset, "reconstruction", measured).double().sum(dim=0)      # 2 x (3,)
    return [round(float(v), 4) for v in total / count]                     # NaN where there is no such patch


def measure_masks(net, dataset: data.Dataset, side: int, device) -> float:
    """Intersection over union of f^S's masks and the true ones, over a whole test set."""
    def measured(rows):
        x, m = with_masks(dataset, rows, side, device)
        return overlap(net(x).sigmoid(), m)                                              # (b, 2)
    both, either = over_images(dataset, "masks", measured).sum(dim=0)
    return float(both / either)                                            # NaN where neither has foreground


def load_encoder(state: dict, path: Path) -> u.Encoder:
    """f^E of a checkpoint, of either stage."""
    s = state["settings"]
    with u.usable(path):
        # a block holds more than 12 width² numbers of 4 bytes; asked before they take memory
        if 48 * s["depth"] * s["width"] ** 2 > path.stat().st_size or s["image"] > 256 * s["patch"]:
            raise ValueError("its settings ask for larger weights than it holds")
        encoder = u.Encoder((s["image"], s["image"]), s["patch"], s["width"], s["depth"], s["heads"])
    u.load_parts(path, state, encoder=encoder)
    return encoder


def load_autoencoder(state: dict, path: Path, device) -> u.MaskedAutoencoder:
    """f^E and f^D of a pre-training checkpoint, ready to reconstruct."""
    s, encoder = state["settings"], load_encoder(state, path)
    sizes = (s[f"decoder_{key}"] for key in ("width", "depth", "heads"))
    decoder = u.Decoder(encoder.grid, s["patch"], s["width"], *sizes)
    u.load_parts(path, state, decoder=decoder)
    return u.MaskedAutoencoder(encoder, decoder).eval().to(device)


def load_estimator(path: Path, device) -> tuple[u.PoseEstimator, dict]:
    """f^E with f^H of a fine-tuned checkpoint, ready to predict, and the checkpoint."""
    state = u.read_checkpoint(path)
    if "head" not in state: raise u.InputError(f"{path}: holds no head; it is a checkpoint of pre-training")
    with u.usable(path):
        s, skeleton = state["settings"], dict.fromkeys(train_finetune.SKELETON) | state["skeleton"]
    data.check_fields(path, skeleton)
    encoder = load_encoder(state, path)
    with u.usable(path):
        if 64 * s["head_channels"] * s["width"] > path.stat().st_size:     # 4 x 4 kernels of 4 bytes a number
            raise ValueError("its settings ask for larger weights than it holds")
        head = u.KeypointHead(encoder.grid, s["width"], s["head_channels"], len(skeleton["joints"]))
    u.load_parts(path, state, head=head)
    return u.PoseEstimator(encoder, head).eval().to(device), state


def load_segmentation(path: Path, device) -> tuple[u.UNet, float] | None:
    """f^S of the pre-training run whose checkpoint is `path`, and the seconds of its training, or None."""
    seg = path.parent / "segmentation.pt"
    if not seg.exists(): return None
    state = u.read_checkpoint(seg)
    with u.usable(path): net = u.UNet(state["settings"]["seg_channels"])
    u.load_parts(seg, state, segmentation=net)
    return net.eval().to(device), state["seconds"]


def made_by(path: Path) -> dict:
    """How the run of this checkpoint was made beside its settings: torch, threads, processes, checksums of
    its data, and what the machine chose (precision, compile), from config.json; {} where there is none."""
    place = path.parent / "config.json"
    with u.usable(place):
        config = json.loads(place.read_text()) if place.exists() else {"settings": {}, "facts": {}}
        return config.pop("facts") | {key: value for key, value in config.items() if key != "settings"}


def logged(path: Path) -> list[dict]:
    """The lines of log.jsonl of the run of this checkpoint; [] where there is none. Call it in `usable`."""
    log = path.parent / "log.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def last_logged(path: Path) -> dict[str, dict]:
    """{stage: {name: its last value}} of a run's log: losses, their ratio, error on source validation."""
    last: dict[str, dict] = {}
    with u.usable(path.parent / "log.jsonl"):
        for line in logged(path): last.setdefault(line["stage"], {}).update(line)
    return last


def pretraining_of(path: Path, settings: dict) -> Path | None:
    """The checkpoint that a fine-tuned run started from: where --init says, or beside it; None, and said so,
    where it is gone or another one."""
    if not settings["init"] or Path(settings["init"]).is_file(): return None   # scratch; public weights
    known = made_by(path).get("data", {}).get("init")
    for folder in (Path(settings["init"]), path.parent.parent / Path(settings["init"]).name):
        before = folder / "checkpoint.pt"
        if before.exists() and known in (None, u.file_checksum(before)): return before
    if u.place_among_processes()[0] == 0:
        print(f"{path.parent}: {settings['init']} is not there, or was trained again since; measured "
              "without its pre-training", flush=True)
    return None


def measure_finetuned(path: Path, tests: dict[str, data.Dataset], device, known: dict | None = None) -> dict:
    """Errors on the test sets, chance, class attention; the same of the pre-training run, if it is there.
    known: see `measure_pretrained`."""
    estimator, state = load_estimator(path, device)
    s = state["settings"]
    try: labelled = data.Dataset(s["source"], "keypoints")
    except u.InputError as error:
        labelled = None
        if u.place_among_processes()[0] == 0: print(f"{path.parent}: measured without chance; {error}")
    result = {"kind": "finetuning", "settings": s, "steps": state["step"],
              "metric": metric(state["skeleton"]["joints"]), "seconds": round(state["seconds"], 1),
              "made_by": made_by(path), "logged": last_logged(path)}
    if labelled: result["labels"] = min(s["labels"] or len(labelled), len(labelled))
    before = pretraining_of(path, s)
    if before is not None: result["pretraining"] = measure_pretrained(before, tests, device, known)
    for name, dataset in tests.items():
        result[name] = measure_pose(estimator, dataset, s["image"], device)
        result[name]["chance"] = mean_pose_error(labelled, result["labels"], dataset) if labelled else np.nan
        if dataset.masks is not None:
            result[name]["attention"] = measure_attention(estimator.encoder, dataset, s["image"], device)
    return result


def measure_pretrained(path: Path, tests: dict[str, data.Dataset], device, known: dict | None = None) -> dict:
    """Mask IoU of f^S, class attention of f^A, errors of reconstruction on the test sets.

    known {checkpoint: its result on these test sets}, which rows share: what is there is not measured again.
    """
    known = {} if known is None else known
    if path.resolve() in known: return known[path.resolve()]
    state = u.read_checkpoint(path)
    s, result = state["settings"], {"kind": "pretraining", "settings": state["settings"],
                                    "seconds": round(state["seconds"], 1), "steps": state["step"],
                                    "made_by": made_by(path), "logged": last_logged(path)}
    mae = load_autoencoder(state, path, device)
    segmentation = load_segmentation(path, device)
    if segmentation: result["seg_seconds"] = round(segmentation[1], 1)
    for name, dataset in tests.items():
        result[name] = {}
        if dataset.masks is None: continue
        result[name]["attention"] = measure_attention(mae.encoder, dataset, s["image"], device)
        result[name]["reconstruction"] = measure_reconstruction(mae, dataset, s, device)
        if segmentation:
            result[name]["mask_iou"] = measure_masks(segmentation[0], dataset, s["image"], device)
    known[path.resolve()] = result
    return result


# ==========================================================================================================
# Tables over runs
# ==========================================================================================================
TABLES = {  # of the paper: (our row, its words, its errors FreiHAND to RHD, Human3.6M to 3DHP); "": reported
    "Tables 1 and 2": (
        ("", "Zhang et al., source only", 48.3, 121.8), ("scratch", "Ours (Scratch)", 46.3, 120.5),
        ("source-only-mae", "Ours (MAE), source only", 41.7, 113.5),
        ("source-only-no-xc", "Ours w/o X_C, source only", 38.6, 109.2),
        ("source-only", "Ours, source only", 37.1, 107.0), ("ddc", "DDC (our backbone)", 44.6, 115.6),
        ("dan", "DAN (our backbone)", 40.5, 109.5), ("dann", "DANN (our backbone)", 38.0, 107.9),
        ("mae-ddc", "DDC (our backbone, MAE weights)", "-", "-"),
        ("mae-dan", "DAN (our backbone, MAE weights)", "-", "-"),
        ("mae-dann", "DANN (our backbone, MAE weights)", "-", "-"), ("", "ISO", "-", "75.8 (PA)"),
        ("", "Zhang et al.", 35.4, 99.3), ("", "Kundu et al.", "-", 96.2), ("mae", "Ours (MAE)", 34.4, 101.3),
        ("no-xc", "Ours w/o X_C", 29.1, 94.6), ("full", "Ours", 28.0, 93.6)),
    "Table 3 without X_C": (
        ("mae", "Ours w/o FCR, AR", 34.4, 101.3), ("no-fcr-xc", "Ours w/o FCR", "-", "-"),
        ("no-xc-ar", "Ours w/o AR", "-", "-"), ("no-xc", "Ours", 29.1, 94.6)),
    "Table 3 with X_C": (
        ("no-fcr-ar", "Ours w/o FCR, AR", "-", "-"), ("no-fcr", "Ours w/o FCR", 34.6, 104.0),
        ("no-ar", "Ours w/o AR", 32.0, 98.1), ("full", "Ours", 28.0, 93.6)),
    "Table 4": (
        ("no-fcr", "Ours w/o S_S, S_T", 34.6, 104.0), ("source-masks", "Ours w/o S_T", 32.3, 100.6),
        ("full", "Ours", 28.0, 93.6), ("true-masks", "true S_T: an upper bound", "-", "-")),
    "Table 9, alpha = 4": (
        ("r0.5", "r = 0.5", 32.1, 104.1), ("full", "r = 0.75", 28.0, 93.6),
        ("r0.95", "r = 0.95", 29.4, 105.9)),
    "Table 9, r = 0.75": (
        ("alpha2", "alpha = 2", 31.1, 98.6), ("full", "alpha = 4", 28.0, 93.6),
        ("alpha8", "alpha = 8", 29.8, 99.0)),
    "Bounds": (("oracle", "target labels instead of the source's", "-", "-"),)}
CELLS = {"full": (1, 1, 1), "no-ar": (1, 1, 0), "no-xc": (1, 0, 1), "no-xc-ar": (1, 0, 0),  # FCR, X_C, AR
         "no-fcr": (0, 1, 1), "no-fcr-ar": (0, 1, 0), "no-fcr-xc": (0, 0, 1), "mae": (0, 0, 0)}
ROWS = [row for rows in TABLES.values() for row, *_ in rows]
FREE = {"preset", "variant", "task", "out", "seed", "init", "validation", "device", "threads", "compile",
        "checkpointing", "save_every", "log_every", "validate_every"}  # settings that tell no rows apart
DEFAULTS = {"finetuning": dataclasses.asdict(train_finetune.Settings()),  # for settings newer than a run
            "pretraining": dataclasses.asdict(train_pretrain.Settings())}
# two-sided 95 % of Student's t for 2, 3, .. 10 values; for more, that of 10: a little too wide an interval
T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)


def spread(values: list[float], digits: int = 1) -> str:
    """Mean and, over several seeds, the sample standard deviation; "-" where one is not known (NaN)."""
    if np.isnan(values).any(): return "-"
    mean = f"{np.mean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {np.std(values, ddof=1):.{digits}f}"


def means(values: list[list[float]], digits: int) -> str:
    """Means over the seeds of values (seeds, n); "-" where a seed's are not known or not n."""
    if not values or not all(values) or len(set(map(len, values))) > 1 or np.isnan(values).any(): return "-"
    return " ".join(f"{v:.{digits}f}" for v in np.mean(values, axis=0))


def per_block(results: list[dict]) -> str:
    """Lift of each block on the target, mean over seeds; "-" without true masks, or without pre-training."""
    return means([r.get("target", {}).get("attention", {}).get("lift") for r in results], 2)


def group_of(result: dict) -> str:
    """First word of a row: preset and task."""
    return u.run_group(result["settings"]["preset"], result["settings"].get("task", "hand"))


def row_of(result: dict) -> str:
    """A run's row in the tables of its group: the name of its folder without -seedN; its runs
    differ in the seed alone."""
    return re.sub(r"-seed\d+$", "", Path(result["settings"]["out"]).name).removeprefix("pretrain-")


def row_name(result: dict) -> str:
    """A run's row among those of all groups: `tiny full`."""
    return f"{group_of(result)} {row_of(result)}"


def names_of(results: list[dict]) -> set[str]:
    """The rows of the fine-tuning runs, whatever their group."""
    return {row_of(r) for r in results if r["kind"] == "finetuning"}


def settings_of(result: dict) -> dict:
    """What tells a row's runs apart: test set, settings; pretraining.NAME: those of the pre-training run; not
    what --alike names.

    Steps stand for the epochs of fine-tuning: fewer labels in more epochs are the same training.
    """
    s = DEFAULTS[result["kind"]] | result["settings"]
    known = {k: v for k, v in s.items() if k not in FREE} | {"test": test_of([result])}
    # an old file may lack these; labels: their number, where the setting says 0, all
    known |= {k: result[k] for k in ("labels", "source_test") if k in result}
    prefix = "pretraining."                                                # --alike may name them with it
    if result["kind"] == "finetuning":
        before, prefix = {}, ""
        if "pretraining" in result: before = DEFAULTS["pretraining"] | result["pretraining"]["settings"]
        known |= {f"pretraining.{k}": v for k, v in before.items() if k not in FREE}
        known["init"] = "a run" if before else re.sub(r"-seed\d+$", "", s["init"])
        known |= {"steps": result["steps"]} if "steps" in result else {}                 # an old file may not
        known |= {"pretraining.seed": before["seed"]} if before else {}
        del known["epochs"]
    return {k: v for k, v in known.items() if {k, prefix + k}.isdisjoint(result.get("alike", ()))}


def by_settings(results: list[dict], but: str = "") -> dict[str, list[dict]]:
    """Results by their settings, `but` one: {", lam 10": some, ", lam 100": others}; {"": all} if all alike.

    Of runs that differ in nothing, the first counts. A setting that an old file lacks splits rows only where
    the others differ in it; then it is printed as ?.
    """
    known, groups = [settings_of(r) for r in results], {}
    if len({s.get("pretraining.seed") for s in known}) > 1:                # not one pre-training for all
        for r, s in zip(results, known):
            if s.get("pretraining.seed") == r["settings"]["seed"]: s["pretraining.seed"] = "the same"
    names = dict.fromkeys(k for s in known for k in s if k != but)
    differ = [k for k in names if len({s[k] for s in known if k in s}) > 1]
    for r, s in zip(results, known):
        group = groups.setdefault(tuple(s.get(k, "?") for k in differ), {})
        group.setdefault((r["settings"]["seed"], s.get(but)), r)
    return {"".join(f", {k} {plain(v)}" for k, v in zip(differ, key)): list(groups[key].values())
            for key in sorted(groups, key=lambda key: [in_order(v) for v in key])}


def plain(value) -> str:
    """A setting's value as it is printed: 0.75, not 0.750."""
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)


def in_order(value) -> tuple:
    """Sorting key of settings' values: numbers before words."""
    return (False, value) if isinstance(value, (int, float)) else (True, str(value))


class Row(NamedTuple):
    """A line of a table: runs that differ in the seed alone."""
    name: str                 # tiny full
    what: str                 # what tells it from others of its name: ", lam 10", ", lam 100"
    family: str               # differences stay in it
    runs: list[dict] | None   # their results; []: not run; None: the paper's alone


def rows_of(results: list[dict], kind: str) -> list[Row]:
    """The rows of the results of one kind, in the order of the paper's tables; families: `group_of`."""
    named: dict[str, list] = {}
    for r in results:
        if r["kind"] == kind: named.setdefault(row_name(r), []).append(r)
    return [Row(name, what, group_of(runs[0]), runs) for name in sorted(named, key=paper_order)
            for what, runs in by_settings(named[name]).items()]


def paper_order(name: str) -> tuple:
    """Sorting key of a row: preset, then where the paper names it last, then the alphabet. One of another
    length of pre-training (`tables_with`) stands with its own."""
    preset, row = name.split(" ", 1)
    own = re.sub(r"-?epochs\d+$", "", row) or "full"
    return preset != "tiny", preset, -ROWS[::-1].index(own) if own in ROWS else 1, row


def paired_difference(group: list[dict], reference: list[dict]) -> str:
    """Error minus the reference row's, over the seeds of both: mean [95 % interval, from two on].

    Where a row has more seeds than these, their number follows: it is then not the difference of the means.
    """
    ours, theirs = by_seed(group), by_seed(reference)
    d = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
    fewer = 0 < len(d) < max(len(ours), len(theirs))
    return interval(d) + f" ({len(d)} seed{'s' * (len(d) > 1)})" * fewer


def by_seed(group: list[dict]) -> dict[int, float]:
    """{seed: error whose differences are taken, --of} of the runs of a row."""
    of = differences_of(group)
    def error(r): return r["target"]["epe"] - r["source"]["epe"] if of == "gap" else r[of]["epe"]
    return {r["settings"]["seed"]: error(r) for r in group}


def differences_of(group: list[dict]) -> str:
    """target, source or gap, as --of says."""
    return group[0].get("of", "target") if group else "target"


def interval(d: list[float]) -> str:
    """Mean of differences and, from two on, its 95 % interval by Student's t."""
    if len(d) < 2: return f"{d[0]:+.1f}" if len(d) else "-"
    half = T95[min(len(d), 10) - 2] * np.std(d, ddof=1) / len(d) ** 0.5
    return f"{np.mean(d):+.1f} [{np.mean(d) - half:+.1f}, {np.mean(d) + half:+.1f}]"


def effects(rows: list[Row], error: str) -> list[list[str]]:
    """Lines of text: what each switch of CELLS does to the error, over its four pairs of cells; or why
    that cannot be said; none where a cell was not run.

    An interval is over the seeds (of which all eight cells were run), each with the mean of its four pairs.
    """
    parts = {cell: [row.runs for row in rows if row_of(row.runs[0]) == cell] for cell in CELLS}
    cells = {cell: by_seed(groups[0]) if groups else {} for cell, groups in parts.items()}
    seeds = sorted(set.intersection(*map(set, cells.values())))
    if not seeds: return []
    why = [f"{cell} is several rows" for cell, groups in parts.items() if len(groups) > 1]
    tests = sorted({test_of(groups[0]) for groups in parts.values()})
    if len(tests) > 1: why.append(f"cells are of {', '.join(tests)}")
    if why: return [["switch", "not told"], ["FCR, X_C, AR", why[0]]]
    of = differences_of(parts["full"][0])
    lines = [["switch", "seeds", f"{of} {error} with it minus without [95 %]", "lower in"]]
    for i, switch in enumerate(("FCR", "X_C", "AR")):
        pairs = [(on, off) for on, a in CELLS.items() for off, b in CELLS.items()
                 if a[i] and not b[i] and a[:i] + a[i + 1:] == b[:i] + b[i + 1:]]
        d = np.array([[cells[on][s] - cells[off][s] for on, off in pairs] for s in seeds])   # (seeds, 4)
        lower = f"{(d < 0).sum()} of {d.size} pairs"
        lines.append([switch, str(len(seeds)), interval(d.mean(axis=1)), lower])
    return lines


def references(rows: list[Row], minus: str) -> dict[str, list[dict]]:
    """{family: results of its row of the name `minus`}. InputError where there are several."""
    found: dict[str, Row] = {}
    for row in rows:
        if row_of(row.runs[0]) == minus and found.setdefault(row.family, row) is not row:
            several = "; ".join(r.name + r.what for r in (found[row.family], row))
            raise u.InputError(f"--minus {minus}: is several rows: {several}")
    return {family: row.runs for family, row in found.items()}


def table_of(rows: list[Row], error: str, rigid: bool, minus: str, known: list[Row]) -> list[list[str]]:
    """Lines of text, the header first; differences stay in a family, and are to the row above, to the first,
    or to the one of `known` that is named `minus`.

    The lift of the class attention on the target's foreground is that of f^A, before fine-tuning, and of
    f^E. PA: aligned by similarity, or `rigid`.
    """
    aligned, pa = (f"rigid PA-{error}", "pa_rigid") if rigid else (f"PA-{error}", "pa_epe")
    against = {"above": "row above", "first": "first row"}.get(minus, minus)
    of = next((differences_of(row.runs) for row in rows if row.runs), "target")
    against = f"minus {against} [95 %]" if of == "target" else f"{of}: minus {against} [95 %]"
    lines = [["run", "seeds", f"target {error}", against, f"target {aligned}", "target AUC",
              "in plane, depth", f"source {error}", "lift before", "attention lift"]]
    reference = references(known, minus)
    for name, what, family, runs in rows:
        if not runs:
            lines.append([name, "reported" if runs is None else "not run", *[""] * 8])
            continue
        column = lambda domain, key, digits=1: spread(  # noqa: B023, E731
            [r[domain].get(key, float("nan")) for r in runs], digits)
        axes = [[r["target"].get(key, float("nan")) for key in ("in_plane", "depth")] for r in runs]
        before = reference.get(family, [])
        lines.append([name + what, str(len(runs)), column("target", "epe"),
                      paired_difference(runs, before if before is not runs else []), column("target", pa),
                      column("target", "auc", 3), means(axes, 1), column("source", "epe"),
                      per_block([r.get("pretraining", {}) for r in runs]), per_block(runs)])
        if minus == "above" or minus == "first" and family not in reference: reference[family] = runs
    return lines


def measured_by(results: list[dict], error: str) -> list[dict]:
    """The fine-tuning runs whose error is called so, EPE or MPJPE."""
    return [r for r in results if r["kind"] == "finetuning" and r.get("metric", "EPE") == error]


def table(results: list[dict], error: str = "EPE", rigid: bool = False,
          minus: str = "above") -> list[list[str]]:
    """All rows that were run, measured by `error`, and chance."""
    rows = measured_rows(results, error)
    return table_of(rows, error, rigid, minus, rows) + chance(rows)


def measured_rows(results: list[dict], error: str) -> list[Row]:
    """The rows of the fine-tuning runs measured by `error`; of several target test sets each is a family, for
    no difference is taken between errors of two. They go by name: the same rendering has other last bits, and
    so another fingerprint, on another kind of CPU."""
    rows = rows_of(measured_by(results, error), "finetuning")
    if len({test_of([r]) for row in rows for r in row.runs}) < 2: return rows
    return [Row(name, f"{what} on {test_of(runs)}", f"{family} on {test_of(runs)}", runs)
            for name, what, family, runs in rows]


def test_of(group: list[dict]) -> str:
    """The name of the target test set of a row's results."""
    return group[0].get("test", "target_test")


def chance(rows: list[Row]) -> list[list[str]]:
    """The last lines of a table: what answering with the mean pose of the labelled images would give; of each
    family's first row, where the families were not trained or tested on the same data."""
    errors = {}                                                            # {family: [target, source]}
    for row in rows:
        numbers = [spread([row.runs[0][domain]["chance"]]) for domain in ("target", "source")]
        errors.setdefault(row.family, numbers)
    lines = [["chance: constant mean pose", "", target, *[""] * 4, source, "", "1.00 everywhere"]
             for target, source in errors.values()]
    if all(line == lines[0] for line in lines): return lines[:1]
    return [[f"{family} {line[0]}", *line[1:]] for family, line in zip(errors, lines)]


def tables_with(names: set[str]) -> dict[str, tuple]:
    """TABLES; behind each, once more, what was run of it with a shorter pre-training: its rows of the names
    ROW-epochsN, where `epochsN` alone is `full`."""
    lengths = sorted({word for word in re.findall(r"epochs\d+$", "\n".join(names), re.M)})
    tables = {}
    for title, rows in TABLES.items():
        tables[title] = rows
        for length in lengths:
            short = [(row and f"{row}-{length}".removeprefix("full-"), *words) for row, *words in rows]
            if any(row in names for row, *_ in short if row != length): tables[f"{title}, {length}"] = short
    return tables


def paper_tables(results: list[dict], error: str, rigid: bool, minus: str) -> dict[str, list[list[str]]]:
    """{title: lines} in the paper's order and words, its numbers last; what nobody ran says "not run"."""
    made, tables = measured_rows(results, error), {}
    for preset in dict.fromkeys(group_of(row.runs[0]) for row in made):
        ran = [row for row in made if group_of(row.runs[0]) == preset]
        for title, rows in tables_with(names_of([row.runs[0] for row in ran])).items():
            found, numbers = [], [f"paper: {'Human3.6M to 3DHP' if error == 'MPJPE' else 'FreiHAND to RHD'}"]
            for name, words, *errors in rows:
                number = str(errors[error == "MPJPE"])
                if not name and number == "-": continue                    # the paper's, of its other table
                own = [row._replace(name=f"{name}: {words}") for row in ran if row_of(row.runs[0]) == name]
                found += own or [Row(f"{name}: {words}" if name else words, "", "", [] if name else None)]
                numbers += [number] * (len(own) or 1)
            lines = table_of(found, error, rigid, minus, ran)
            tables[f"{preset}: {title}"] = [[*line, number] for line, number in zip(lines, numbers)]
        tables[f"{preset}: {title}"] += [[*line, "-"] for line in chance(ran)]           # below the bounds
        if lines := effects(ran, error): tables[f"{preset}: FCR, X_C, AR in all eight cells"] = lines
    return tables


def sweep(results: list[dict], setting: str, error: str) -> dict[str, dict]:
    """{line: {value of the setting: results}}: runs of one variant that differ in nothing else but the seed.

    A setting of the pre-training goes by its own name where fine-tuning has none of that name.
    """
    lines, variants = {}, {}
    for r in measured_by(results, error):
        key = next((k for k in (setting, f"pretraining.{setting}") if k in settings_of(r)), None)
        if key: variants.setdefault((f"{group_of(r)} {r['settings']['variant']}", key), []).append(r)
    for (name, key), runs in variants.items():
        runs = sorted(runs, key=lambda r: row_name(r) != name)  # of two alike that of the variant's own name
        value = lambda r: settings_of(r)[key]  # noqa: B023, E731
        alike = by_settings(runs, key).values()
        kept = [r for group in alike if len(set(map(value, group))) > 1 for r in group]
        for what, group in by_settings(kept, key).items():
            values = sorted(set(map(value, group)), key=in_order)
            lines[name + what] = {v: [r for r in group if value(r) == v] for v in values}
    return lines


def error_notes(results: list[dict]) -> list[str]:
    """The joints that errors are taken over, where not all, and the protocol of the test sets, each once."""
    notes: dict[str, list] = {}                                            # what is said: of which domains
    for domain, key, usual in (("target", "test", "target_test"), ("source", "source_test", "source_test")):
        sets: dict[tuple, dict] = {}                                   # {(task, name): {fingerprint: rows}}
        for r in results:
            rows = sets.setdefault((r["settings"].get("task", "hand"), r.get(key, usual)), {})
            if "tests" in r: rows.setdefault(r["tests"][domain], set()).add(row_of(r))
        names = {name for _, name in sets}
        if len(names) == 1 and usual not in names: notes[f"test set: {', '.join(names)}"] = [domain]
        for (_, name), rows in sets.items():
            if len(rows) < 2: continue
            few = sorted(min(rows.values(), key=len))
            notes[f"{name}: {len(rows)} sets of images, or renderings, go by this name; another than most in "
                  f"rows {', '.join(few[:8])}{', ..' * (len(few) > 8)}"] = [domain]
    for r, domain in ((r, domain) for r in results for domain in ("target", "source")):
        names, protocol = (r[domain].get(key, "") for key in ("compared", "protocol"))
        every = len(names) in (0, len(r[domain].get("per_joint", names)))  # as of hands: nothing to say
        if every and not protocol: continue
        note = f"{r.get('metric', 'EPE')} over {len(names)} joints, roots aligned: {', '.join(names)}"
        notes.setdefault("\n  ".join(filter(None, (note, protocol))), []).append(domain)
    return [f"{', '.join(dict.fromkeys(domains))} {note}" for note, domains in notes.items()]


def pretraining_table(results: list[dict]) -> list[list[str]]:
    """Rows of text, the header first: IoU of f^S; on the target, attention of f^A and errors of f^D."""
    lines = [["pre-training", "seeds", "IoU of f^S, target", "IoU of f^S, source", "attention lift",
              "error on, at edge of, beside the foreground"]]
    for name, what, _, runs in rows_of(results, "pretraining"):
        iou = [[r[domain]["mask_iou"] for r in runs if "mask_iou" in r[domain]]
               for domain in ("target", "source")]
        iou = [spread(values, 2) if values else "-" for values in iou]
        errors = [r["target"]["reconstruction"] for r in runs if "reconstruction" in r["target"]]
        lines.append([name + what, str(len(runs)), *iou, per_block(runs), means(errors, 3)])
    return lines


def show_table(lines: list[list[str]], markdown: bool) -> str:
    """Columns aligned, as text or as Markdown; nothing where there is only a header."""
    if len(lines) < 2: return ""
    widths = [max(len(row[i]) for row in lines) for i in range(len(lines[0]))]
    if markdown: lines = [lines[0], ["-" * w for w in widths]] + lines[1:]
    text = [" | ".join(cell.ljust(w) for cell, w in zip(row, widths)) for row in lines]
    return "\n".join(f"| {t} |" if markdown else t.rstrip() for t in text) + "\n"


def read_results(folders: list[str], test: str = "") -> list[dict]:
    """Every result.json below the folders, or named; or all measured on the test set `test`, "*" for any."""
    pattern = "*.json" if test else "*result.json"
    paths: dict[Path, Path] = {}                                           # each once
    for place in map(Path, folders):
        if not place.exists(): raise u.InputError(f"{place}: no such folder or file")
        for path in [place] if place.is_file() else sorted(place.rglob(pattern)):
            paths.setdefault(path.resolve(), path)
    found = []
    for path in paths.values():
        try: result = json.loads(path.read_text())
        except ValueError as error: raise u.InputError(f"{path}: not JSON ({error}); remove it") from error
        if not isinstance(result, dict) or "kind" not in result: continue  # another's file
        with u.usable(path):  # here, where the file has a name, not when a table of many is made
            pretraining_table([result]), table([result], result.get("metric", "EPE")), error_notes([result])
        if test in ("", "*", result.get("test", "target_test")): found.append(result | {"file": str(path)})
    if not found: raise u.InputError(f"{', '.join(folders)}: no result.json{f' of {test}' * bool(test)}; run "
                                     "evaluate.py without --table")
    return found


# ==========================================================================================================
# Pictures, drawn at twice their size and halved when saved, which smooths them: sizes here are doubled ones
# ==========================================================================================================
CELL, CHART, GAP, LINE = 384, (1000, 640), 14, 42  # a panel, a chart, space between, height of a line of text
LEFT, TOP, RIGHT, FOOT = 72, 54, 30, 48            # margins of axes; equal sums, so that a square stays one
FONT, SMALL = ImageFont.load_default(27), ImageFont.load_default(23)
PAPER, INK, GREY, PALE = (255, 255, 255), (40, 40, 40), (130, 130, 130), (225, 225, 225)
COLOURS = (*data.COLOURS, (140, 90, 50), (250, 120, 170), (100, 100, 100), (150, 160, 0))  # of runs,
COLOURS += tuple(tuple((part + shade) // 2 for part in colour)                             # of more: dark,
                 for shade in (0, 230) for colour in COLOURS)                              # then pale
HOT = 4.0  # heat overlays are red where a patch has so many times the mean, or more
POSE_TITLES = ["predicted", "front: x, y in mm", "from the right: z, y", "attention, mean of blocks"]
CURVES = {  # of log.jsonl: (title, the setting that it is multiplied by)
    "L_WMAE": ("L_WMAE, Eq. (3)", ""), "L_kpt": ("L_kpt, Eq. (5)", ""),
    "L_attn": ("lambda L_attn, Eq. (6)", "lam"),
    **{f"L_{name}": (f"L_{name} by its trade-off", "adapt_weight") for name in train_finetune.METHODS},
    "source_val_epe": ("error on source validation, mm", "")}


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a picture, its folder with it, and say so; InputError where that cannot be."""
    try: path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise u.InputError(f"{path.parent}: cannot be made ({error.strerror}); name another") from error
    u.write_atomically(path, lambda part: picture.reduce(2).save(part, "PNG"))
    print(f"wrote {path}", flush=True)


def fitting(text: str, width: float) -> str:
    """Text of at most so many px: what is too long loses its middle, for names often differ at the end."""
    whole, kept = text, len(text) // 2
    while FONT.getlength(text) > width and kept > 1:
        kept -= 1
        text = f"{whole[:kept]}..{whole[-kept:]}"
    return text


def sheet(rows: list[list], titles: list[str], heading: str) -> Image.Image:
    """Rows of equal panels (picture, caption) under a heading and a title for each column: one picture."""
    w, h = rows[0][0][0].size[0] + GAP, rows[0][0][0].size[1] + LINE + GAP
    width = max(GAP + max(map(len, rows)) * w, 2 * GAP + int(FONT.getlength(heading)))
    page = Image.new("RGB", (width, 2 * LINE + len(rows) * h), PAPER)
    draw = ImageDraw.Draw(page)
    draw.text((GAP, 6), heading, INK, FONT)
    for i, title in enumerate(titles): draw.text((GAP + i * w, LINE), title, INK, FONT)
    for r, row in enumerate(rows):
        for i, (panel, caption) in enumerate(row):
            page.paste(panel, (GAP + i * w, 2 * LINE + r * h))
            at = GAP + i * w, LINE - GAP + 4 + (r + 1) * h
            draw.text(at, fitting(caption, panel.size[0]), INK, FONT)
    return page


def to_panel(x: Tensor) -> Image.Image:
    """A square image (3, H, H) or mask (1, H, H) in 0..1 as a panel."""
    pixels = (255 * x.expand(3, -1, -1).clamp(0, 1)).round().byte().permute(1, 2, 0)     # (H, H, 3)
    return Image.fromarray(pixels.cpu().numpy()).resize((CELL, CELL), Image.Resampling.BICUBIC)


def heat(panel: Image.Image, values: Tensor) -> Image.Image:
    """Values (N,) of a square grid of patches over a panel: blue is 0, red HOT times their mean and more."""
    side = round(len(values) ** 0.5)
    hue = (170 * (1 - values / values.mean() / HOT)).clamp(min=0).byte().reshape(side, side)  # 170: blue
    layer = Image.merge("HSV", [Image.fromarray(hue.cpu().numpy()), *2 * [Image.new("L", (side, side), 255)]])
    layer = layer.convert("RGB").resize(panel.size, Image.Resampling.NEAREST)  # one colour for a patch
    return Image.blend(panel.convert("L").convert("RGB"), layer, 0.45)


def ticks(a: float, b: float) -> list[float]:
    """Round numbers from a to b: at most six steps of 1, 2 or 5 times a power of ten."""
    low, high = sorted((float(a), float(b)))
    power = 10.0 ** np.floor(np.log10((high - low) / 6))
    step = float(next(m * power for m in (1, 2, 5, 10) if 6 * m * power >= high - low))
    return [step * i for i in range(int(np.ceil(low / step)), int(np.floor(high / step)) + 1)]


def axes(size: tuple, x: tuple, y: tuple, marks: dict[float, str] = {}):
    """A panel with a grid, x[0] left, x[1] right, y[0] below, y[1] above; and the map (n, 2) values -> px.

    marks {x: words} in place of round numbers below.
    """
    panel = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(panel)
    scale = (size[0] - LEFT - RIGHT) / (x[1] - x[0]), (TOP + FOOT - size[1]) / (y[1] - y[0])
    place = lambda p: (np.asarray(p) - (x[0], y[0])) * scale + (LEFT, size[1] - FOOT)    # noqa: E731
    for v, words in (marks or {v: f"{v:g}" for v in ticks(*x)}).items():
        draw.line([*place((v, y[0])), *place((v, y[1]))], PALE, 2)
        draw.text(tuple(place((v, y[0])) + (0, 6)), words, GREY, SMALL, anchor="ma")
    for v in ticks(*y):
        draw.line([*place((x[0], v)), *place((x[1], v))], PALE, 2)
        draw.text(tuple(place((x[0], v)) - (7, 0)), f"{v:g}", GREY, SMALL, anchor="rm")
    return panel, place


def view(pose: np.ndarray, truth: np.ndarray | None, across: int, bones: list) -> Image.Image:
    """Poses (K, 3) mm from the root, in parallel projection, y down; the truth thin and grey.

    across 0: x to the right, as the camera sees it. across 2: z to the right, as seen from the right of that.
    The scale is the truth's, one for all runs; smaller only where a pose would run out of the picture.
    """
    shown = pose if truth is None else truth
    low, high = np.nanmin(shown, axis=0), np.nanmax(shown, axis=0)
    middle = (low + high) / 2
    farthest = np.nanmax(np.abs(pose - middle)[:, [across, 1]])
    half = max(0.6 * (high - low).max(), 1.05 * farthest, 1.0)
    x, y = (middle[axis] + (-half, half) for axis in (across, 1))
    panel, place = axes((CELL, CELL), x, y[::-1])
    draw = ImageDraw.Draw(panel)
    if truth is not None: data.draw_skeleton(draw, place(truth[:, [across, 1]]), bones, 3, GREY)
    data.draw_skeleton(draw, place(pose[:, [across, 1]]), bones, 6)
    return panel


def chart(title: str, curves: dict[str, tuple], colours: dict[str, tuple], y: tuple = (),
          marks: dict[float, str] = {}) -> Image.Image:
    """Curves {name: (x, y)}, or with bars (x, y, spread), under a title. The legend is below, where no curve
    runs, and has room for all `colours`, so that the charts of a sheet are equal."""
    xs, ys = (np.concatenate([curve[i] for curve in curves.values()]) for i in (0, 1))
    margin = 0.05 * np.ptp(xs) if marks else 0
    x = (xs.min() - margin, xs.max() + margin) if marks else (0, xs.max())
    panel, place = axes(CHART, x, y or (0.9 * ys.min(), ys.max() or 1.0), marks)         # all 0: up to 1
    panel = ImageOps.expand(panel, (0, 0, 0, 38 * len(colours)), PAPER)
    draw = ImageDraw.Draw(panel)
    draw.text((LEFT, 6), title, INK, FONT)
    for i, (name, (x, y, *bars)) in enumerate(curves.items()):
        draw.line(place(np.transpose([x, y])).ravel().tolist(), colours[name], 5, joint="curve")
        if len(x) == 1: draw.circle(tuple(place((x[0], y[0]))), 9, colours[name])  # a line would not show
        for v, mean, half in zip(x, y, *bars) if bars else ():
            inside = PAPER if np.isnan(half) else colours[name]            # NaN: one value has no spread
            if half > 0: draw.line([*place((v, mean - half)), *place((v, mean + half))], colours[name], 3)
            draw.circle(tuple(place((v, mean))), 9, inside, colours[name], 4)
        draw.text((LEFT, CHART[1] + 38 * i), fitting(name, CHART[0] - LEFT), colours[name], FONT)
    return panel


# ---------------------------------------------------------------- Figures 2 to 5, and curves
@torch.no_grad()
def draw_reconstruction(path: Path, name: str, tests: dict, rows: np.ndarray, device) -> Image.Image:
    """Fig. 2: masked input, reconstruction, original and, if there is f^S, its mask and, where masks weight
    the loss, the weights w that this mask gives (the source's own masks are used in training)."""
    state = u.read_checkpoint(path)
    s, mae, f_S = state["settings"], load_autoencoder(state, path, device), load_segmentation(path, device)
    as_it_is = data.no_augmentation(len(rows))
    crops = [data.crops(d, rows % len(d), as_it_is, s["image"], device)[0] for d in tests.values()]
    x = data.normalise(torch.cat(crops))                                                 # (n, 3, H, W)
    patches = u.patchify(x, s["patch"])                                                  # (n, N, P*P*3)
    noise = torch.from_numpy(u.random_generator(0, "pictures").random(patches.shape[:2], np.float32))
    predicted, m = mae(x, noise.to(device), s["mask_ratio"])                           # (n, N, P*P*3), (n, N)
    if s["norm_pix"]:  # the output has no brightness or contrast of its own: lend it the true patch's
        predicted = predicted * (patches.var(-1, keepdim=True) + 1e-6).sqrt() + patches.mean(-1, keepdim=True)
    hidden = m[..., None] > 0                                                            # (n, N, 1)
    tiles = torch.where(hidden, 0.0, patches), torch.where(hidden, predicted, patches), patches
    images = [data.denormalise(u.unpatchify(t, s["patch"], mae.encoder.grid)) for t in tiles]
    panels = [[(to_panel(image), "") for image in row] for row in zip(*images)]
    weighted = np.repeat([s["masks"] in ("both", domain) for domain in tests], len(rows))             # (n,)
    for row, mask, used in zip(panels, f_S[0](x).sigmoid() if f_S else [], weighted):    # (1, H, W)
        w = u.foreground_weights(mask[None], s["patch"], s["alpha"] if used else 0.0)[0]  # (N,), Eq. (2) or 1
        row += [(to_panel(mask), "")]
        if s["masks"] == "none": continue
        row += [(heat(row[2][0], w), f"{float(w.min()):.1f} to {float(w.max()):.1f}")]
    titles = ["masked input", "reconstruction", "original", "mask by f^S", "w by this mask, Eq. (2)"]
    lent = "; norm_pix: contrast of the true patches" if s["norm_pix"] else ""
    heading = f"{name}: {', '.join(tests)} test, r = {s['mask_ratio']:g}; visible patches pasted{lent}"
    return sheet(panels, titles[:len(panels[0])], heading)


def in_panel(uv: Tensor, side: int) -> np.ndarray:
    """Pixels of the network's crop to pixels of a panel that shows it; pixel centres are integers."""
    return ((uv + 0.5) * CELL / side - 0.5).cpu().numpy()


@torch.no_grad()
def look_at(path: Path, dataset: data.Dataset, rows: np.ndarray, device) -> dict:
    """What a run makes of images: panels, attention (n, L, N), its lift (n, L) and, with a head, poses."""
    state = u.read_checkpoint(path)
    side, root, head = state["settings"]["image"], dataset.meta["root"], "head" in state
    estimator = load_estimator(path, device)[0] if head else None
    encoder = estimator.encoder if head else load_encoder(state, path).eval().to(device)
    x, m, A = data.crops(dataset, rows, data.no_augmentation(len(rows)), side, device, dataset.masks)
    maps = encoder.attention_maps(data.normalise(x))                                     # (n, L, N)
    share, area = attention_lift(maps, m, encoder.patch) if m is not None else \
        (torch.full(maps.shape[:2], torch.nan), torch.ones(len(maps)))
    seen = {"panels": [to_panel(image) for image in x], "maps": maps, "lift": share / area[:, None]}
    if not head: return seen
    both = data.predict(estimator, dataset, rows, side, device)     # predicted, true: 2 x (n, K, 3) mm
    K = data.transform_intrinsics(A, torch.from_numpy(dataset.intrinsics[rows]).to(device))
    return seen | {"error": u.joint_errors(*both, root)[:, data.compared(dataset.meta)].nanmean(dim=1),
                   "uv": [in_panel(u.project(p, K), side) for p in both],
                   "pose": [(p - p[:, root:root + 1]).cpu().numpy() for p in both]}


def pose_panels(panel, uv, pose, attention: Tensor, bones: list, true_uv=None, truth=None) -> list:
    """A row of Figs. 3 and 4: 2D skeleton (the true one thin), 3D from two sides, attention."""
    flat = panel.copy()
    if true_uv is not None: data.draw_skeleton(ImageDraw.Draw(flat), true_uv, bones, 2, PAPER)
    data.draw_skeleton(ImageDraw.Draw(flat), uv, bones, 5)
    return [flat, view(pose, truth, 0, bones), view(pose, truth, 2, bones), heat(panel, attention)]


def lift_caption(lift: Tensor) -> str:
    """Words for a lift; none where there was no mask."""
    return f"on foreground {float(lift):.2f} x" if lift.isfinite() else ""


def draw_poses(looks: dict[str, dict], count: int, bones: list, test: str) -> Image.Image:
    """Figs. 3 and 4: every image of the test set of this name under every run, one below the other."""
    rows = []
    for i, (name, seen) in ((i, item) for i in range(count) for item in looks.items()):
        (uv, true_uv), (pose, truth) = ([both[i] for both in seen[key]] for key in ("uv", "pose"))
        true, attention = seen["panels"][i].copy(), seen["maps"][i].mean(dim=0)
        data.draw_skeleton(ImageDraw.Draw(true), true_uv, bones, 5)
        panels = [true, *pose_panels(seen["panels"][i], uv, pose, attention, bones, true_uv, truth)]
        lift = lift_caption(seen["lift"][i].mean())
        rows.append(list(zip(panels, (name, f"error {float(seen['error'][i]):.1f} mm", "", "", lift))))
    return sheet(rows, ["true", *POSE_TITLES],
                 f"{test}; thin: true pose. Attention: share on the foreground / its area")


def draw_attention(looks: dict[str, dict], count: int, test: str) -> Image.Image:
    """Fig. 5: a_cls of every block, every image under every run."""
    rows = [[(seen["panels"][i], name)] + [(heat(seen["panels"][i], a), lift_caption(lift))
                                           for a, lift in zip(seen["maps"][i], seen["lift"][i])]
            for i in range(count) for name, seen in looks.items()]
    return sheet(rows, [test] + [f"block {i}" for i in range(1, max(map(len, rows)))],
                 f"Class attention, red: {HOT:g} times the mean. Below: share on the foreground / its area")


def draw_curves(runs: dict[str, list], colours: dict[str, tuple]) -> Image.Image | None:
    """Losses and validation error over the steps, from log.jsonl of the first seed of each run."""
    panels = []
    for key, (title, weight) in CURVES.items():
        curves = {}
        for name, ((path, result), *_) in runs.items():
            factor = result["settings"].get(weight, 0) if weight else 1
            with u.usable(path.parent / "log.jsonl"):
                lines = logged(path) if factor else []
                lines = [line for line in lines if np.isfinite(line.get(key, np.nan))]
                points = [(line["step"], factor * line[key]) for line in lines]
            if points: curves[name] = tuple(zip(*points))
        if curves: panels.append((chart(f"{title}, over steps", curves, colours), ""))
    rows = [panels[i:i + 2] for i in range(0, len(panels), 2)]
    return sheet(rows, [], "Training, first seed of each run") if rows else None


def draw_pck(runs: dict[str, list], colours: dict[str, tuple], test: str) -> Image.Image:
    """PCK over its threshold on a target test set, mean over the seeds of a run; areas in the legend."""
    curves, named = {}, {}
    for name, seeds in runs.items():
        label = f"{name}: {np.mean([result['target']['auc'] for _, result in seeds]):.3f}"
        pck = np.mean([result["target"]["pck"] for _, result in seeds], axis=0)          # (points,)
        limit = PCK_LIMIT[seeds[0][1].get("metric", "EPE")]
        curves[label], named[label] = (np.linspace(0, limit, len(pck)), pck), colours[name]
    panel = chart("over the threshold, mm; behind each name the area under it", curves, named, (0, 1))
    return sheet([[(panel, "")]], [], f"{test}: share of joints within a threshold of the truth")


def positions(values: list) -> np.ndarray:
    """Places of sorted values on an axis: words one apart; numbers, or log10 if they span a factor of 4.

    On a logarithmic axis 0 stands as far below the next value as that one below its next.
    """
    if any(isinstance(v, str) for v in values): return np.arange(len(values), dtype=float)
    above = [v for v in values if v > 0]
    if len(above) < 2 or above[-1] < 4 * above[0]: return np.array(values, dtype=float)
    logs = np.log10(above)
    return np.append([2 * logs[0] - logs[1]] * (len(values) - len(above)), logs)


def draw_sweep(lines: dict[str, dict], setting: str, error: str) -> Image.Image:
    """Target error against a setting: mean and standard deviation over the seeds, a curve for each line."""
    values = sorted({v for points in lines.values() for v in points}, key=in_order)
    at, curves = dict(zip(values, positions(values).tolist())), {}
    for name, points in lines.items():
        errors = [[r["target"]["epe"] for r in group] for group in points.values()]      # values, seeds
        deviation = [np.std(e, ddof=1) if len(e) > 1 else np.nan for e in errors]
        curves[name] = [at[v] for v in points], np.array([np.mean(e) for e in errors]), np.array(deviation)
    low = min((mean - np.nan_to_num(half)).min() for _, mean, half in curves.values())
    high = max((mean + np.nan_to_num(half)).max() for _, mean, half in curves.values())
    room = 0.1 * max(high - low, 1.0)
    colours = dict(zip(curves, COLOURS * len(curves)))
    panel = chart(f"over {setting}; mean and standard deviation over seeds (a ring: one)", curves, colours,
                  (low - room, high + room), {x: plain(v) for v, x in at.items()})
    return sheet([[(panel, "")]], [], f"Target {error}, mm")


def draw_all(paths: list[Path], results: list[dict], tests: dict, folder: Path, device) -> None:
    """All pictures of the runs of these checkpoints; those with images show the first seed of a run."""
    where = {id(result): path for path, result in zip(paths, results)}
    runs = {before + row.name + row.what: [(where[id(result)], result) for result in row.runs]   # its seeds
            for kind, before in (("pretraining", "pretrain "), ("finetuning", ""))
            for row in rows_of(results, kind)}
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(runs)}
    rows = data.with_root(tests["target"])
    rows = rows[np.unique(np.linspace(0, len(rows) - 1, 3).astype(int))]                 # not picked by hand
    rows = rows[:max(1, 12 // len(runs))]
    test = tests["target"].folder.name
    looks = {name: look_at(seeds[0][0], tests["target"], rows, device) for name, seeds in runs.items()}
    posed = {name: seen for name, seen in looks.items() if "pose" in seen}
    pictures = {"attention": draw_attention(looks, len(rows), test), "curves": draw_curves(runs, colours)}
    if posed: pictures["poses"] = draw_poses(posed, len(rows), tests["target"].meta["bones"], test)
    if posed: pictures["pck"] = draw_pck({name: runs[name] for name in posed}, colours, test)
    for name in sorted(runs.keys() - posed.keys()):
        picture = draw_reconstruction(runs[name][0][0], name, tests, rows, device)
        short = re.sub("[ ,/]+", "-", name.replace("pretrain", "reconstruction", 1))
        if len(short) > 150: short = f"{short[:140]}-{zlib.crc32(short.encode()):08x}"   # 255 are allowed
        pictures[short] = picture
    for name, picture in pictures.items():
        if picture: save_picture(picture, folder / f"{name}.png")


# ---------------------------------------------------------------- your own picture
def square_around(box: list[float] | None, size: tuple[int, int], name: str,
                  times: float) -> tuple[np.ndarray, float]:
    """Corner (2,) and width, px, of the square to crop: `times` box x y w h; None: the middle.

    Raises InputError for a box that is not inside the picture.
    """
    W, H = size
    x, y, w, h = box or ((W - min(size)) / 2, (H - min(size)) / 2, min(size), min(size))
    if not (x >= 0 and y >= 0 and w > 0 and h > 0 and x + w <= W and y + h <= H):  # NaN fails as well
        raise u.InputError(f"{name}: --box {x:g} {y:g} {w:g} {h:g} is not inside the picture, {W} x {H} px; "
                           "give left, top, width, height in its pixels")
    width = max(w, h) * (times if box else 1)
    return np.array([x + w / 2, y + h / 2]) - width / 2, width


def millimetres_per_pixel(uv: np.ndarray, depth: np.ndarray, state: dict) -> tuple[float, str]:
    """Scale of x, y in a photo without intrinsics, and the assumption. uv (K, 2) px, depth (K,) mm.

    Parallel projection, bones as long as in training: k with sum of k² |duv|² + dz² = sum of L². Where the
    depths dz alone are longer than that, a tenth of the sum is left for k.
    """
    s, known = state["settings"], state["skeleton"]
    a, b = np.array(known["bones"], int).reshape(-1, 2).T
    try: poses = data.Dataset(str(s.get("source")), "keypoints").keypoints[:1000]        # (n, K, 3) mm
    except u.InputError: poses = np.full((1, len(known["joints"]), 3), np.nan)
    L2 = np.square(poses[:, a] - poses[:, b]).sum(-1)                                    # (n, bones) mm²
    a, b, L2 = (x[..., np.isfinite(L2).any(axis=0)] for x in (a, b, L2))                 # of known length
    if not len(a): return known["depth_range"] / s["image"], f"no bone labels in {s.get('source')}, a guess"
    L2 = np.nanmean(L2, axis=0).sum()
    flat, deep = np.square(uv[a] - uv[b]).sum(), np.square(depth[a] - depth[b]).sum()
    why = "bones as long as in training" if deep <= 0.9 * L2 else "a guess: the depths alone are too long"
    return float(np.sqrt(max(L2 - deep, 0.1 * L2) / max(flat, 1e-6))), why


@torch.no_grad()
def draw_photo(path: Path, photo: str, box: list[float] | None, folder: Path, device) -> None:
    """Predict the pose on one's own picture: folder/PHOTO[-BOX]_pose.png, 2D, 3D, attention."""
    estimator, state = load_estimator(path, device)
    side, known = state["settings"]["image"], state["skeleton"]
    picture, _ = data.open_picture(Path(photo))                                          # (H, W, 3) uint8
    H, W, _ = picture.shape
    if min(H, W) < 16: raise u.InputError(f"{photo}: {W} x {H} px; give a picture of at least 16 x 16 px")
    kind = data.HUMAN if metric(known["joints"]) == "MPJPE" else data.HAND
    square = square_around(box, (W, H), photo, kind["box"])
    crop, panel = (data.crop_square(picture, *square, pixels) for pixels in (side, CELL))
    x = data.normalise(torch.tensor(crop, device=device).permute(2, 0, 1)[None].float() / 255)
    attention = estimator.encoder.attention_maps(x)[0].mean(dim=0)                       # (N,)
    coded = u.from_voxels(estimator.centres(x), side, known["depth_range"], estimator.head.side)
    uv, depth = (part[0].cpu().numpy() for part in coded)                                # (K, 2) px, (K,) mm
    scale, why = millimetres_per_pixel(uv, depth, state)
    pose = np.column_stack([scale * uv, depth])                                          # (K, 3) mm
    panels = pose_panels(Image.fromarray(panel), in_panel(torch.from_numpy(uv), side),
                         pose - pose[known["root"]], attention, known["bones"])
    assumed = f"assumed for x, y: no perspective; {why}: {scale * side:.0f} mm across the crop"
    page = sheet([[(panel, "") for panel in panels]], POSE_TITLES, assumed)
    where = "".join(f"-{v:g}" for v in box or ())                          # two hands of one picture
    save_picture(page, folder / f"{Path(photo).stem}{where}_pose.png")
    print(f"{photo}: {assumed}")


# ==========================================================================================================
# Command line
# ==========================================================================================================
def open_tests(source: str, target: str, task: str, rank: int) -> dict[str, data.Dataset]:
    """Labelled test sets of both domains: the folders named, else those of the embedded benchmark. Where one
    has masks too, attention on the foreground and IoU are measured."""
    kind = {"hand": "hands", "human": "bodies"}[task]
    folders = {"source": source or f"datasets/{kind}/source_test",
               "target": target or f"datasets/{kind}/target_test"}
    name = Path(folders["target"]).name
    if name in ("", "..", "config") or name.endswith("result"):  # `measure` would write over another file
        raise u.InputError(f"--target-test {target}: results are named after it, but {name}.json is another "
                           "file of a run; rename the folder")
    data.ensure_benchmark(list(folders.values()), rank)
    fields = {name: ["keypoints", "intrinsics"] + ["masks"] * (Path(folder) / "masks.npy").exists()
              for name, folder in folders.items()}
    tests = {name: data.Dataset(folder, *fields[name]) for name, folder in folders.items()}
    for dataset in tests.values(): data.with_root(dataset)
    return tests


def check_test_flags(path: Path, settings: dict, source: str, target: str) -> None:
    """InputError where a run on data of one's own would be measured on the embedded benchmark."""
    own, learned = {"source": source, "target": target}, [settings["source"], settings.get("target", "")]
    for folder in filter(None, learned):
        usual = data.in_benchmark(folder) and Path(folder).parent.parent == Path("datasets")
        missing = [] if usual else [f"--{name}-test" for name, given in own.items() if not given]
        if missing: raise u.InputError(f"{path.parent}: trained on {folder}; measure it by itself, with "
                                       f"{' and '.join(missing)}")


def finished_runs(folders: list[str], rank: int = 0) -> dict[Path, dict]:
    """{checkpoint: its kind, settings, skeleton if it has one} of the finished runs below the folders; an
    unfinished one is named and left out. InputError where none is finished."""
    runs: dict[Path, dict] = {}
    for folder in folders:
        here = sorted(Path(folder).rglob("checkpoint.pt"))
        if Path(folder).name == "checkpoint.pt" and Path(folder).is_file(): here = [Path(folder)]
        if not here: raise u.InputError(f"{folder}: no checkpoint.pt here or below; train first")
        for path in here:
            state = u.read_checkpoint(path)
            known = {"kind": "pretraining", "settings": state["settings"]}
            if "head" in state: known |= {"kind": "finetuning", "skeleton": state.get("skeleton")}
            with u.usable(path):
                step, steps, _ = (state[key] for key in ("step", "steps", "seconds"))
                row_name(known)
            if step == steps: runs[path] = known
            elif rank == 0: print(f"left out, not finished ({step} of {steps} steps): {path.parent}")
    if not runs: raise u.InputError(f"{', '.join(folders)}: no run is finished; start its training "
                                 "command again, it goes on")
    return {path: runs[path] for path in {path.resolve(): path for path in runs}.values()}  # each once


def measure(path: Path, tests: dict[str, data.Dataset], rank: int, device, known: dict | None = None) -> dict:
    """Measure one finished run and write result.json; TARGET-FOLDER.json where that is of another test set.

    An earlier result of other images under that name is kept, renamed to end in their fingerprints; of the
    same images, what it knew of a pre-training run or a source that is gone by now is taken over. known: see
    `measure_pretrained`.
    """
    what = {"tests": {n: d.fingerprint for n, d in tests.items()}, "test": tests["target"].folder.name,
            "source_test": tests["source"].folder.name, "torch": torch.__version__}
    for name in ("result", what["test"]):                                  # looked at before hours of work
        place, images = path.parent / f"{name}.json", "-".join(what["tests"].values())
        with u.usable(place):
            before = json.loads(place.read_text()) if place.exists() else what
            theirs = "-".join(before["tests"].values())
            if before.get("test", "target_test") == what["test"]: break    # of another test set: it stays
    if rank == 0: print(f"measuring {path.parent}", flush=True)
    pose = "head" in u.read_checkpoint(path)
    result = (measure_finetuned if pose else measure_pretrained)(path, tests, device, known) | what
    if rank: return result
    if theirs != images:
        kept = place.with_name(f"{place.name}.{theirs}")
        place.replace(kept)
        print(f"{place} was of other images, and is now {kept.name}")
    elif all(before.get(key) == result[key] for key in ("settings", "steps", "seconds")):
        with u.usable(place): keep_what_is_gone(before, result)
    u.write_json(place, result)
    return result


def keep_what_is_gone(before: dict, result: dict) -> None:
    """Fill in what an earlier result of the same run and images could measure, and this one could not."""
    for key in ("pretraining", "labels"):
        if key in before: result.setdefault(key, before[key])
    for domain in ("source", "target"):
        if np.isnan(result[domain].get("chance", 0)):
            result[domain]["chance"] = before.get(domain, {}).get("chance", np.nan)


def as_asked(results: list[dict], names: str = "", of: str = "target") -> list[dict]:
    """The results, their rows no longer split by the settings `names` (commas between), --alike; differences
    taken of the error on the target, on the source, or of the gap between the two, --of."""
    return [r | {"alike": set(words(names)), "of": of} for r in results]


def words(names: str) -> list[str]:
    """Of a list with commas between."""
    return [name.strip() for name in names.split(",") if name.strip()]


def check_alike(names: str) -> None:
    """InputError unless each of --alike is something that can split a row."""
    known = {k for k in DEFAULTS["finetuning"] if k not in FREE | {"epochs"}}
    known |= {f"pretraining.{k}" for k in DEFAULTS["pretraining"] if k not in FREE}
    known |= {"init", "steps", "test", "source_test", "pretraining.seed"}
    if wrong := sorted(set(words(names)) - known):
        raise u.InputError(f"--alike {wrong[0]}: choose {', '.join(sorted(known))}")


def check_minus(results: list[dict], minus: str) -> None:
    """InputError unless --minus is a row of these results, above or first."""
    names = names_of(results)
    if minus not in {"above", "first"} | names:
        raise u.InputError(f"--minus {minus}: choose {', '.join(['above', 'first', *sorted(names)])}")


def show_tables(results: list[dict], a: argparse.Namespace) -> None:
    """Print the tables asked for on the command line, and what their errors are taken over."""
    print()
    check_minus(results, a.minus)
    print(show_table(pretraining_table(results), a.markdown))
    for error in PCK_LIMIT:
        tables = {"": table(results, error, a.rigid, a.minus)}
        if a.paper: tables = paper_tables(results, error, a.rigid, a.minus)
        for title, lines in tables.items():
            print(f"{title}\n\n" * bool(title) + show_table(lines, a.markdown))
    others = names_of(results) - {row for rows in tables_with(names_of(results)).values() for row, *_ in rows}
    if a.paper and others: print(f"not in the paper's tables: {', '.join(sorted(others))}")
    for note in error_notes(results): print(note)
    say_left_out(results, [r for kind in ("pretraining", "finetuning") for row in rows_of(results, kind)
                           for r in row.runs])


def say_left_out(results: list[dict], shown: list[dict]) -> None:
    """Name the results that are not shown."""
    left = [r.get("file", r["settings"]["out"]) for r in results if all(r is not other for other in shown)]
    if left: print(f"not shown: {len(left)} of {len(results)} results, each has the row, seed and settings "
                   f"of one that is shown: {', '.join(left[:5])}{', ..' * (len(left) > 5)}")


def show_sweep(results: list[dict], a: argparse.Namespace, folder: Path) -> None:
    """Print and draw the error against one setting. Raises InputError if no runs differ in it alone."""
    check_minus(results, a.minus)
    found = {error: sweep(results, a.sweep.replace("-", "_"), error) for error in PCK_LIMIT}
    if not any(found.values()):
        known = [settings_of(r) for r in results if r["kind"] == "finetuning"]
        differ = sorted({k for s in known for k in s if any(other.get(k, s[k]) != s[k] for other in known)})
        raise u.InputError(f"--sweep {a.sweep}: no two runs of a variant differ in it and in nothing else; "
                           f"what differs here: {', '.join(differ) or 'nothing'}")
    def alike(r): return group_of(r), r["settings"]["variant"], r["settings"]["seed"], str(settings_of(r))
    for error, lines in found.items():
        rows = [Row(line, f", {a.sweep} {plain(value)}", line, runs) for line, points in lines.items()
                for value, runs in points.items()]
        shown = [r for row in rows for r in row.runs]
        say_left_out([r for r in measured_by(results, error) if alike(r) in map(alike, shown)], shown)
        print(show_table(table_of(rows, error, a.rigid, a.minus, rows), a.markdown))
        if lines and a.pictures != "none":
            save_picture(draw_sweep(lines, a.sweep, error), folder / f"sweep-{a.sweep}-{error}.png")


def parse_arguments(arguments) -> argparse.Namespace:
    """The command line; InputError where flags do not go together."""
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=shape, allow_abbrev=False)
    add = parser.add_argument
    add("runs", nargs="*", default=["runs"], help="run folders, or folders of runs [runs]")
    for name in ("source", "target"):
        add(f"--{name}-test", default="", help=f"labelled test folder of the {name} "
            f"[datasets/hands/{name}_test, of a human run datasets/bodies/{name}_test]")
    add("--table", action="store_true", help="only print the table of the result.json files that exist")
    add("--paper", action="store_true", help="the paper's tables: its rows, its words, its numbers")
    add("--minus", default="above", metavar="ROW", help="paired differences over common seeds: to the "
        "nearest row above that was run (above), to the first row (first), or to a row by its name [above]")
    add("--sweep", metavar="SETTING", help="error against a setting, table and picture, from result.json "
        "files: alpha, mask_ratio, lam, labels, steps, epochs (of pre-training), .., or test (the test sets)")
    add("--of", default="target", choices=("target", "source", "gap"), help="what differences are taken of: "
        "error on the target, on the source, or the gap, the one minus the other: what is adapted [target]")
    add("--alike", default="", metavar="SETTINGS", help="comma-separated settings that do not split a row, "
        "as init where some of its seeds started from a file of weights, others from a run")
    add("--rigid", action="store_true", help="PA errors in the table without scale (Procrustes is rigid)")
    add("--markdown", action="store_true", help="print the tables as Markdown")
    add("--pictures", default="", help="folder for pictures [RUNS/pictures; of another --target-test "
        "RUNS/pictures/ITS-NAME]; none: no pictures")
    add("--device", default="auto", help="auto, cpu, cuda [auto]")
    add("--threads", type=int, default=0, help="CPU threads; 0: torch's choice [0]")
    add("--image", help="predict the pose on this picture instead, with the first run named; a left hand: "
        "mirror the picture, for data.py turns all hands into right ones")
    add("--box", type=float, nargs=4, metavar=("X", "Y", "W", "H"),
        help="box around hand or body in --image, px: 1.5 (hands) or 1.25 (bodies) times it is cropped; "
        "without it, the largest square in the middle")
    a = parser.parse_args(arguments)
    if a.threads < 0: raise u.InputError(f"--threads {a.threads}: give a number not below 0")
    if a.box and not a.image: raise u.InputError("--box goes with --image")
    if a.image and (a.table or a.sweep or a.pictures == "none"):
        raise u.InputError("--image makes one picture: leave out --table, --sweep and --pictures none")
    if a.source_test and (a.table or a.sweep):
        raise u.InputError("--source-test: nothing is measured here, and results go by their target test set")
    check_alike(a.alike)
    return a


def main(arguments=None) -> int:
    """Measure, tabulate, draw; or predict on one picture."""
    a = parse_arguments(arguments)
    rank, _, device = u.setup_distributed(a.device)
    u.compute_with(a.threads)
    if rank and (a.image or a.sweep or a.table): return 0                  # nothing to share out
    first, test = Path(a.runs[0]), Path(a.target_test).name
    folder = Path(a.pictures or (first.parent if first.is_file() else first) / "pictures")
    if not (a.pictures or a.image or a.sweep) and test not in ("", "target_test"): folder /= test
    if a.image:
        path = next((path for path, run in finished_runs(a.runs).items() if "skeleton" in run), None)
        if path is None: raise u.InputError(f"{' '.join(a.runs)}: no finished fine-tuning run for --image")
        print(f"with {path.parent}")
        draw_photo(path, a.image, a.box, folder, device)
        return 0
    if a.sweep or a.table:
        results = as_asked(read_results(a.runs, "*" if a.sweep == "test" else test), a.alike, a.of)
        if a.sweep: show_sweep(results, a, folder)
        else: show_tables(results, a)
        return 0
    runs = finished_runs(a.runs, rank)
    check_minus(list(runs.values()), a.minus)
    by_task: dict[str, list[Path]] = {}                                    # checkpoints of hands, of humans
    for path, run in runs.items():
        with u.usable(path): check_test_flags(path, run["settings"], a.source_test, a.target_test)
        by_task.setdefault(run["settings"].get("task", "hand"), []).append(path)
    tests = {task: open_tests(a.source_test, a.target_test, task, rank) for task in by_task}
    for path, task in ((path, task) for task, paths in by_task.items() for path in paths):
        for dataset in tests[task].values() if runs[path].get("skeleton") else ():
            with u.usable(path): data.same_skeleton(dataset, runs[path]["skeleton"])
    measured = {}
    for task, paths in by_task.items():
        known: dict = {}                                                   # pre-training runs, measured once
        measured[task] = as_asked([measure(path, tests[task], rank, device, known) for path in paths],
                                  a.alike, a.of)
    if rank: return 0
    show_tables([result for results in measured.values() for result in results], a)
    for task, results in measured.items() if a.pictures != "none" else ():
        place = folder / task if len(measured) > 1 else folder
        draw_all(by_task[task], results, tests[task], place, device)
    return 0


if __name__ == "__main__": u.run_script(main)
