"""Measure finished runs, print them as one table, and predict the pose in your own photographs.

    python evaluate.py                                measure every finished run below runs/
    python evaluate.py runs/tiny/full-seed0           measure these runs
    python evaluate.py --table runs assets/results    print the table from results that were measured before
    python evaluate.py --table --all --minus mae      every column, and differences to the row `mae`
    python evaluate.py --table --paper                the paper's tables, with its numbers beside ours
    python evaluate.py --sweep lam                    error against a setting, as tables and a chart
    python evaluate.py --image PHOTO                  predict the pose in a photograph
    python evaluate.py runs/tiny/probe-seed0 --ttt 20 test-time training on 100 target images
    torchrun --nproc_per_node 8 evaluate.py           share large test sets among processes

Errors are EPE (hands) or MPJPE (humans), Sec. 4.1: the mean distance of a joint in mm with the roots aligned,
on test images that no training script opens. Each run keeps its results in result.jsonl, one line per pair
of test sets. A table averages runs that differ in the seed alone; any other setting starts a new row.
"""

import argparse
import dataclasses
import itertools
import json
import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import data
import train_finetune
import train_pretrain
import udapose
from support import photographs, pictures, run, tables, test_time
from support.convert import crop_square
from support.folder import HAND, HUMAN, HUMAN_JOINTS, Dataset, compared, same_skeleton, with_root
from support.readers.formats import open_picture
from support.rendering import ensure_benchmark, in_benchmark
from support.run import InputError

PCK_LIMIT = {"EPE": 50.0, "MPJPE": 150.0}  # mm: AUC is the area under the PCK curve up to this threshold


# ==========================================================================================================
# Metrics
# ==========================================================================================================
def pck_auc(errors: Tensor, limit: float, points: int = 101) -> float:
    """Area under the curve of the share of joints within a threshold of 0..limit mm. NaN does not count."""
    errors = errors[errors.isfinite()]
    thresholds = torch.linspace(0, limit, points)
    curve = torch.searchsorted(errors.sort().values, thresholds, right=True) / len(errors)  # (points,)
    return float(torch.trapezoid(curve, thresholds) / limit)


def metric(joints: list[str]) -> str:
    """The name of the mean joint error of this skeleton."""
    return "MPJPE" if joints == HUMAN_JOINTS else "EPE"


def pose_metrics(predicted: Tensor, truth: Tensor, meta: dict) -> dict:
    """Errors of predicted against true joints, both (n, K, 3) in mm, camera frame; NaN: not labelled.

    meta: of the test set. Averages are over its compared joints. pa_epe is the error after alignment by a
    similarity, pa_rigid without scale. in_plane is the error in x and y, depth that in z.
    """
    root, own = meta["root"], compared(meta)
    labelled = truth.isfinite().all(-1) & truth[:, root].isfinite().all(-1, keepdim=True)  # (n, K)
    if not predicted[labelled].isfinite().all():  # never to be taken for "not labelled"
        raise InputError("predictions are not finite: the checkpoint is damaged, or its numbers overflow")
    errors = udapose.joint_errors(predicted, truth, root)  # (n, K) mm
    p, t = predicted[:, own], truth[:, own]  # (n, C, 3) mm, C compared joints
    few = t.isfinite().all(-1).sum(dim=1) < 3  # two points can always be aligned
    t = torch.where(few[:, None, None], torch.nan, t)
    similar, rigid = ((udapose.procrustes_align(p, t, r) - t).norm(dim=-1).nanmean() for r in (False, True))
    flat, deep = (udapose.joint_errors(predicted[..., axes], truth[..., axes], root)[:, own].nanmean()
                  for axes in (slice(2), slice(2, 3)))
    epe = errors[:, own].nanmean()
    means = {"epe": epe, "pa_epe": similar, "pa_rigid": rigid, "in_plane": flat, "depth": deep}
    names = f": {', '.join(meta['joints'][i] for i in own)}" if len(own) < errors.shape[1] else ""
    return {name: float(mean) for name, mean in means.items()} | {
        "auc": pck_auc(errors[:, own], PCK_LIMIT[metric(meta["joints"])]),
        "images": int(errors[:, own].isfinite().any(dim=1).sum()),
        "per_joint": [round(float(e), 3) for e in errors.nanmean(dim=0)],
        "compared": f"{len(own)} of {errors.shape[1]} joints{names}",
        "protocol": meta.get("protocol", ""),
    }


def attention_lift(maps: Tensor, masks: Tensor, patch: int) -> tuple[Tensor, Tensor]:
    """Fig. 5 as numbers: the foreground's share of the attention (n, L), and of the area (n,).

    maps: a_cls (n, L, N); masks (n, 1, H, W), 1 = foreground. Attention that ignores the foreground has equal
    shares. Their ratio is the lift.
    """
    area = udapose.foreground_share(masks, patch)  # (n, N)
    share = (maps * area[:, None]).sum(-1) / maps.sum(-1)  # (n, L)
    return share, area.mean(dim=1)


def reconstruction_error(predicted: Tensor, patches: Tensor, m: Tensor, area: Tensor) -> Tensor:
    """For each image and region, the summed error of its hidden patches, and their number: (n, 2, 3).

    The error of a patch is its mean squared error. Regions: patches on the foreground (half of the patch or
    more), at its edge (a tenth or more), elsewhere.

    predicted, patches (n, N, P*P*3); m (n, N), 1 = hidden; area (n, N), the foreground's share of a patch.
    """
    error = (predicted.float() - patches).square().mean(-1)  # (n, N)
    regions = torch.stack([area >= 0.5, (area >= 0.1) & (area < 0.5), area < 0.1], dim=1)  # (n, 3, N)
    regions &= m[:, None] > 0
    return torch.stack([(regions * error[:, None]).sum(-1), regions.sum(-1)], dim=1)  # (n, 2, 3)


def mean_pose_error(labelled: Dataset, count: int, test: Dataset) -> float:
    """Chance: the error of answering every image with the mean root-relative pose of the training labels."""
    root = test.meta["root"]
    poses = torch.from_numpy(np.array(labelled.keypoints[:count]))  # (count, K, 3) mm
    mean = (poses - poses[:, root : root + 1]).nanmean(dim=0, keepdim=True)  # (1, K, 3) mm
    truth = torch.from_numpy(np.array(test.keypoints))  # (n, K, 3) mm
    return float(udapose.joint_errors(mean.expand_as(truth), truth, root)[:, compared(test.meta)].nanmean())


# ==========================================================================================================
# Measuring one run
# ==========================================================================================================
@torch.no_grad()
def over_images(dataset: Dataset, what: str, measured) -> Tensor:
    """measured(rows) (b, ..) for all images of a test set: (n, ..), on the CPU, in every process.

    Several processes take turns, chunk by chunk. Their number does not change an image's values.
    """
    rank, world = run.rank_and_world()
    progress = run.Progress(f"{dataset.folder.name}, {what}", len(dataset), "images", quiet=rank > 0)
    parts = []
    for rows in data.chunks(len(dataset))[rank::world]:
        parts.append(measured(rows).cpu())
        progress.show(int(rows[-1]) + 1)
    turns = itertools.zip_longest(*run.from_all_ranks(parts))
    return torch.cat([part for turn in turns for part in turn if part is not None])  # (n, ..)


def measure_pose(estimator, dataset: Dataset, side: int, device) -> dict:
    """Errors over a whole test set."""
    pairs = over_images(dataset, "poses", lambda rows: torch.stack(
        data.predict(estimator, dataset, rows, side, device), dim=1))  # (n, 2, K, 3) mm
    return pose_metrics(*pairs.unbind(1), dataset.meta)


def with_masks(dataset: Dataset, rows: np.ndarray, side: int, device) -> tuple[Tensor, Tensor | None]:
    """Normalised test images (b, 3, H, W) and their true masks (b, 1, H, W), or None if there are none."""
    x, m, _ = data.crops(dataset, rows, data.no_augmentation(len(rows)), side, device, dataset.masks)
    return data.normalise(x), m


def measure_attention(encoder, dataset: Dataset, side: int, device) -> list[float]:
    """Lift of every block: the true foreground's share of the attention over its share of the area."""

    def measured(rows):
        x, m = with_masks(dataset, rows, side, device)
        share, area = attention_lift(encoder.attention_maps(x), m, encoder.patch)
        return torch.cat([share, area[:, None]], dim=1)  # (b, L + 1)

    *share, area = over_images(dataset, "attention", measured).mean(dim=0)  # L + 1 scalars
    return [round(float(v / area), 3) for v in share]


def measure_reconstruction(mae, dataset: Dataset, s: dict, device) -> list[float]:
    """Mean squared error of f^D by region, as `reconstruction_error`, over a whole test set."""
    N = (s["image"] // s["patch"]) ** 2
    noise = run.random_generator(0, "reconstruction").random((len(dataset), N), np.float32)  # (n, N)

    def measured(rows):
        x, mask = with_masks(dataset, rows, s["image"], device)
        patches = udapose.patchify(x, s["patch"])  # (b, N, P*P*3)
        predicted, m = mae(x, torch.from_numpy(noise[rows]).to(device), s["mask_ratio"])
        if s["norm_pix"]:
            patches = udapose.normalise_patches(patches)  # the units of the loss
        return reconstruction_error(predicted, patches, m, udapose.foreground_share(mask, s["patch"]))

    total, count = over_images(dataset, "reconstruction", measured).double().sum(dim=0)  # 2 x (3,)
    return [round(float(v), 4) for v in total / count]  # NaN if a region has no patch


def measure_masks(net, dataset: Dataset, side: int, device) -> float:
    """Intersection over union of f^S's masks and the true ones, cut at 0.5, over a whole test set."""

    def measured(rows):
        x, m = with_masks(dataset, rows, side, device)
        p, t = net(x).sigmoid().flatten(1) >= 0.5, m.flatten(1) >= 0.5  # (b, H * W)
        return torch.stack([(p & t).sum(dim=1), (p | t).sum(dim=1)], dim=1)  # (b, 2)

    both, either = over_images(dataset, "masks", measured).sum(dim=0)
    return float(both / either)  # NaN if neither has foreground


def load_encoder(path: Path, state: dict) -> udapose.Encoder:
    """f^E of a checkpoint of either stage."""
    s = state["settings"]
    encoder = udapose.Encoder((s["image"], s["image"]), s["patch"], s["width"], s["depth"], s["heads"])
    run.load_parts(path, state, encoder=encoder)
    return encoder


def load_autoencoder(path: Path, state: dict, device) -> udapose.MaskedAutoencoder:
    """f^E and f^D of a pre-training checkpoint, ready to reconstruct."""
    s, encoder = state["settings"], load_encoder(path, state)
    sizes = (s[f"decoder_{key}"] for key in ("width", "depth", "heads"))
    decoder = udapose.Decoder(encoder.grid, s["patch"], s["width"], *sizes)
    run.load_parts(path, state, decoder=decoder)
    return udapose.MaskedAutoencoder(encoder, decoder).eval().to(device)


def load_estimator(path: Path, device) -> tuple[udapose.PoseEstimator, dict]:
    """f^E with f^H of a fine-tuned checkpoint, ready to predict, and the checkpoint."""
    state = run.read_checkpoint(path)
    if "head" not in state:
        raise InputError(f"{path}: a checkpoint of pre-training, without a head f^H to predict poses with")
    s, encoder, joints = state["settings"], load_encoder(path, state), state["skeleton"]["joints"]
    head = udapose.KeypointHead(encoder.grid, s["width"], s["head_channels"], len(joints))
    run.load_parts(path, state, head=head)
    return udapose.PoseEstimator(encoder, head).eval().to(device), state


def load_segmentation(path: Path, s: dict, device) -> udapose.UNet | None:
    """f^S of the pre-training run of this checkpoint, or of the run whose masks it used; None without f^S."""
    for folder in (path.parent, Path(s.get("target_masks") or "-")):
        if (folder / "segmentation.pt").exists():
            state = run.read_checkpoint(folder / "segmentation.pt")
            net = udapose.UNet(state["settings"]["seg_channels"])
            run.load_parts(folder / "segmentation.pt", state, segmentation=net)
            return net.eval().to(device)
    return None


def read_log(path: Path) -> list[dict]:
    """The lines of log.jsonl of the run of this checkpoint."""
    log = path.with_name("log.jsonl")
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def base_result(path: Path, state: dict, kind: str) -> dict:
    """What results of both stages contain: settings, facts of config.json, steps, time."""
    s, config = state["settings"], path.with_name("config.json")
    config = run.read_json(config) if config.exists() else {"facts": {}}
    facts = config["facts"] | {k: v for k, v in config.items() if k not in ("settings", "facts")}
    return {"kind": kind, "row": tables.row_name(s), "settings": s, "steps": state["step"],
            "seconds": round(state["seconds"], 1), "made_by": facts}


def pretraining_of(path: Path, result: dict) -> Path | None:
    """The checkpoint that a fine-tuned run started from, at --init or next to the run.

    None, and said so, if it is gone or was trained again since.
    """
    init, facts = result["settings"]["init"], result["made_by"]
    if not init or Path(init).is_file():  # scratch, or a file of weights
        return None
    for folder in (Path(init), path.parent.parent / Path(init).name):
        before = folder / "checkpoint.pt"
        if before.exists() and facts.get("init") in (None, run.file_checksum(before)):
            return before
    say(f"{path.parent}: measured without its pre-training, because {init} is gone or was trained again")
    return None


def measure_pretrained(path: Path, tests: dict[str, Dataset], device, known: dict) -> dict:
    """IoU of f^S, class attention of f^A and errors of reconstruction on the test sets that have masks.

    known: {checkpoint: result}, because fine-tuned runs share pre-training runs.
    """
    if path.resolve() not in known:
        state = run.read_checkpoint(path)
        s, result = state["settings"], base_result(path, state, "pretraining")
        mae, net = load_autoencoder(path, state, device), load_segmentation(path, s, device)
        for name, dataset in tests.items():
            result[name] = {}
            if dataset.masks is None:
                continue
            result[name]["lift"] = measure_attention(mae.encoder, dataset, s["image"], device)
            result[name]["reconstruction"] = measure_reconstruction(mae, dataset, s, device)
            if net is not None:
                result[name]["mask_iou"] = measure_masks(net, dataset, s["image"], device)
        known[path.resolve()] = result
    return known[path.resolve()]


def measure_finetuned(path: Path, tests: dict[str, Dataset], device, known: dict) -> dict:
    """Errors, chance and class attention on the test sets, and the results of the pre-training run."""
    estimator, state = load_estimator(path, device)
    s, result = state["settings"], base_result(path, state, "finetuning")
    result["metric"], labelled = metric(state["skeleton"]["joints"]), None
    try:
        labelled = Dataset(s["source"], "keypoints")
        result["labels"] = min(s["labels"] or len(labelled), len(labelled))
    except InputError as error:
        say(f"{path.parent}: measured without chance; {error}")
    before = pretraining_of(path, result)
    if before is not None:
        result["pretraining"] = measure_pretrained(before, tests, device, known)
    elif s["init"].endswith(".pt") and Path(s["init"]).is_file():  # it may keep its settings
        init = run.torch_load(s["init"])
        if "settings" in init:
            result["pretraining"] = {"settings": init["settings"]}
    for name, dataset in tests.items():
        result[name] = measure_pose(estimator, dataset, s["image"], device)
        result[name]["chance"] = mean_pose_error(labelled, result["labels"], dataset) if labelled else np.nan
        if dataset.masks is not None:
            result[name]["lift"] = measure_attention(estimator.encoder, dataset, s["image"], device)
    return result


def identity(test: Dataset) -> str:
    """What a test set is known by: its fingerprint. The embedded benchmark is known by its origin, because a
    few values in a million are one grey level apart if another kind of CPU renders it."""
    origin = str(test.meta.get("origin"))
    return origin if origin.startswith("rendered by this project") else test.fingerprint


def measure(path: Path, tests: dict[str, Dataset], device, known: dict) -> dict:
    """Measure one finished run on a pair of test sets, and write the result into its result.jsonl."""
    say(f"measuring {path.parent}")
    pose = "head" in run.read_checkpoint(path)
    result = (measure_finetuned if pose else measure_pretrained)(path, tests, device, known)
    test, source_test = ("/".join(tests[name].folder.resolve().parts[-2:]) for name in ("target", "source"))
    result = result | {"test": test, "source_test": source_test, "torch": torch.__version__,
                       "tests": {name: identity(dataset) for name, dataset in tests.items()},
                       "fingerprints": {name: dataset.fingerprint for name, dataset in tests.items()}}
    if run.rank_and_world()[0] == 0:
        place = path.with_name("result.jsonl")
        others = [r for r in (tables.read_lines(place) if place.exists() else [])
                  if (r["test"], r["source_test"]) != (test, source_test)]
        text = "".join(json.dumps(r) + "\n" for r in [*others, result])
        run.write_atomically(place, lambda part: part.write_text(text))
    return result


# ==========================================================================================================
# One table over runs
# ==========================================================================================================
DEFAULTS = {"pretraining": dataclasses.asdict(train_pretrain.Settings()),
            "finetuning": dataclasses.asdict(train_finetune.Settings())}


def rows_of(results: list[dict], kind: str) -> list[tables.Row]:
    """The rows of a family, from runs of one kind. Runs from before a setting existed had its default."""
    return tables.rows_of(results, kind, DEFAULTS)


def show_family(results: list[dict], a: argparse.Namespace) -> None:
    """Print the tables of one family, what they are measured on, and what is not shown."""
    before, rows = rows_of(results, "pretraining"), rows_of(results, "finetuning")
    if before and a.all:
        print(tables.show_table(tables.pretraining_table(before), a.markdown))
    if rows:
        lines = tables.table(rows, tables.reference_row(rows, a.minus), a.all, a.rigid)
        lines.append(tables.chance_line(rows, len(lines[0])))
        titled = tables.paper_tables(rows, lines) if a.paper else {"": lines}
        for title, text in titled.items():
            print(f"{title}\n\n" * bool(title) + tables.show_table(text, a.markdown))
        print("\n".join(tables.notes(rows)))
    shown = {id(r) for row in (*before, *rows) for r in row.runs}
    left = [f"{r['row']} seed {r['settings']['seed']}" for r in results if id(r) not in shown]
    if left:
        print(f"not shown, because a run of the same row, seed and settings is: {', '.join(left)}")


def show_tables(results: list[dict], a: argparse.Namespace) -> None:
    """Print the tables of every family."""
    families = tables.families(results)
    rows = [row for _, some in families for row in rows_of(some, "finetuning")]
    if a.minus and not any(a.minus in (row.name, row.label) for row in rows):
        raise InputError(f"--minus {a.minus}: choose {', '.join(dict.fromkeys(row.name for row in rows))}")
    for title, some in families:
        print(f"\n{title}\n")
        show_family(some, a)


def show_sweep(results: list[dict], a: argparse.Namespace, folder: Path) -> None:
    """Print and draw the error against one setting, for runs of a variant that differ in nothing else."""
    setting = a.sweep.replace("-", "_")
    posed = [r for r in results if r["kind"] == "finetuning"]
    swept = [(title, tables.sweep(some, setting, DEFAULTS)) for title, some in tables.families(posed)]
    swept = [(title, lines) for title, lines in swept if lines]
    if not swept:
        raise InputError(f"--sweep {a.sweep}: no two runs of a variant differ in it and in nothing else")
    for title, lines in swept:
        print(f"\n{title}\n")
        for line, points in lines.items():
            rows = [tables.Row(str(v), f"{line}, {setting} {tables.plain(v)}", r) for v, r in points.items()]
            text = tables.table(rows, tables.reference_row(rows, a.minus), a.all, a.rigid)
            print(tables.show_table(text, a.markdown))
        if a.pictures != "none":
            errors = {line: {v: list(tables.by_seed(runs).values()) for v, runs in points.items()}
                      for line, points in lines.items()}
            picture = pictures.sweep_chart(errors, f"error in mm over {setting}, {title}")
            pictures.save_picture(picture, folder / f"sweep-{setting}-{re.sub('[ /]+', '-', title)}.png")


# ==========================================================================================================
# Pictures of runs
# ==========================================================================================================
@torch.no_grad()
def look_at(path: Path, dataset: Dataset, rows: np.ndarray, device) -> dict:
    """What a run makes of test images: panels, attention (n, L, N), its lift (n, L) and, with f^H, poses."""
    state = run.read_checkpoint(path)
    estimator = load_estimator(path, device)[0] if "head" in state else None
    encoder = load_encoder(path, state).eval().to(device)
    side, root = state["settings"]["image"], dataset.meta["root"]
    x, m, A = data.crops(dataset, rows, data.no_augmentation(len(rows)), side, device, dataset.masks)
    maps = encoder.attention_maps(data.normalise(x))  # (n, L, N)
    seen = {"panels": [pictures.to_panel(image) for image in x], "maps": maps}
    seen["lift"] = torch.full(maps.shape[:2], torch.nan)
    if m is not None:
        share, area = attention_lift(maps, m, encoder.patch)
        seen["lift"] = share / area[:, None]  # (n, L)
    if estimator is not None:
        both = data.predict(estimator, dataset, rows, side, device)  # predicted, true: 2 x (n, K, 3) mm
        K = data.transform_intrinsics(A, torch.from_numpy(dataset.intrinsics[rows]).to(device))  # (n, 3, 3)
        seen["error"] = udapose.joint_errors(*both, root)[:, compared(dataset.meta)].nanmean(dim=1)  # (n,) mm
        seen["uv"] = [pictures.in_panel(udapose.project(p, K), side) for p in both]
        seen["pose"] = [(p - p[:, root : root + 1]).cpu().numpy() for p in both]
    return seen


@torch.no_grad()
def draw_reconstruction(path: Path, name: str, tests: dict, rows: np.ndarray, device) -> Image.Image:
    """Fig. 2 for a pre-training run, on images of both test sets."""
    state = run.read_checkpoint(path)
    s = state["settings"]
    mae, net = load_autoencoder(path, state, device), load_segmentation(path, s, device)
    crops = [with_masks(d, rows % len(d), s["image"], device)[0] for d in tests.values()]
    x = torch.cat(crops)  # (n, 3, H, W)
    patches = udapose.patchify(x, s["patch"])  # (n, N, P*P*3)
    noise = torch.from_numpy(run.random_generator(0, "pictures").random(patches.shape[:2], np.float32))
    predicted, m = mae(x, noise.to(device), s["mask_ratio"])  # (n, N, P*P*3), (n, N)
    if s["norm_pix"]:  # the output has no brightness or contrast of its own: use the true patch's
        predicted = predicted * (patches.var(-1, keepdim=True) + 1e-6).sqrt() + patches.mean(-1, keepdim=True)
    hidden = m[..., None] > 0  # (n, N, 1)
    tiles = torch.where(hidden, 0.0, patches), torch.where(hidden, predicted, patches), patches
    images = [data.denormalise(udapose.unpatchify(t, s["patch"], mae.encoder.grid)) for t in tiles]
    names, masks, weights = [domain for domain in tests for _ in rows], None, None
    if net is not None:
        masks = net(x).sigmoid()  # (n, 1, H, W)
        if s["masks"] != "none":
            weights = udapose.foreground_weights(masks, s["patch"], s["alpha"])  # (n, N), Eq. (2)
            weights[torch.tensor([s["masks"] not in ("both", name) for name in names])] = 1.0
    heading = f"{name}, r = {s['mask_ratio']:g}; visible patches are copied into the reconstruction"
    return pictures.reconstruction_sheet(heading, list(zip(*images, strict=True)), names, masks, weights)


def draw_all(results: dict[Path, dict], tests: dict, wanted: list[int], folder: Path, device) -> None:
    """Draw these runs on the `wanted` target images. Of the seeds of a row, the first is shown."""
    where = {id(result): path for path, result in results.items()}
    before, posed = ({row.label: where[id(row.runs[0])] for row in rows_of(list(results.values()), kind)}
                     for kind in ("pretraining", "finetuning"))
    shown = {f"pretrain {name}": path for name, path in before.items()} | posed
    test = tests["target"]
    rows = with_root(test)
    rows = rows[np.unique(np.linspace(0, len(rows) - 1, 3).astype(int))]  # first, middle and last: not chosen
    rows = np.array(wanted) if wanted else rows[: max(1, 12 // len(shown))]
    if rows.max() >= len(test) or rows.min() < 0:
        raise InputError(f"--rows: {test.folder} has rows 0 to {len(test) - 1}")
    looks = {name: look_at(path, test, rows, device) for name, path in shown.items()}
    drawn = {"attention": pictures.attention_sheet(looks, test.folder.name),
             "curves": pictures.curves_sheet({name: read_log(path) for name, path in shown.items()})}
    if posed:
        poses = {name: looks[name] for name in posed}
        drawn["poses"] = pictures.poses_sheet(poses, test.meta["bones"], test.folder.name)
    for name, path in before.items():
        short = re.sub("[ ,/]+", "-", f"reconstruction {name}")[:150]
        drawn[short] = draw_reconstruction(path, f"pretrain {name}", tests, rows, device)
    for name, picture in drawn.items():
        if picture is not None:
            pictures.save_picture(picture, folder / f"{name}.png")


# ==========================================================================================================
# Test-time training
# ==========================================================================================================
def show_adapted(paths: list[Path], dataset: Dataset, a: argparse.Namespace, device) -> None:
    """Print the error on target images over the steps of test-time training, for each run."""
    measured = {}
    for path in paths:
        estimator, state = load_estimator(path, device)
        before = pretraining_of(path, base_result(path, state, "finetuning"))
        if before is None:
            raise InputError(f"{path.parent}: --ttt needs f^D of its pre-training run")
        if not state["settings"].get("freeze"):
            say(f"{path.parent}: f^E was trained after f^D, which no longer fits; train it with --freeze")
        old = run.read_checkpoint(before)
        mae, s = load_autoencoder(before, old, device), old["settings"]
        mae.encoder = estimator.encoder  # one f^E for f^D and f^H
        say(f"adapting {path.parent}")
        how = a.images, a.ttt, a.ttt_mode, device
        measured[path.parent] = test_time.measure(estimator, mae, s, dataset, *how)
    print(f"\nerror in mm on {a.images} images of {dataset.folder}, {a.ttt_mode}\n")
    print(tables.show_table(test_time.table(measured), a.markdown))


# ==========================================================================================================
# Your own photographs
# ==========================================================================================================
@torch.no_grad()
def predict_photo(estimator, state: dict, photo: Path, a: argparse.Namespace, folder: Path, device) -> None:
    """Predict the pose in one photograph, and write PHOTO_pose.png and PHOTO_pose.json."""
    s, skeleton = state["settings"], state["skeleton"]
    picture = open_picture(photo)  # (H, W, 3) uint8
    size = picture.shape[1::-1]  # W, H
    if min(size) < 16:
        raise InputError(f"{photo}: {size[0]} x {size[1]} px; give a picture of at least 16 x 16 px")
    kind = HUMAN if metric(skeleton["joints"]) == "MPJPE" else HAND
    corner, width = photographs.square_around(a.box, size, photo, kind["box"])
    crop, panel = (crop_square(picture, corner, width, side) for side in (s["image"], pictures.CELL))
    x = data.normalise(torch.tensor(crop, device=device).permute(2, 0, 1)[None].float() / 255)  # (1, 3, H, W)
    attention = estimator.encoder.attention_maps(x)[0].mean(dim=0)  # (N,)
    centres = estimator.centres(x)  # (1, K, 3) voxels
    coded = udapose.from_voxels(centres, s["image"], skeleton["depth_range"], estimator.head.side)
    uv, depth = (part[0].cpu().numpy() for part in coded)  # (K, 2) px of the crop, (K,) mm
    pixels = corner + (uv + 0.5) * width / s["image"] - 0.5  # (K, 2) px of the photograph
    focal = a.focal or float(max(size))  # not in the paper: a view of 53 degrees, typical of a camera
    try:
        poses = Dataset(s["source"], "keypoints").keypoints[:1000]  # (n, K, 3) mm
    except InputError:
        poses = np.full((1, len(skeleton["joints"]), 3), np.nan)
    pose, why = photographs.place_in_space(pixels, depth, focal, size, skeleton, poses)  # (K, 3) mm
    words = f"focal length {focal:.0f} px{'' if a.focal else ', assumed'}; distance: {why}"
    panels = pictures.pose_panels(Image.fromarray(panel), pictures.in_panel(torch.from_numpy(uv), s["image"]),
                                  pose - pose[skeleton["root"]], attention, skeleton["bones"])
    box = "".join(f"-{v:g}" for v in a.box or ())  # two boxes in one photograph are two predictions
    path = photographs.free_name(folder, photo.stem + box, photo)
    page = pictures.sheet([[(p, "") for p in panels]], pictures.POSE_TITLES, words)
    pictures.save_picture(page, path.with_suffix(".png"))
    run.write_json(path, {"photograph": str(photo.resolve()), "joints": skeleton["joints"],
                          "pixels": pixels.round(2).tolist(), "millimetres": pose.round(2).tolist(),
                          "focal_length": focal, "focal_length_assumed": not a.focal, "distance": why})
    print(f"{photo}: {words}; numbers in {path}")


def predict_photos(a: argparse.Namespace, folder: Path, device) -> None:
    """Predict the pose in every photograph, with the first finished fine-tuned run that is named."""
    path = next((path for path, known in finished_runs(a.runs).items() if "skeleton" in known), None)
    if path is None:
        raise InputError(f"{' '.join(a.runs)}: no finished fine-tuning run for --image")
    print(f"with {path.parent}")
    (estimator, state), photos, problems = load_estimator(path, device), photographs.photographs(a.image), []
    if a.box and len(photos) > 1:
        raise InputError(f"--box is the box of one photograph, and --image names {len(photos)}")
    for photo in photos:
        try:
            predict_photo(estimator, state, photo, a, folder, device)
        except InputError as problem:  # the other photographs are fine
            problems.append(str(problem))
    if problems:
        raise InputError("\n".join(problems))


# ==========================================================================================================
# Command line
# ==========================================================================================================
def say(text: str) -> None:
    """Print on rank 0."""
    if run.rank_and_world()[0] == 0:
        print(text, flush=True)


def finished_runs(folders: list[str]) -> dict[Path, dict]:
    """{checkpoint.pt: its settings, and skeleton if fine-tuned} of the finished runs below the folders."""
    runs = {}
    for folder in map(Path, folders):
        paths = [folder] if folder.is_file() else sorted(folder.rglob("checkpoint.pt"))
        if not paths:
            raise InputError(f"{folder}: no checkpoint.pt here or below; train first")
        for path in paths:
            state = run.read_checkpoint(path)
            if state["step"] == state["steps"]:
                runs[path] = {k: state[k] for k in ("settings", "skeleton") if k in state}
            else:
                say(f"left out, not finished ({state['step']} of {state['steps']} steps): {path.parent}")
    if not runs:
        raise InputError(f"{', '.join(folders)}: no run is finished; its training command continues it")
    return runs


def open_tests(task: str, runs: dict[Path, dict], a: argparse.Namespace) -> dict[str, Dataset]:
    """Labelled test sets of both domains for the runs of a task: the given folders, else the benchmark's."""
    kind = {"hand": "hands", "human": "bodies"}[task]
    folders = {"source": a.source_test or f"datasets/{kind}/source_test",
               "target": a.target_test or f"datasets/{kind}/target_test"}
    for path, name in itertools.product(runs, folders):
        folder = runs[path]["settings"][name]
        own = folder and not (in_benchmark(folder) and Path(folder).parent.parent == Path("datasets"))
        if own and not (a.source_test and a.target_test):
            raise InputError(f"{path.parent}: trained on {folder}; name labelled test images of your own: "
                             "--source-test FOLDER --target-test FOLDER")
    run.on_rank_0(ensure_benchmark, list(folders.values()))
    tests = {}
    for name, folder in folders.items():
        masks = ["masks"] if (Path(folder) / "masks.npy").exists() else []
        tests[name] = Dataset(folder, "keypoints", "intrinsics", *masks)
        with_root(tests[name])
        for path, known in runs.items():
            if "skeleton" in known:
                same_skeleton(tests[name], known["skeleton"], str(path))
    return tests


def parse_arguments(arguments) -> argparse.Namespace:
    """The command line; InputError if flags do not go together."""
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=shape, allow_abbrev=False)
    add = parser.add_argument
    text = "run folders, or folders of them; for tables also .jsonl files [runs]"
    add("runs", nargs="*", default=["runs"], help=text)
    for name in ("source", "target"):
        text = f"labelled {name} test images [those of the embedded benchmark]"
        add(f"--{name}-test", default="", metavar="FOLDER", help=text)
    add("--table", action="store_true", help="print tables from results that exist, without measuring")
    add("--only", nargs="+", default=[], metavar="NAME", help="with --table: rows such as full or 'no-*', or "
        "runs such as '*-seed1'")
    add("--all", action="store_true", help="show every column, and the table of pre-training runs")
    add("--minus", default="", metavar="ROW", help="take differences to this row [scratch, else the first]")
    add("--rigid", action="store_true", help="align PA errors without scale (a column of --all)")
    add("--paper", action="store_true", help="print the paper's tables, with its words and numbers")
    add("--sweep", metavar="SETTING", help="error against lam, labels, alpha, mask_ratio, epochs, ..")
    add("--markdown", action="store_true", help="print tables as Markdown")
    add("--pictures", default="", metavar="FOLDER", help="folder for pictures, or none [RUNS/pictures]")
    add("--rows", type=int, nargs="+", default=[], help="target test images to draw [first, middle, last]")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="where to compute [auto]")
    add("--threads", type=int, default=0, metavar="N", help="CPU threads; 0: torch's choice [0]")
    add("--ttt", type=int, metavar="STEPS", help="test-time training of probe runs, this many steps")
    add("--ttt-mode", default="reset", choices=("reset", "online"),
        help="adapt to each image alone, or keep the weights for the next one [reset]")
    add("--images", type=int, default=100, metavar="N", help="with --ttt: so many target images [100]")
    add("--image", nargs="+", metavar="PHOTO", help="predict the pose in photographs, or in folders of "
        "them, with the first finished run that is named. Mirror photographs of left hands first")
    add("--box", type=float, nargs=4, metavar=("X", "Y", "W", "H"),
        help="box around the hand or body, px [the largest square in the middle]")
    add("--focal", type=float, default=0.0, metavar="PX",
        help="focal length of the photographs [their longer side]")
    a = parser.parse_args(arguments)
    if a.threads < 0 or not 0 <= a.focal < np.inf:
        raise InputError(f"--threads {a.threads} --focal {a.focal:g}: give numbers not below 0")
    if a.images < 1 or (a.ttt or 0) < 0:
        raise InputError(f"--images {a.images} --ttt {a.ttt}: give at least one image, and no negative steps")
    if a.image and (a.table or a.sweep or a.pictures == "none"):
        raise InputError("--image: leave out --table, --sweep and --pictures none")
    if (a.only and not (a.table or a.sweep)) or ((a.box or a.focal) and not a.image):
        raise InputError("--only belongs to --table and --sweep; --box and --focal belong to --image")
    return a


def main(arguments=None) -> None:
    """Measure, print and draw; or predict the pose in photographs."""
    a = parse_arguments(arguments)
    rank, _, device = run.setup_distributed(a.device)
    run.configure_torch(a.threads)
    first = Path(a.runs[0])
    folder = Path(a.pictures or (first.parent if first.is_file() else first) / "pictures")
    if a.image or a.sweep or a.table:
        if rank == 0:  # nothing to share
            if a.image:
                predict_photos(a, folder, device)
            elif a.sweep:
                show_sweep(tables.read_results(a.runs, a.only), a, folder)
            else:
                show_tables(tables.read_results(a.runs, a.only), a)
        return
    by_task = {}
    for path, known in finished_runs(a.runs).items():
        by_task.setdefault(known["settings"].get("task", "hand"), {})[path] = known
    tests = {task: open_tests(task, runs, a) for task, runs in by_task.items()}
    if a.ttt is not None:
        for task, runs in by_task.items():
            posed = [path for path, known in runs.items() if "skeleton" in known]
            if not posed:
                raise InputError("--ttt: name fine-tuned runs, of train_finetune.py --variant probe")
            if rank == 0:  # nothing to share
                show_adapted(posed, tests[task]["target"], a, device)
        return
    before = {}  # results of pre-training runs, each measured once
    results = {task: {path: measure(path, tests[task], device, before) for path in runs}
               for task, runs in by_task.items()}
    if rank == 0:
        show_tables([r for some in results.values() for r in some.values()], a)
    if rank == 0 and a.pictures != "none":
        for task, some in results.items():
            place = folder / task if len(results) > 1 else folder
            draw_all(some, tests[task], a.rows, place, device)


if __name__ == "__main__":
    run.run_script(main)
