"""Stage 2, Sec. 3.2: train f^E and f^H on source labels, keep the attention on target images close to f^A's.

    python train_finetune.py                                         after train_pretrain.py; minutes on a CPU
    python train_finetune.py --variant scratch                       the baseline: source labels alone
    python train_finetune.py --task human                            bodies instead of hands
    torchrun --nproc_per_node 8 train_finetune.py --preset paper-hand

The same command again continues a run that was stopped. Writes checkpoint.pt (f^E, f^H) for evaluate.py. The
result is the last step's weights. The target's labels are never opened (except by the variant `oracle`, which
trains on them), so that no run can select a checkpoint by them.
"""

import copy
import dataclasses
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import data
import udapose
from support import rendering
from support import run as runs
from support.comparisons import METHODS, DomainDiscriminator, adaptation_loss, teacher_labels, update_teacher
from support.folder import Dataset, compared, same_skeleton, with_root
from support.run import InputError, Run, autocast, setting
from support.weights import load_public_weights
from udapose import Encoder, KeypointHead, PoseEstimator


@dataclasses.dataclass
class Settings:
    """One setting per line, with its meaning and origin. PRESETS change many of these defaults."""

    preset: str = "tiny"  # sizes and schedule
    task: str = "hand"  # which embedded benchmark
    variant: str = "full"  # row of the paper's tables
    out: str = ""  # run folder; default runs/PRESET[-human]/VARIANT-seedSEED
    init: str = "auto"  # pre-training run, or a public weights file; "": scratch; auto: by variant and seed
    source: str = "datasets/hands/source_train"  # data-set folder with keypoints
    target: str = "auto"  # data-set folder, images only; auto: that of the embedded benchmark
    validation: str = "auto"  # labelled *source* images, to watch the training; "": none; auto: as above
    freeze: bool = False  # train f^H alone, on a frozen f^E
    labels: int = setting(0, low=0)  # use only the first so many labelled source images; 0: all
    lam: float = setting(100.0, low=0)  # lambda_attn of Eq. (7) (paper: 100 hands, 10 humans); 0: no AR
    adapt: str = setting("", choices=("", *METHODS, "mt"))  # method to compare with; adds its loss
    adapt_weight: float = setting(1.0, low=0)  # its weight (DDC 0.25, DANN 1: papers; DAN, mt: public code)
    mt_start: float = setting(0.57, low=0, high=1)  # share of the steps before the mean teacher sets in
    mt_decay: float = setting(0.999, low=0, below=1)  # decay of its moving average (both: public 2D code)
    sigma: float = setting(2.0, above=0)  # standard deviation of the true Gaussians, voxels (ours)
    image: int = setting(256, above=0)  # side of the network's crop, px (paper Sec. 7)
    patch: int = setting(16, above=0)  # side of a patch, px (paper: ViT-B/16)
    width: int = setting(768, above=0)  # width of f^E (Table 7)
    depth: int = setting(12, above=0)  # blocks of f^E (Table 7)
    heads: int = setting(12, above=0)  # attention heads of f^E (ViT-B)
    head_channels: int = setting(256, above=0)  # channels of f^H (Table 7)
    batch: int = setting(128, above=0)  # source images per step, and as many target images (paper Sec. 7)
    micro_batch: int = setting(0, low=0)  # images that a process holds at once; 0: all (gradients accumulate)
    epochs: float = setting(50, above=0)  # passes over the labelled source images (paper Sec. 7)
    warmup: int = setting(500, low=0)  # steps in which the learning rate rises (ViTPose)
    lr: float = setting(5e-4, low=0)  # peak learning rate of AdamW (paper Sec. 7)
    layer_decay: float = setting(1.0, above=0)  # learning-rate factor per block, inwards (ViTPose: 0.75)
    weight_decay: float = setting(0.1, low=0)  # of AdamW (ViTPose, as its betas 0.9 and 0.999)
    jitter: float = setting(0.2, low=0, below=1)  # brightness, contrast, saturation 1 +- jitter (ours)
    expanded: bool = True  # Eq. (5) without a heatmap (keypoint_loss_expanded); --no-expanded: as written
    seed: int = setting(0, low=0, below=2**63)  # of everything random
    device: str = setting("auto", choices=("auto", "cpu", "cuda"))  # where to train
    threads: int = setting(0, low=0, high=1024)  # CPU threads of a process; 0: torch's choice
    workers: int = setting(-1, low=-1, high=1024)  # processes that read ahead; -1: 8 on CUDA, none on a CPU
    precision: str = setting("auto", choices=("auto", "float32", "bfloat16", "float16"))  # autocast's
    compile: bool = False  # compile the transformer blocks: a minute at the start, faster steps on a GPU
    deterministic: bool = False  # the same bits each time on a GPU, more slowly; a CPU needs no flag
    checkpointing: bool = False  # recompute the encoder's blocks in the backward pass: less memory, slower
    validate_every: int = setting(250, above=0)  # steps between measurements on the validation set
    save_every: int = setting(200, above=0)  # steps between checkpoints, a multiple of --log-every
    log_every: int = setting(50, above=0)  # steps between lines of log.jsonl


TINY = dict(image=48, patch=8, width=96, depth=4, heads=3, head_channels=48, labels=1000, batch=32, epochs=32)
TINY |= dict(warmup=50, lr=2e-3, sigma=1.8, mt_decay=0.98)
PAPER = dict(validation="", micro_batch=64, save_every=2000)  # an estimate: 13 GiB
PRESETS = {
    "tiny": TINY,
    "small": TINY | dict(epochs=64, save_every=500),
    "paper-hand": PAPER | dict(task="hand", source="datasets/freihand_train", target="datasets/rhd_train"),
    "paper-human": PAPER | dict(task="human", source="datasets/h36m_train", target="datasets/3dhp_train",
                                lam=10.0, epochs=100),
}
TASKS = {"hand": {}, "human": dict(source="datasets/bodies/source_train", lam=10.0)}
VARIANTS = {  # init "auto" means the pre-training run of the same name, or the one in PRETRAINED_BY
    "full": {},
    "scratch": dict(init="", lam=0.0),
    "mae": dict(lam=0.0),  # "Ours (MAE)", "w/o FCR, AR"
    "no-ar": dict(lam=0.0),  # "w/o AR": shares the pre-training of "full"
    **{"no-fcr": {}, "no-xc": {}, "source-masks": {}},
    "no-fcr-ar": dict(lam=0.0),
    "no-xc-ar": dict(lam=0.0),
    "no-fcr-xc": {},
    "source-only": dict(lam=0.0),
    "source-only-mae": dict(lam=0.0),
    "source-only-no-xc": dict(lam=0.0),
    "probe": dict(lam=0.0, freeze=True),  # for evaluate.py --ttt: f^D of the pre-training still fits f^E
    "oracle": dict(init="", lam=0.0, validation=""),  # the labelled target as source: a lower bound
    "ddc": dict(init="", lam=0.0, adapt="ddc", adapt_weight=0.25),  # from scratch
    "dan": dict(init="", lam=0.0, adapt="dan"),
    "dann": dict(init="", lam=0.0, adapt="dann"),
    "mae-ddc": dict(lam=0.0, adapt="ddc", adapt_weight=0.25),  # from MAE weights
    "mae-dan": dict(lam=0.0, adapt="dan"),
    "mae-dann": dict(lam=0.0, adapt="dann"),
    "mt": dict(init="", lam=0.0, adapt="mt"),  # mean teacher
    "mae-mt": dict(lam=0.0, adapt="mt"),
    "full-mt": dict(adapt="mt"),  # and AR
}
PRETRAINED_BY = {"no-ar": "full", "no-fcr-ar": "no-fcr", "no-xc-ar": "no-xc", "no-fcr-xc": "mae"}
PRETRAINED_BY |= {"mae-ddc": "mae", "mae-dan": "mae", "mae-dann": "mae", "mae-mt": "mae", "full-mt": "full"}
PRETRAINED_BY |= {"probe": "full"}
ARCHITECTURE = ("image", "patch", "width", "depth", "heads")  # settings that both stages must share
SKELETON = ("joints", "bones", "root", "depth_range")  # of the labels, stored in the checkpoint


# ==========================================================================================================
# Batches
# ==========================================================================================================
class PoseRows(NamedTuple):
    """What a worker reads for one micro-batch of stage 2."""

    source: data.StoredCrops
    keypoints: Tensor  # (b, K, 3) mm, camera; NaN: not labelled
    intrinsics: Tensor  # (b, 3, 3) of the stored crops
    target: data.StoredCrops | None


class PoseBatch(NamedTuple):
    """One micro-batch on the training device."""

    x_s: Tensor  # (b, 3, H, W), source images, normalised
    centres: Tensor  # (b, K, 3), x y z in voxels
    valid: Tensor  # (b, K), 1 = the joint counts in Eq. (5)
    x_t: Tensor | None  # (b, 3, H, W), target images, normalised
    x_plain: Tensor | None  # (b, 3, H, W), the same images without augmentation, for the mean teacher
    A_t: Tensor | None  # (b, 2, 3), pixels of x_plain to pixels of x_t


class PoseData(torch.utils.data.Dataset):
    """[step, slice] reads one micro-batch of stage 2: labelled source images, and as many target images."""

    def __init__(self, s: Settings, source: Dataset, target: Dataset | None):
        self.s, self.source, self.target = s, source, target

    def __getitem__(self, key: tuple[int, slice]) -> PoseRows:
        (step, own), s = key, self.s
        rng = runs.random_generator(s.seed, "finetuning", step)
        rows = data.batch_rows(labelled(s, self.source), s.seed, "finetuning order", step, s.batch)[own]
        source = data.read_rows(self.source, rows, data.augmentation(rng, s.batch, s.jitter)[own])
        keypoints = torch.from_numpy(self.source.keypoints[rows])
        intrinsics = torch.from_numpy(self.source.intrinsics[rows])
        if self.target is None:
            return PoseRows(source, keypoints, intrinsics, None)
        rows = data.batch_rows(len(self.target), s.seed, "target order", step, s.batch)[own]
        target = data.read_rows(self.target, rows, data.augmentation(rng, s.batch, s.jitter)[own])
        return PoseRows(source, keypoints, intrinsics, target)


def labelled(s: Settings, source: Dataset) -> int:
    """The number of source images whose labels are used."""
    return min(s.labels or len(source), len(source))


def pose_batch(s: Settings, rows: PoseRows, meta: dict, side: int, device) -> PoseBatch:
    """Augment a micro-batch and turn its labels into voxels of a volume of `side`."""
    x_s, _, A = data.augment(rows.source, s.image, device)  # (b, 3, H, W), A (b, 2, 3)
    keypoints, intrinsics = data.to_device(rows.keypoints, device), data.to_device(rows.intrinsics, device)
    uv, depth = data.labels_of(keypoints, intrinsics, A, meta["root"])  # (b, K, 2) px, (b, K) mm from root
    centres, valid = udapose.to_voxels(uv, depth, s.image, meta["depth_range"], side)  # (b, K, 3), (b, K)
    x_t = x_plain = A_t = None
    if rows.target is not None:
        x_t = data.normalise(data.augment(rows.target, s.image, device)[0])
    if s.adapt == "mt":
        plain = rows.target._replace(parameters=torch.from_numpy(data.no_augmentation(len(x_s))))
        x_plain = data.normalise(data.augment(plain, s.image, device)[0])
        parameters = data.to_device(rows.target.parameters, device)
        A_t = data.crop_transform(parameters, s.image, 1.0, s.image)  # x_plain has no margin
    return PoseBatch(data.normalise(x_s), centres, valid, x_t, x_plain, A_t)


# ==========================================================================================================
# One step, and the loop
# ==========================================================================================================
def heatmap_loss(s: Settings, head: KeypointHead, features: Tensor, centres: Tensor, valid: Tensor, dtype):
    """Eq. (5) from the head's features (b, C, S, S). centres (b, K, 3) in voxels, valid (b, K)."""
    if s.expanded:  # the same value without storing K S^3 voxels; --no-expanded: as printed
        return udapose.keypoint_loss_expanded(features, head.conv, centres, valid, s.sigma)
    with autocast(features.device, dtype):
        heatmaps = head.heatmaps(features)  # Eq. (4), (b, K, S, S, S)
    return udapose.keypoint_loss(heatmaps, centres, valid, s.sigma)


def pose_losses(s: Settings, model, estimator, f_A, teacher, batch: PoseBatch, dtype, progress: float):
    """The terms of this run's loss by name: L_kpt of Eq. (5), L_attn of Eq. (6) with AR, and that of --adapt.

    model: the estimator, or DistributedDataParallel around it. progress: share of the training done.
    """
    head, adapt = estimator.head, "" if s.adapt == "mt" and progress < s.mt_start else s.adapt
    with autocast(batch.x_s.device, dtype):  # features (b, C, S, S), a_E (b, L, N), tokens (b, 1 + N, D)
        out = model(batch.x_s, batch.x_t, attention=s.lam > 0, tokens=bool(adapt), joint=adapt == "mt")
        with torch.no_grad():  # f^A sees the same augmented x_t as f^E
            a_A = f_A.attention_maps(batch.x_t) if s.lam else None  # (b, L, N)
            if adapt == "mt":
                taught = teacher.head(teacher.encoder(batch.x_plain))  # (b, K, S, S, S)
    terms = {"L_kpt": heatmap_loss(s, head, out.features, batch.centres, batch.valid, dtype)}  # Eq. (5)
    if s.lam:
        terms["L_attn"] = udapose.attention_loss(out.a_E, a_A)  # Eq. (6)
    if adapt == "mt":
        centres, valid = teacher_labels(taught, batch.A_t, s.image)  # (b, K, 3), (b, K)
        terms["L_mt"] = heatmap_loss(s, head, out.target_features, centres, valid, dtype)
    elif adapt:
        tokens = out.source_tokens, out.target_tokens  # 2 x (b, 1 + N, D)
        terms[f"L_{adapt}"] = adaptation_loss(adapt, *tokens, estimator.discriminator, progress)
    return terms


def train_pose(s: Settings, run: Run, estimator, f_A, source, target, validation, world: int, device):
    """Train f^E and f^H by Eq. (7), Sec. 3.2."""
    optimiser = torch.optim.AdamW(optimiser_groups(s, estimator), betas=(0.9, 0.999), fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=run.dtype == torch.float16)
    modules = dict(estimator.named_children())  # f^E, f^H and, for DANN, its discriminator
    teacher = copy.deepcopy(estimator).eval().requires_grad_(False) if s.adapt == "mt" else None
    if teacher is not None:  # the result is the teacher; a resume needs both
        modules = {f"student_{name}": part for name, part in modules.items()} | dict(teacher.named_children())
    start = run.resume("checkpoint.pt", optimiser, scaler, modules, "finetuning")
    if s.compile:
        runs.compile_blocks(estimator.encoder.blocks, *([f_A.blocks] if f_A else []))
    model = DistributedDataParallel(estimator) if world > 1 else estimator
    steps = max(1, round(s.epochs * labelled(s, source) / s.batch))
    if steps < s.warmup and run.rank == 0:
        print(f"--warmup {s.warmup}: the learning rate never reaches --lr in {steps} steps", flush=True)
    micro = runs.micro_batches(s.batch, s.micro_batch, run.rank, world)
    reader = PoseData(s, source, target)
    ahead = data.read_ahead(reader, range(start, steps), micro, s.workers, device)  # len(micro) a step
    progress = runs.Progress("fine-tuning", steps, images=s.batch, start=start, quiet=run.rank > 0)
    window = []  # losses since the last line of the log
    for step in range(start, steps):
        estimator.train()
        lr = udapose.cosine_rate(step, steps, s.warmup, s.lr)
        for group in optimiser.param_groups:
            group["lr"] = lr * group["scale"]
        optimiser.zero_grad()
        losses = 0.0
        for i in range(len(micro)):
            batch = pose_batch(s, next(ahead), source.meta, estimator.head.side, device)
            with runs.sync_gradients(model, i == len(micro) - 1):
                terms = pose_losses(s, model, estimator, f_A, teacher, batch, run.dtype, step / steps)
                L_HPE = udapose.hpe_loss(terms["L_kpt"], terms.get("L_attn", 0.0), s.lam)  # Eq. (7)
                L_HPE = L_HPE + s.adapt_weight * terms.get(f"L_{s.adapt}", 0.0)
                scaler.scale(L_HPE / len(micro)).backward()
            losses = losses + torch.stack(list(terms.values())).detach() / len(micro)
        scaler.step(optimiser)
        scaler.update()
        if teacher is not None:  # until the teacher is needed, it is a copy of the student
            runs.statistics_of_rank_0(estimator)
            update_teacher(teacher, estimator, s.mt_decay if step / steps >= s.mt_start else 0.0)
        if window and len(window[-1]) < len(losses):
            window.clear()  # the mean teacher's loss has set in
        window.append(losses)
        done = step + 1
        if done % s.log_every == 0 or done == steps:
            means = runs.mean_losses(window, done, *terms)
            run.log(stage="finetuning", step=done, lr=lr, **means)
            progress.show(done, means, final=done == steps)
            window.clear()
        if validation is not None and (done % s.validate_every == 0 or done == steps):
            error = validate(s, teacher or estimator, validation, run, world, device)
            run.log(stage="finetuning", step=done, source_val_epe=error)
        if done % s.save_every == 0 or done == steps:
            skeleton = {key: source.meta[key] for key in SKELETON}
            run.save("checkpoint.pt", done, steps, optimiser, scaler, modules, skeleton=skeleton)


@torch.no_grad()
def validate(s: Settings, estimator: PoseEstimator, dataset: Dataset, run: Run, world: int, device) -> float:
    """EPE (MPJPE for humans) on labelled source images, mm, over all processes."""
    estimator.eval()
    runs.statistics_of_rank_0(estimator)
    total = torch.zeros(2, dtype=torch.float64)  # sum and number of the errors
    for rows in data.chunks(len(dataset))[run.rank :: world]:
        predicted, truth = data.predict(estimator, dataset, rows, s.image, device, run.dtype)  # (b, K, 3) mm
        errors = udapose.joint_errors(predicted, truth, dataset.meta["root"])  # (b, K) mm
        errors = errors[:, compared(dataset.meta)].double().cpu()
        total += torch.stack([errors.nansum(), errors.isfinite().sum()])
    total, count = runs.mean_over_processes(total).tolist()
    error = total / count
    if run.rank == 0:
        print(f"fine-tuning: error on source validation {error:.2f} mm", flush=True)
    return error


# ==========================================================================================================
# Set-up
# ==========================================================================================================
def build(s: Settings, keypoints: int, rank: int, device) -> tuple[PoseEstimator, Encoder | None]:
    """f^E with f^H, and the frozen f^A (None without AR): the same pre-trained weights twice, Sec. 3.2.

    f^A is in no checkpoint: a resume builds it from --init again.
    """
    torch.manual_seed(s.seed)
    try:
        encoder = Encoder((s.image, s.image), s.patch, s.width, s.depth, s.heads)
        head = KeypointHead(encoder.grid, s.width, s.head_channels, keypoints)
    except ValueError as error:
        raise InputError(str(error)) from error
    if s.init:
        load_pretrained(s, encoder, rank)
    encoder.checkpointing = s.checkpointing
    encoder.requires_grad_(not s.freeze)
    f_A = copy.deepcopy(encoder).eval().requires_grad_(False).to(device) if s.lam else None
    discriminator = DomainDiscriminator(s.width) if s.adapt == "dann" else None
    return PoseEstimator(encoder, head, discriminator).to(device), f_A


def load_pretrained(s: Settings, encoder: Encoder, rank: int) -> None:
    """Fill f^E from --init: a finished pre-training run of the same architecture, or a public file."""
    report = [f"f^E starts from {s.init}"]
    if Path(s.init).is_file():
        report = load_public_weights(s.init, encoder)
    elif not Path(s.init).is_dir():
        raise InputError(f"--init {s.init}: neither a pre-training run (train it first, with the same "
                         "--preset and --seed) nor a file of weights")
    else:
        path = Path(s.init) / "checkpoint.pt"
        state = runs.read_checkpoint(path)
        if "decoder" not in state or state["step"] != state["steps"]:
            raise InputError(f"--init {s.init}: not a finished pre-training run")
        theirs = Settings.__dict__ | state["settings"]  # a setting may be newer than the run
        pairs = [(k, theirs[k], getattr(s, k)) for k in ARCHITECTURE]
        other = [f"{k} {there} there, {here} here" for k, there, here in pairs if there != here]
        if other:
            raise InputError(f"--init {s.init}: another architecture: {', '.join(other)}")
        runs.load_parts(path, state, encoder=encoder)
    if rank == 0:
        print("\n".join(report), flush=True)


def optimiser_groups(s: Settings, estimator: PoseEstimator) -> list[dict]:
    """Weight decay as `parameter_groups`; block i of L learns at layer_decay^(L + 1 - i) of lr (ViTPose)."""
    encoder, lowest = estimator.encoder, s.layer_decay ** (s.depth + 1)
    parts = [(estimator.head, 1.0), (encoder.norm, 1.0), (encoder.patch_embed, lowest)]
    parts += [(block, s.layer_decay ** (s.depth + 1 - i)) for i, block in enumerate(encoder.blocks, 1)]
    if estimator.discriminator is not None:
        parts.append((estimator.discriminator, 1.0))
    groups = []
    for part, scale in parts:
        groups += [group | {"scale": scale} for group in udapose.parameter_groups(part, s.weight_decay)]
    groups.append({"params": [encoder.cls_token], "weight_decay": 0.0, "scale": lowest})
    known = {id(p) for group in groups for p in group["params"]}
    lost = [name for name, p in estimator.named_parameters() if p.requires_grad and id(p) not in known]
    if lost:
        raise InputError(f"optimiser_groups: {lost[0]} would not be trained; give it a learning rate there")
    return [group for group in groups if group["params"]]


def complete(s: Settings) -> None:
    """Fill in the settings that follow from others, and refuse what does not fit."""
    folder = f"runs/{runs.run_group(s.preset, s.task)}"
    s.out = s.out or f"{folder}/{s.variant}-seed{s.seed}"
    if s.init == "auto":
        s.init = f"{folder}/pretrain-{PRETRAINED_BY.get(s.variant, s.variant)}-seed{s.seed}"
    s.validation = rendering.auto_folder(s.validation, s.source, "source_val")
    s.target = rendering.auto_folder(s.target, s.source, "target_train")
    if s.variant == "oracle":
        if not s.target:
            raise InputError("--variant oracle learns the labels of --target: name it")
        s.source = s.target
    if s.freeze and (s.lam or s.adapt or not s.init):
        raise InputError("--freeze needs --init, --lam 0 and no --adapt: they would have nothing to train")
    if s.lam and not s.init:
        raise InputError("--lam > 0 needs a pre-trained f^A: give --init, or --lam 0")
    if (s.lam or s.adapt) and not s.target:
        raise InputError("--target: name the folder of target images, or give --lam 0 and no --adapt")


def main(arguments=None) -> None:
    """Train f^E and f^H."""
    s = runs.parse_settings(Settings, __doc__, PRESETS, VARIANTS, arguments, TASKS)
    complete(s)
    rank, world, device = runs.setup_distributed(s.device)
    runs.configure_torch(s.threads, s.deterministic)
    runs.micro_batches(s.batch, s.micro_batch, rank, world)  # refuses an uneven batch before anything is made
    uses_target = bool(s.lam or s.adapt)
    runs.on_rank_0(rendering.ensure_benchmark, [s.source, s.target if uses_target else "", s.validation])
    source = Dataset(s.source, "keypoints", "intrinsics")
    with_root(source)  # refuses labels of which no joint would count
    target = Dataset(s.target) if uses_target else None  # its labels are never opened
    validation = Dataset(s.validation, "keypoints", "intrinsics") if s.validation else None
    if validation is not None:
        same_skeleton(validation, source.meta, f'{s.source}; name another --validation, or "" for none')
        with_root(validation)
    estimator, f_A = build(s, len(source.meta["joints"]), rank, device)
    sets = {"source": source, "target": target, "validation": validation}
    facts = {f"{name}'s data": dataset.fingerprint for name, dataset in sets.items() if dataset is not None}
    if s.init:
        facts["init"] = runs.file_checksum(s.init)
    run = Run(s.out, s, facts | {"world": world}, rank, device)
    train_pose(s, run, estimator, f_A, source, target, validation, world, device)
    if rank == 0:
        tests = "" if rendering.in_benchmark(s.source) else " --source-test FOLDER --target-test FOLDER"
        print(f"finished: {run.folder}; now: python evaluate.py {run.folder}{tests}", flush=True)


if __name__ == "__main__":
    runs.run_script(main)
