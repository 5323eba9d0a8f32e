"""Measure finished runs, print them as one table, draw what the paper's figures show.

    python evaluate.py                                  every finished run under runs/, table and pictures
    python evaluate.py runs/tiny/full-seed0             these runs
    python evaluate.py --table assets/results runs      the table alone, from result.json files that exist
    python evaluate.py --image PHOTO [--box X Y W H]    predict the pose on your own picture

Errors are EPE (hands) or MPJPE (humans), Sec. 4.1: mean joint distance in mm with the roots aligned, on test
images that no training script opens. Each run's numbers go to its result.json.
"""
import argparse
import json
import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import data
import udapose as u

PCK_LIMIT = 50.0  # mm: the PCK curve is taken over thresholds 0 .. PCK_LIMIT


# ==========================================================================================================
# Metrics
# ==========================================================================================================
def pck_curve(errors: Tensor, limit: float = PCK_LIMIT, points: int = 101) -> tuple[Tensor, float]:
    """Share of joints closer than each threshold 0..limit mm, and the area under it; NaN does not count."""
    errors = errors[errors.isfinite()]
    thresholds = torch.linspace(0, limit, points)
    curve = (errors[None] <= thresholds[:, None]).float().mean(dim=1)      # (points,)
    return curve, float(torch.trapezoid(curve, thresholds) / limit)


def pose_metrics(predicted: Tensor, truth: Tensor, root: int) -> dict:
    """Errors of predicted (n, K, 3) against truth (n, K, 3), mm, camera: what a row of a table needs."""
    errors = u.joint_errors(predicted, truth, root)                        # (n, K) mm
    aligned = (u.procrustes_align(predicted, truth) - truth).norm(dim=-1)
    return {"epe": float(errors.nanmean()), "pa_epe": float(aligned.nanmean()),
            "auc": pck_curve(errors)[1], "images": len(errors),
            "per_joint": [round(float(e), 3) for e in errors.nanmean(dim=0)]}


def attention_lift(maps: Tensor, masks: Tensor, patch: int) -> tuple[Tensor, Tensor]:
    """Fig. 5 as numbers: the foreground's share of the attention, (n, L), and of the area, (n,).

    maps a_cls (n, L, N); masks (n, 1, H, W) in 0..1. The shares' ratio is 1 where attention ignores it.
    """
    area = torch.nn.functional.avg_pool2d(masks, patch).flatten(1)     # (n, N) share of foreground in a patch
    share = (maps * area[:, None]).sum(-1) / maps.sum(-1)                  # (n, L)
    return share, area.mean(dim=1)


def mask_iou(predicted: Tensor, truth: Tensor) -> float:
    """Intersection over union at 0.5, over all images (n, 1, H, W) together."""
    p, t = predicted >= 0.5, truth >= 0.5
    return float((p & t).sum() / (p | t).sum().clamp(min=1))


def mean_pose_error(labelled: data.Dataset, count: int, test: data.Dataset) -> float:
    """Chance: the error of answering every image with the mean root-relative pose of the labelled images."""
    root = test.meta["root"]
    poses = torch.from_numpy(np.array(labelled.keypoints[:count]))
    mean = (poses - poses[:, root:root + 1]).nanmean(dim=0, keepdim=True)  # (1, K, 3) mm
    truth = torch.from_numpy(np.array(test.keypoints))
    return float(u.joint_errors(mean.expand_as(truth), truth, root).nanmean())


# ==========================================================================================================
# Measuring one run
# ==========================================================================================================
@torch.no_grad()
def measure_pose(estimator, dataset: data.Dataset, side: int, device) -> dict:
    pairs = [data.predict(estimator, dataset, rows, side, device) for rows in data.chunks(len(dataset))]
    predicted, truth = (torch.cat(part).cpu() for part in zip(*pairs))
    return pose_metrics(predicted, truth, dataset.meta["root"])


@torch.no_grad()
def measure_attention(encoder, dataset: data.Dataset, side: int, device) -> dict:
    """Lift of every block on a test set: the true foreground's share of attention over its area's."""
    shares, areas = [], []
    for rows in data.chunks(len(dataset)):
        x, m, _ = data.crops(dataset, rows, data.no_augmentation(len(rows)), side, device, dataset.masks)
        share, area = attention_lift(encoder.attention_maps(data.normalise(x)), m, encoder.patch)
        shares.append(share); areas.append(area)
    share, area = torch.cat(shares).mean(dim=0), torch.cat(areas).mean()
    return {"lift": [round(float(v), 3) for v in share / area], "area": round(float(area), 4)}


@torch.no_grad()
def measure_masks(net, dataset: data.Dataset, side: int, device) -> float:
    pairs = []
    for rows in data.chunks(len(dataset)):
        x, m, _ = data.crops(dataset, rows, data.no_augmentation(len(rows)), side, device, dataset.masks)
        pairs.append((net(data.normalise(x)).sigmoid(), m))
    return mask_iou(*(torch.cat(part) for part in zip(*pairs)))


def load_encoder(state: dict, path: Path) -> u.Encoder:
    s = state["settings"]
    encoder = u.Encoder((s["image"], s["image"]), s["patch"], s["width"], s["depth"], s["heads"])
    u.load_parts(path, state, encoder=encoder)
    return encoder


def load_estimator(path: Path, device) -> tuple[u.PoseEstimator, dict]:
    state = u.read_checkpoint(path)
    if "head" not in state: raise u.InputError(f"{path}: holds no head; it is a checkpoint of pre-training")
    s, skeleton = state["settings"], state["skeleton"]
    encoder = load_encoder(state, path)
    head = u.KeypointHead(encoder.grid, s["width"], s["head_channels"], len(skeleton["joints"]))
    u.load_parts(path, state, head=head)
    return u.PoseEstimator(encoder, head).eval().to(device), state


def measure_finetuned(path: Path, tests: dict[str, data.Dataset], device) -> dict:
    """Errors on the test sets, chance, and the class attention on the target before and after fine-tuning."""
    estimator, state = load_estimator(path, device)
    s = state["settings"]
    labelled = data.Dataset(s["source"], "keypoints")
    result = {"kind": "finetuning", "settings": s, "steps": state["step"],
              "seconds": round(state["seconds"], 1)}
    for name, dataset in tests.items():
        if len(dataset.meta["joints"]) != len(state["skeleton"]["joints"]):
            raise u.InputError(f"{dataset.folder}: {len(dataset.meta['joints'])} joints, the model has "
                               f"{len(state['skeleton']['joints'])}")
        result[name] = measure_pose(estimator, dataset, s["image"], device)
        result[name]["chance"] = mean_pose_error(labelled, s["labels"] or len(labelled), dataset)
        result[name]["attention"] = measure_attention(estimator.encoder, dataset, s["image"], device)
    return result


def measure_pretrained(path: Path, tests: dict[str, data.Dataset], device) -> dict:
    """Mask IoU of f^S and class attention of f^A on the test sets."""
    state = u.read_checkpoint(path)
    s, result = state["settings"], {"kind": "pretraining", "settings": state["settings"],
                                    "seconds": round(state["seconds"], 1), "steps": state["step"]}
    encoder = load_encoder(state, path).eval().to(device)
    net, seg = None, path.parent / "segmentation.pt"
    if seg.exists():
        net = u.UNet(s["seg_channels"]).eval().to(device)
        segmentation = u.read_checkpoint(seg)
        u.load_parts(seg, segmentation, segmentation=net)
        result["seg_seconds"] = round(segmentation["seconds"], 1)
    for name, dataset in tests.items():
        result[name] = {"attention": measure_attention(encoder, dataset, s["image"], device)}
        if net is not None: result[name]["mask_iou"] = measure_masks(net, dataset, s["image"], device)
    return result


# ==========================================================================================================
# Tables over runs
# ==========================================================================================================
ROWS = ["scratch", "source-only-mae", "source-only-no-xc", "source-only", "mae", "no-fcr", "source-masks",
        "no-ar", "no-xc", "full", "oracle"]  # in the order of Tables 1, 3 and 4


def spread(values: list[float], digits: int = 1) -> str:
    """Mean and, over several seeds, the sample standard deviation."""
    mean = f"{np.mean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {np.std(values, ddof=1):.{digits}f}"


def per_block(results: list[dict], domain: str) -> str:
    lifts = np.array([r[domain]["attention"]["lift"] for r in results])    # (seeds, L)
    return " ".join(f"{v:.2f}" for v in lifts.mean(axis=0))


def row_name(result: dict) -> str:
    """A run's row: preset and folder without the seed, `tiny full`; the runs of a row differ in the seed."""
    folder = re.sub(r"-seed\d+$", "", Path(result["settings"]["out"]).name).removeprefix("pretrain-")
    return f"{result['settings']['preset']} {folder}"


def group_results(results: list[dict], kind: str) -> list[tuple[str, list[dict]]]:
    """Results of one kind by row, the rows in the order of the paper's tables."""
    rows: dict = {}
    for r in results:
        if r["kind"] == kind: rows.setdefault(row_name(r), []).append(r)

    def place(name: str):
        preset, row = name.split(" ", 1)
        return preset != "tiny", preset, ROWS.index(row) if row in ROWS else len(ROWS), row
    return [(name, rows[name]) for name in sorted(rows, key=place)]


def table(results: list[dict]) -> list[list[str]]:
    """Rows of text, the header first: errors in mm, attention on the target's foreground over its area."""
    lines = [["run", "seeds", "target EPE", "target PA-EPE", "target AUC", "source EPE", "attention lift"]]
    for name, group in group_results(results, "finetuning"):
        column = lambda domain, key, digits=1: spread([r[domain][key] for r in group], digits)  # noqa: E731
        lines.append([name, str(len(group)), column("target", "epe"), column("target", "pa_epe"),
                      column("target", "auc", 3), column("source", "epe"), per_block(group, "target")])
    if len(lines) > 1:
        r = next(r for r in results if r["kind"] == "finetuning")
        lines.append(["chance: constant mean pose", "", f"{r['target']['chance']:.1f}", "", "",
                      f"{r['source']['chance']:.1f}", "1.00 everywhere"])
    return lines


def pretraining_table(results: list[dict]) -> list[list[str]]:
    lines = [["pre-training", "seeds", "IoU of f^S, target", "IoU of f^S, source", "attention lift"]]
    for name, group in group_results(results, "pretraining"):
        with_masks = [r for r in group if "mask_iou" in r["target"]]
        iou = [spread([r[domain]["mask_iou"] for r in with_masks], 2) if with_masks else "-"
               for domain in ("target", "source")]
        lines.append([name, str(len(group)), *iou, per_block(group, "target")])
    return lines


def show_table(lines: list[list[str]], markdown: bool) -> str:
    if len(lines) < 2: return ""
    widths = [max(len(row[i]) for row in lines) for i in range(len(lines[0]))]
    if markdown: lines = [lines[0], ["-" * w for w in widths]] + lines[1:]
    text = [" | ".join(cell.ljust(w) for cell, w in zip(row, widths)) for row in lines]
    return "\n".join(f"| {t} |" if markdown else t.rstrip() for t in text) + "\n"


def read_results(folders: list[str]) -> list[dict]:
    """Every result.json below the folders, each run once: the first place named wins."""
    found: dict = {}
    for folder in folders:
        for path in sorted(Path(folder).rglob("*result.json")):
            result = json.loads(path.read_text())
            found.setdefault((row_name(result), result["settings"]["seed"], result["kind"]), result)
    if not found: raise u.InputError(f"{', '.join(folders)}: no result.json; run evaluate.py without --table")
    return list(found.values())


# PICTURES-SECTION


# ==========================================================================================================
# Command line
# ==========================================================================================================
def finished_runs(folders: list[str]) -> list[Path]:
    """The checkpoints of finished runs below the folders; an unfinished one is named and left out."""
    paths = []
    for folder in folders:
        here = sorted(Path(folder).rglob("checkpoint.pt"))
        if not here: raise u.InputError(f"{folder}: no checkpoint.pt here or below; train first")
        for path in here:
            state = u.read_checkpoint(path)
            if state["step"] == state["steps"]: paths.append(path)
            else: print(f"left out, not finished ({state['step']} of {state['steps']} steps): {path.parent}")
    return paths


def measure(path: Path, tests: dict[str, data.Dataset], device) -> dict:
    """Measure one finished run and write its result.json."""
    kind = measure_finetuned if "head" in u.read_checkpoint(path) else measure_pretrained
    result = kind(path, tests, device) | {"tests": {n: d.fingerprint for n, d in tests.items()},
                                          "torch": torch.__version__}
    u.write_json(path.parent / "result.json", result)
    return result


def main(arguments=None) -> int:
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=shape)
    add = parser.add_argument
    add("runs", nargs="*", default=["runs"], help="run folders, or folders of runs [runs]")
    add("--source-test", default="datasets/hands/source_test", help="labelled test folder of the source")
    add("--target-test", default="datasets/hands/target_test", help="labelled test folder of the target")
    add("--table", action="store_true", help="only print the table of the result.json files that exist")
    add("--markdown", action="store_true", help="print the tables as Markdown")
    add("--pictures", default="", help="folder for pictures [pictures/ in the first folder]; none: no pictures")
    add("--device", default="auto", help="auto, cpu, cuda [auto]")
    add("--threads", type=int, default=0, help="CPU threads; 0: torch's choice [0]")
    add("--image", help="predict the pose on this picture instead, with the first run named")
    add("--box", type=float, nargs=4, metavar=("X", "Y", "W", "H"), help="box around the hand in --image, px")
    a = parser.parse_args(arguments)
    _, _, device = u.setup_distributed(a.device)
    if a.threads: torch.set_num_threads(a.threads)
    if a.table: results = read_results(a.runs)
    else:
        data.ensure_benchmark([a.source_test, a.target_test], 0)
        tests = {"source": data.Dataset(a.source_test, "keypoints", "intrinsics", "masks"),
                 "target": data.Dataset(a.target_test, "keypoints", "intrinsics", "masks")}
        results = []
        for path in finished_runs(a.runs):
            print(f"measuring {path.parent}", flush=True)
            results.append(measure(path, tests, device))
    print()
    for lines in (pretraining_table(results), table(results)): print(show_table(lines, a.markdown))
    return 0


if __name__ == "__main__": u.run_script(main)
