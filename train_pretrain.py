"""Stage 1, Sec. 3.1: train f^S, predict the target's masks with it, train f^E and f^D on both domains.

    python train_pretrain.py                                         the embedded benchmark, minutes on a CPU
    python train_pretrain.py --task human                            the same with bodies instead of hands
    python train_pretrain.py --preset paper-hand --device cuda       the paper's size on one GPU
    torchrun --nproc_per_node 8 train_pretrain.py --preset paper-hand

The same command again continues a run that was stopped. --variant selects a row of the paper's tables; use
--masks, --xc, --mask-ratio and --alpha for others. Writes checkpoint.pt (f^E, f^D), segmentation.pt
(f^S), target_masks.npy, config.json and log.jsonl.
"""

import dataclasses
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import data
import udapose
from support import rendering
from support import run as runs
from support.folder import Dataset, check_masks, open_masks
from support.run import InputError, Run, autocast, setting
from support.weights import load_public_weights
from udapose import Decoder, Encoder, MaskedAutoencoder, UNet


@dataclasses.dataclass
class Settings:
    """One setting per line, with its meaning and origin. PRESETS change many of these defaults."""

    preset: str = "tiny"  # sizes and schedule
    task: str = "hand"  # which embedded benchmark
    variant: str = "full"  # row of the paper's tables
    out: str = ""  # run folder; default runs/PRESET[-human]/pretrain-VARIANT-seedSEED
    source: str = "datasets/hands/source_train"  # data-set folder with masks
    target: str = "auto"  # data-set folder, images only; "" for none; auto: that of the embedded benchmark
    unconstrained: str = "auto"  # X_C, data-set folder, images only; auto: that of the embedded benchmark
    target_masks: str = ""  # masks to use instead of training f^S: another run's folder, or a .npy file
    init: str = ""  # start f^E (and f^D, where it fits) from a public weights file
    masks: str = setting("both", choices=("both", "source", "none"))  # where Eq. (2) has weights (Table 4)
    xc: float = setting(0.5, low=0, high=1)  # share of images on a background from X_C (ours; f^S: 0.5)
    mask_ratio: float = setting(0.75, above=0, below=1)  # masking ratio r (paper Sec. 7, Table 9)
    alpha: float = setting(4.0, low=0, high=160)  # sharpness of Eq. (2) (Sec. 7, Table 9); 161 overflows
    norm_pix: bool = False  # reconstruct pixels normalised per patch (MAE's option)
    image: int = setting(256, above=0)  # side of the network's crop, px (paper Sec. 7)
    patch: int = setting(16, above=0)  # side of a patch, px (paper: ViT-B/16)
    width: int = setting(768, above=0)  # width of f^E (Table 5)
    depth: int = setting(12, above=0)  # blocks of f^E (Table 5)
    heads: int = setting(12, above=0)  # attention heads of f^E (ViT-B)
    decoder_width: int = setting(512, above=0)  # width of f^D (Table 5)
    decoder_depth: int = setting(1, above=0)  # blocks of f^D (Table 5)
    decoder_heads: int = setting(16, above=0)  # attention heads of f^D (MAE)
    seg_channels: int = setting(64, above=0)  # channels of f^S (Table 6)
    batch: int = setting(4096, above=0)  # images per step, over all processes (paper Sec. 7)
    micro_batch: int = setting(0, low=0)  # images that a process holds at once; 0: all (gradients accumulate)
    epochs: float = setting(800, above=0)  # passes over source and target (paper Sec. 7)
    warmup: float = setting(0.05, low=0, high=1)  # share of steps with rising learning rate (MAE: 40 epochs)
    lr: float = setting(2.4e-3, low=0)  # peak learning rate (paper Sec. 7; already scaled to batch 4096)
    weight_decay: float = setting(0.05, low=0)  # of AdamW (paper Sec. 7; its betas 0.9, 0.95 are MAE's)
    jitter: float = setting(0.4, low=0, below=1)  # brightness, contrast, saturation 1 +- jitter (ours)
    seg_steps: int = setting(20000, above=0)  # steps of f^S (ours; the paper is silent on its training)
    seg_batch: int = setting(64, above=0)  # images per step of f^S (ours)
    seg_lr: float = setting(1e-3, low=0)  # peak learning rate of f^S (ours)
    seg_jitter: float = setting(0.6, low=0, below=1)  # colour jitter of f^S, strong (ours)
    seed: int = setting(0, low=0, below=2**63)  # of everything random
    device: str = setting("auto", choices=("auto", "cpu", "cuda"))  # where to train
    threads: int = setting(0, low=0, high=1024)  # CPU threads of a process; 0: torch's choice
    workers: int = setting(-1, low=-1, high=1024)  # processes that read ahead; -1: 8 on CUDA, none on a CPU
    precision: str = setting("auto", choices=("auto", "float32", "bfloat16", "float16"))  # autocast's
    compile: bool = False  # compile the transformer blocks: a minute at the start, faster steps on a GPU
    deterministic: bool = False  # the same bits each time on a GPU, more slowly; a CPU needs no flag
    checkpointing: bool = False  # recompute the encoder's blocks in the backward pass: less memory, slower
    save_every: int = setting(200, above=0)  # steps between checkpoints, a multiple of --log-every
    log_every: int = setting(50, above=0)  # steps between lines of log.jsonl


TINY = dict(image=48, patch=8, width=96, depth=4, heads=3, decoder_width=64, decoder_heads=2, seg_channels=24)
TINY |= dict(batch=128, epochs=16, lr=1.5e-3, seg_steps=700, seg_batch=32)
PAPER = dict(unconstrained="datasets/imagenet_val", micro_batch=256, save_every=1000)  # estimated: 8 GiB
PRESETS = {
    "tiny": TINY,
    "small": TINY | dict(epochs=200, seg_steps=2000, seg_batch=48, save_every=500),
    "paper-hand": PAPER | dict(task="hand", source="datasets/freihand_train", target="datasets/rhd_train"),
    "paper-human": PAPER | dict(task="human", source="datasets/h36m_train", target="datasets/3dhp_train"),
}
TASKS = {"hand": {}, "human": dict(source="datasets/bodies/source_train")}
VARIANTS = {  # "Ours" and its ablations in Tables 1 to 4
    "full": {},
    "mae": dict(masks="none", xc=0.0),  # "Ours (MAE)", "w/o FCR, AR"
    "no-fcr": dict(masks="none"),  # "w/o FCR", "w/o S_S, S_T"
    "no-xc": dict(xc=0.0),  # "w/o X_C"
    "source-masks": dict(masks="source"),  # "w/o S_T"
    "source-only": dict(target=""),  # Table 1, upper half: no target image at all
    "source-only-mae": dict(target="", masks="none", xc=0.0),
    "source-only-no-xc": dict(target="", xc=0.0),
}


def networks(s: Settings) -> tuple[Encoder, Decoder]:
    """Build f^E and f^D."""
    encoder = Encoder((s.image, s.image), s.patch, s.width, s.depth, s.heads)
    decoder = Decoder(encoder.grid, s.patch, s.width, s.decoder_width, s.decoder_depth, s.decoder_heads)
    return encoder, decoder


# ==========================================================================================================
# f^S: learned from the source's images and masks only
# ==========================================================================================================
class Backgrounds(NamedTuple):
    """Images from X_C for c of a micro-batch's images."""

    places: Tensor  # (c,) which of the images get a new background
    crops: data.StoredCrops


def read_backgrounds(rng, own, batch: int, share: float, unconstrained, jitter: float, gain=0.0):
    """Draw an image of X_C for about `share` of a global batch, and read those of its images `own` (b,).

    Colours vary by `jitter` and `gain`.
    """
    swap, rows = rng.random(batch) < share, rng.integers(len(unconstrained), size=batch)
    parameters = data.augmentation(rng, batch, jitter, gain)
    places = np.flatnonzero(swap[own])
    if not len(places):
        return None
    x_c = data.read_rows(unconstrained, rows[own][places], parameters[own][places])
    return Backgrounds(torch.from_numpy(places), x_c)


def swap_backgrounds(x: Tensor, foreground: Tensor, backgrounds: Backgrounds | None, side: int) -> Tensor:
    """Give some of the images x (b, 3, H, W) with foreground (b, 1, H, W) a background from X_C, Sec. 3.1."""
    if backgrounds is not None:
        at = data.to_device(backgrounds.places, x.device)
        x_c, _, _ = data.augment(backgrounds.crops, side, x.device)  # (c, 3, H, W)
        x[at] = udapose.replace_background(x[at], foreground[at], x_c)
    return x


class SegmentationData(torch.utils.data.Dataset):
    """[step, slice] reads one micro-batch for f^S: source crops with masks, backgrounds for half of them."""

    def __init__(self, s: Settings, source: Dataset, unconstrained: Dataset):
        self.s, self.source, self.unconstrained = s, source, unconstrained

    def __getitem__(self, key: tuple[int, slice]) -> tuple[data.StoredCrops, Backgrounds | None]:
        (step, own), s = key, self.s
        rng = runs.random_generator(s.seed, "segmentation", step)
        rows = data.batch_rows(len(self.source), s.seed, "segmentation order", step, s.seg_batch)[own]
        parameters = data.augmentation(rng, s.seg_batch, s.seg_jitter, gain=0.4)[own]
        stored = data.read_rows(self.source, rows, parameters, self.source.masks)
        x_c = read_backgrounds(rng, own, s.seg_batch, 0.5, self.unconstrained, s.seg_jitter, gain=0.4)
        return stored, x_c


def train_segmentation(s: Settings, run: Run, source: Dataset, unconstrained: Dataset, world: int, device):
    """Train f^S with binary cross-entropy. not in the paper: its recipe, which is ours."""
    torch.manual_seed(s.seed)
    net = UNet(s.seg_channels).to(device, memory_format=torch.channels_last)
    groups = udapose.parameter_groups(net, weight_decay=1e-4)
    optimiser = torch.optim.AdamW(groups, fused=device.type == "cuda")
    scaler = torch.amp.GradScaler(device.type, enabled=run.dtype == torch.float16)
    start = run.resume("segmentation.pt", optimiser, scaler, {"segmentation": net}, "segmentation")
    if start == 0 and run.rank == 0:
        (run.folder / "target_masks.npy").unlink(missing_ok=True)  # of another f^S
    model = DistributedDataParallel(net) if world > 1 else net
    micro = runs.micro_batches(s.seg_batch, 0, run.rank, world, "--seg-batch")
    steps = range(start, s.seg_steps)
    batches = data.read_ahead(SegmentationData(s, source, unconstrained), steps, micro, s.workers, device)
    progress = runs.Progress("f^S", s.seg_steps, images=s.seg_batch, start=start, quiet=run.rank > 0)
    window = []  # losses since the last line of the log
    for done, (stored, x_c) in enumerate(batches, start + 1):
        for group in optimiser.param_groups:
            group["lr"] = udapose.cosine_rate(done - 1, s.seg_steps, 50, s.seg_lr)
        x, foreground, _ = data.augment(stored, s.image, device)  # (b, 3, H, W), (b, 1, H, W)
        x = data.normalise(swap_backgrounds(x, foreground, x_c, s.image))
        optimiser.zero_grad()
        with autocast(device, run.dtype):
            logits = model(x.contiguous(memory_format=torch.channels_last))  # (b, 1, H, W)
        loss = F.binary_cross_entropy_with_logits(logits.float(), foreground)
        scaler.scale(loss).backward()
        scaler.step(optimiser)
        scaler.update()
        window.append(loss.detach()[None])
        if done % s.log_every == 0 or done == s.seg_steps:
            losses = runs.mean_losses(window, done, "L_seg")
            run.log(stage="segmentation", step=done, **losses)
            progress.show(done, losses, final=done == s.seg_steps)
            window.clear()
        if done % s.save_every == 0 or done == s.seg_steps:
            run.save("segmentation.pt", done, s.seg_steps, optimiser, scaler, {"segmentation": net})
    return net.eval()


@torch.no_grad()
def predict_masks(s: Settings, run: Run, net: UNet, target: Dataset, device) -> None:
    """S_T = f^S(X_T), Sec. 3.1: soft masks (n, H, H) uint8 of the stored target images, once per run."""
    path, failed = run.folder / "target_masks.npy", 0
    if path.exists():
        return
    n, H = target.images.shape[:2]
    part = path.with_suffix(".part.npy")
    masks = np.lib.format.open_memmap(part, "w+", np.uint8, (n, H, H))
    seen = round(s.image * target.meta["margin"])  # px of the stored crop at f^S's resolution
    progress = runs.Progress("target masks", n, "images")
    for rows in np.array_split(np.arange(n), -(-n // 64)):
        x = torch.from_numpy(target.images[rows]).to(device).permute(0, 3, 1, 2)  # (64, 3, H, H)
        x = F.interpolate(data.normalise(x.float() / 255), size=seen, mode="bilinear", antialias=True)
        with autocast(device, run.dtype):
            logits = net(x.contiguous(memory_format=torch.channels_last))  # (64, 1, seen, seen)
        soft = F.interpolate(logits.float().sigmoid(), size=H, mode="bilinear", antialias=True)
        masks[rows] = (255 * soft[:, 0]).round().byte().cpu().numpy()  # (64, H, H)
        share = (masks[rows] >= 128).mean(axis=(1, 2))
        failed += int(((share < 0.01) | (share > 0.90)).sum())
        progress.show(int(rows[-1]) + 1, final=rows[-1] == n - 1)
    masks.flush()
    part.rename(path)
    print(f"target masks: {100 * failed / n:.1f} % have under 1 % or over 90 % foreground", flush=True)


# ==========================================================================================================
# The masked autoencoder
# ==========================================================================================================
class Domain(NamedTuple):
    """A data set of stage 1."""

    dataset: Dataset
    masks: np.ndarray | None  # (n, H, H) uint8, for backgrounds from X_C
    weighted: bool  # whether Eq. (2) uses them, too


class PretrainingRows(NamedTuple):
    """What a worker reads for one micro-batch of b images, sorted by domain."""

    domains: list[data.StoredCrops]  # one per domain
    x_c: Backgrounds | None
    noise: Tensor  # (b, N), of `random_masking`


class PretrainingBatch(NamedTuple):
    """One micro-batch of stage 1 on the training device."""

    images: Tensor  # x (b, 3, H, W), normalised
    weights: Tensor  # w (b, N) of Eq. (2), or ones
    noise: Tensor  # (b, N)


class PretrainingData(torch.utils.data.Dataset):
    """[step, slice] reads one micro-batch of stage 1 from both domains."""

    def __init__(self, s: Settings, domains: list[Domain], unconstrained: Dataset | None):
        self.s, self.domains, self.unconstrained = s, domains, unconstrained

    def __getitem__(self, key: tuple[int, slice]) -> PretrainingRows:
        (step, own), s = key, self.s
        rng = runs.random_generator(s.seed, "pretraining", step)
        parameters = data.augmentation(rng, s.batch, s.jitter)[own]
        noise = rng.random((s.batch, (s.image // s.patch) ** 2), np.float32)[own]
        sizes = [len(domain.dataset) for domain in self.domains]
        rows = data.batch_rows(sum(sizes), s.seed, "pretraining order", step, s.batch)[own]  # of the union
        ends = np.cumsum(sizes)  # not in the paper: the larger domain has the larger share
        which = np.searchsorted(ends, rows, "right")  # (b,) the domain of each image
        order = np.argsort(which, kind="stable")
        stored = []
        for i, (dataset, masks, _) in enumerate(self.domains):
            here = which == i
            own_rows = rows[here] - (ends - sizes)[i]
            stored.append(data.read_rows(dataset, own_rows, parameters[here], masks))
        x_c = None
        if s.xc > 0:
            sorted_own = np.arange(s.batch)[own][order]
            x_c = read_backgrounds(rng, sorted_own, s.batch, s.xc, self.unconstrained, s.jitter)
        return PretrainingRows(stored, x_c, torch.from_numpy(noise[order]))


def pretraining_batch(s: Settings, rows: PretrainingRows, domains: list[Domain], device) -> PretrainingBatch:
    """Augment the stored crops of a micro-batch, weight their patches by Eq. (2), swap backgrounds."""
    images, foregrounds, weights = [], [], []
    for stored, domain in zip(rows.domains, domains, strict=True):
        if not len(stored.images):
            continue
        x, foreground, _ = data.augment(stored, s.image, device)  # (b_i, 3, H, W), (b_i, 1, H, W)
        foreground = torch.zeros_like(x[:, :1]) if foreground is None else foreground
        w = udapose.foreground_weights(foreground, s.patch, s.alpha)  # Eq. (2), (b_i, N)
        images.append(x)
        foregrounds.append(foreground)
        weights.append(w if domain.weighted else torch.ones_like(w))
    x = swap_backgrounds(torch.cat(images), torch.cat(foregrounds), rows.x_c, s.image)  # (b, 3, H, W)
    return PretrainingBatch(data.normalise(x), torch.cat(weights), data.to_device(rows.noise, device))


def train_autoencoder(s: Settings, run: Run, mae, domains: list[Domain], unconstrained, world: int, device):
    """Train f^E and f^D by Eq. (3), Sec. 3.1."""
    groups = udapose.parameter_groups(mae, s.weight_decay)
    optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=run.dtype == torch.float16)
    modules = {"encoder": mae.encoder, "decoder": mae.decoder}
    start = run.resume("checkpoint.pt", optimiser, scaler, modules, "pretraining")
    if s.compile:
        runs.compile_blocks(mae.encoder.blocks, mae.decoder.decoder_blocks)
    model = DistributedDataParallel(mae) if world > 1 else mae
    steps = max(1, round(s.epochs * sum(len(domain.dataset) for domain in domains) / s.batch))
    if steps < 200 and run.rank == 0:
        print(f"MAE: only {steps} steps, f^A will hardly be trained; raise --epochs {s.epochs:g}", flush=True)
    micro = runs.micro_batches(s.batch, s.micro_batch, run.rank, world)
    reader = PretrainingData(s, domains, unconstrained)
    ahead = data.read_ahead(reader, range(start, steps), micro, s.workers, device)  # len(micro) a step
    progress = runs.Progress("MAE", steps, images=s.batch, start=start, quiet=run.rank > 0)
    window = []  # losses since the last line of the log
    for step in range(start, steps):
        lr = udapose.cosine_rate(step, steps, round(s.warmup * steps), s.lr)
        for group in optimiser.param_groups:
            group["lr"] = lr
        optimiser.zero_grad()
        losses = torch.zeros(2, device=device)
        for i in range(len(micro)):
            batch = pretraining_batch(s, next(ahead), domains, device)
            with runs.sync_gradients(model, i == len(micro) - 1):
                with autocast(device, run.dtype):
                    predicted, m = model(batch.images, batch.noise, s.mask_ratio)  # (b, N, P*P*3), (b, N)
                patches = udapose.patchify(batch.images, s.patch)  # (b, N, P*P*3)
                if s.norm_pix:
                    patches = udapose.normalise_patches(patches)
                L_WMAE = udapose.weighted_mae_loss(predicted, patches, batch.weights, m)  # Eq. (3)
                scaler.scale(L_WMAE / len(micro)).backward()
            error = (predicted.detach().float() - patches).square().mean(dim=-1)  # (b, N)
            pixel = (error * m).sum() / m.sum()  # the mean over masked pixels, which MAE logs
            losses += torch.stack([L_WMAE.detach(), pixel]) / len(micro)
        scaler.step(optimiser)
        scaler.update()
        window.append(losses)
        done = step + 1
        if done % s.log_every == 0 or done == steps:
            means = runs.mean_losses(window, done, "L_WMAE", "pixel")
            run.log(stage="pretraining", step=done, lr=lr, **means)
            progress.show(done, means, final=done == steps)
            window.clear()
        if done % s.save_every == 0 or done == steps:
            run.save("checkpoint.pt", done, steps, optimiser, scaler, modules)


# ==========================================================================================================
# Set-up
# ==========================================================================================================
def complete(s: Settings, world: int) -> bool:
    """Fill in settings that follow from others, refuse what does not fit. Returns whether f^S is needed."""
    s.out = s.out or f"runs/{runs.run_group(s.preset, s.task)}/pretrain-{s.variant}-seed{s.seed}"
    if s.target not in ("", "auto") and VARIANTS[s.variant].get("target") == "":
        raise InputError(f"--target {s.target}: variant {s.variant} has no target")
    s.target = rendering.auto_folder(s.target, s.source, "target_train")
    if s.target_masks and not s.target:
        raise InputError("--target-masks needs a --target")
    needs_f_S = bool(s.target) and not s.target_masks and (s.masks == "both" or s.xc > 0)
    s.unconstrained = rendering.auto_folder(s.unconstrained, s.source, "unconstrained")
    if not (s.xc > 0 or needs_f_S):
        s.unconstrained = ""
    elif not s.unconstrained:
        raise InputError("--unconstrained: name a folder of backgrounds X_C, or give --masks none --xc 0")
    try:
        with torch.device("meta"):  # shapes without values: what does not fit is found before f^S is trained
            x, noise = torch.zeros(1, 3, s.image, s.image), torch.zeros(1, (s.image // s.patch) ** 2)
            MaskedAutoencoder(*networks(s))(x, noise, s.mask_ratio)
            if needs_f_S:
                UNet(s.seg_channels)(x)
    except ValueError as error:
        raise InputError(str(error)) from error
    runs.micro_batches(s.batch, s.micro_batch, 0, world)
    runs.micro_batches(s.seg_batch, 0, 0, world, "--seg-batch")
    return needs_f_S


def main(arguments=None) -> None:
    """Train f^S, predict the target's masks, train f^E and f^D."""
    s = runs.parse_settings(Settings, __doc__, PRESETS, VARIANTS, arguments, TASKS)
    rank, world, device = runs.setup_distributed(s.device)
    runs.configure_torch(s.threads, s.deterministic)
    needs_f_S = complete(s, world)

    runs.on_rank_0(rendering.ensure_benchmark, [s.source, s.target, s.unconstrained])
    use_masks = s.masks != "none" or s.xc > 0
    source = Dataset(s.source, *(["masks"] if use_masks else []))
    target = Dataset(s.target) if s.target else None  # its labels and true masks are never opened
    unconstrained = Dataset(s.unconstrained) if s.unconstrained else None
    if use_masks:
        check_masks(source.masks, source.folder / "masks.npy", "give --masks none --xc 0")
    sets = {"source": source, "target": target, "unconstrained": unconstrained}
    facts = {f"{name}'s data": dataset.fingerprint for name, dataset in sets.items() if dataset is not None}
    target_masks = None
    if s.target_masks:
        path = runs.masks_of(s.target_masks, target.fingerprint)
        target_masks = open_masks(path, target)
        if Path(s.target_masks).is_file():  # a file of the user's; f^S itself may be unsure
            check_masks(target_masks, path, "leave out --target-masks")
        facts["target_masks"] = runs.file_checksum(path)
    torch.manual_seed(s.seed)
    encoder, decoder = networks(s)
    encoder.checkpointing = s.checkpointing
    if s.init:
        report = load_public_weights(s.init, encoder, decoder)
        facts["init"] = runs.file_checksum(s.init)
        if rank == 0:
            print("\n".join(report), flush=True)
    mae = MaskedAutoencoder(encoder, decoder).to(device)
    run = Run(s.out, s, facts | {"world": world}, rank, device)

    if needs_f_S:
        f_S = train_segmentation(s, run, source, unconstrained, world, device)
        runs.on_rank_0(predict_masks, s, run, f_S, target, device)
        target_masks = open_masks(run.folder / "target_masks.npy", target)
    domains = [Domain(source, source.masks, s.masks != "none")]
    if target is not None:
        domains.append(Domain(target, target_masks, s.masks == "both"))
    train_autoencoder(s, run, mae, domains, unconstrained, world, device)
    if rank == 0:
        print(f"finished: {run.folder}; train_finetune.py can start from it", flush=True)


if __name__ == "__main__":
    runs.run_script(main)
