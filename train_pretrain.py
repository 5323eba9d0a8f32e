"""Stage 1, Sec. 3.1: segmentation network f^S -> target masks -> masked autoencoder f^E, f^D on both domains.

    python train_pretrain.py                                         the embedded benchmark, minutes on a CPU
    python train_pretrain.py --task human                            the same with bodies instead of hands
    python train_pretrain.py --preset paper-hand --device cuda       the paper's size on one GPU
    torchrun --nproc_per_node 8 train_pretrain.py --preset paper-hand

The same command again resumes a run that was stopped. Variants of the paper's tables: --variant, or
--masks, --xc, --mask-ratio, --alpha. Writes checkpoint.pt (f^E, f^D), segmentation.pt, target_masks.npy.
"""
import copy
import dataclasses
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import data
import udapose as u


@dataclasses.dataclass
class Settings:
    """One field a line: meaning, origin. Defaults: the paper's, where it has them. Others: PRESETS."""
    preset: str = "tiny"          # sizes and schedule: tiny, small, paper-hand, paper-human
    task: str = "hand"            # embedded benchmark, hand or human: see TASKS
    variant: str = "full"         # row of the paper's tables: see VARIANTS
    out: str = ""                 # run folder; default runs/PRESET[-human]/pretrain-VARIANT-seedSEED
    source: str = "datasets/hands/source_train"          # data-set folder with masks
    target: str = "datasets/hands/target_train"          # data-set folder, images only; "" for source only
    unconstrained: str = "datasets/hands/unconstrained"  # X_C, images only
    target_masks: str = ""   # .npy with masks of the target to use instead of f^S's (an upper bound, Table 4)
    masks: str = "both"           # domains whose masks weight Eq. (2) (Table 4): both, source, none
    xc: float = 0.5             # share of images whose background is replaced from X_C; 0: never (ours: half)
    mask_ratio: float = 0.75      # masking ratio r (paper Sec. 7, Table 9)
    alpha: float = 4.0            # sharpness of the foreground weights, Eq. (2) (paper Sec. 7, Table 9)
    norm_pix: bool = False      # reconstruct pixels normalised per patch (MAE's option; else f^E's input)
    image: int = 256              # side of the network's crop, px (paper Sec. 7)
    patch: int = 16               # side of a patch, px (paper: ViT-B/16)
    width: int = 768              # width of f^E (Table 5)
    depth: int = 12               # blocks of f^E (Table 5)
    heads: int = 12               # heads of f^E (ViT-B)
    decoder_width: int = 512      # width of f^D (Table 5)
    decoder_depth: int = 1        # blocks of f^D (Table 5)
    decoder_heads: int = 16       # heads of f^D (MAE default)
    seg_channels: int = 64        # channels of f^S (Table 6)
    batch: int = 4096             # images a step, over all processes (paper Sec. 7)
    micro_batch: int = 0          # images a process holds at once; 0: its whole share (gradients accumulate)
    epochs: float = 800           # passes over source + target (paper Sec. 7)
    warmup: float = 0.05         # share of the steps in which the learning rate rises (MAE: 40 of 800 epochs)
    lr: float = 2.4e-3            # peak learning rate of AdamW (paper Sec. 7; already scaled to batch 4096)
    weight_decay: float = 0.05    # of AdamW (paper Sec. 7; betas 0.9 and 0.95: MAE)
    jitter: float = 0.4           # brightness, contrast, saturation 1 +- jitter (ours)
    seg_steps: int = 20000        # steps of f^S (ours; the paper is silent on its training)
    seg_batch: int = 64           # images a step of f^S (ours)
    seg_lr: float = 1e-3          # peak learning rate of f^S (ours)
    seg_jitter: float = 0.6      # colour jitter of f^S: strong, for it must work where it never looked (ours)
    seed: int = 0                 # of everything random
    device: str = "auto"          # auto, cpu, cuda
    threads: int = 0              # CPU threads of a process; 0: torch's choice
    precision: str = "auto"       # auto (timed at start-up), float32, bfloat16, float16
    compile: str = "auto"         # torch.compile: on, off; auto: on CUDA, in runs of 2000 steps and more
    deterministic: bool = False   # a GPU gives the same bits each time, more slowly; a CPU does without it
    checkpointing: bool = False   # recompute the encoder's blocks in the backward pass: less memory, slower
    save_every: int = 200         # steps between checkpoints: what a kill can lose
    log_every: int = 50           # steps between lines of log.jsonl


TINY = dict(image=48, patch=8, width=96, depth=4, heads=3, decoder_width=64, decoder_heads=2, seg_channels=24,
            batch=128, epochs=16, lr=1.5e-3, seg_steps=700, seg_batch=32)
PRESETS = {
    "tiny": TINY,
    "small": TINY | dict(epochs=200, seg_steps=2000, seg_batch=48, save_every=500),
    "paper-hand": dict(task="hand", source="datasets/freihand_train", target="datasets/rhd_train",
                       unconstrained="datasets/imagenet_val", micro_batch=256,  # 30 MiB an image: 8 GiB
                       save_every=1000),  # a checkpoint is 1.1 GB
    "paper-human": dict(task="human", source="datasets/h36m_train", target="datasets/3dhp_train",
                        unconstrained="datasets/imagenet_val", micro_batch=256, save_every=1000),
}
TASKS = {  # what the embedded benchmark of bodies changes
    "hand": {},
    "human": dict(source="datasets/bodies/source_train", target="datasets/bodies/target_train",
                  unconstrained="datasets/bodies/unconstrained"),
}
VARIANTS = {  # "Ours" and its ablations in Tables 1 to 4
    "full": {},
    "mae": dict(masks="none", xc=0.0),             # "Ours (MAE)", "w/o FCR, AR"
    "no-fcr": dict(masks="none"),                  # "w/o FCR", "w/o S_S, S_T"
    "no-xc": dict(xc=0.0),                         # "w/o X_C"
    "source-masks": dict(masks="source"),          # "w/o S_T"
    "source-only": dict(target=""),                # Table 1, upper half: no target image at all
    "source-only-mae": dict(target="", masks="none", xc=0.0),
    "source-only-no-xc": dict(target="", xc=0.0),
}


def check(s: Settings, world: int = 1) -> None:
    """InputError where a value makes no sense, alone or with the others."""
    if s.masks not in ("both", "source", "none"):
        raise u.InputError(f"--masks {s.masks!r}: choose both, source or none")
    if not 0 < s.mask_ratio < 1: raise u.InputError(f"--mask-ratio {s.mask_ratio} lies not between 0 and 1")
    if not 0 <= s.xc <= 1: raise u.InputError(f"--xc {s.xc}: a share between 0 and 1")
    if s.alpha > 160: raise u.InputError(f"--alpha {s.alpha:g}: exp of its half, Eq. (2), overflows; to 160")
    if s.warmup > 1: raise u.InputError(f"--warmup {s.warmup:g}: here a share of the steps, 0 to 1")
    if s.target and VARIANTS[s.variant].get("target") == "":
        raise u.InputError(f"--target {s.target}: variant {s.variant} is without a target; leave it out")
    if s.target_masks and not (s.target and (s.masks == "both" or s.xc > 0)):
        raise u.InputError(f"--target-masks {s.target_masks}: nothing here uses masks of a target")
    with torch.device("meta"):  # shapes without values: what does not fit is said before f^S is trained
        u.MaskedAutoencoder(*networks(s))(torch.zeros(1, 3, s.image, s.image), torch.zeros(
            1, (s.image // s.patch) ** 2), s.mask_ratio)
        if uses_f_S(s): u.UNet(s.seg_channels)(torch.zeros(1, 3, s.image, s.image))
    u.micro_batches(s.batch, s.micro_batch, 0, world)
    if uses_f_S(s): u.micro_batches(s.seg_batch, 0, 0, world, "--seg-batch")


def uses_f_S(s: Settings) -> bool:
    """Whether masks of the target are wanted, and not given."""
    return bool(s.target) and not s.target_masks and (s.masks == "both" or s.xc > 0)


def networks(s: Settings) -> tuple[u.Encoder, u.Decoder]:
    """f^E and f^D."""
    encoder = u.Encoder((s.image, s.image), s.patch, s.width, s.depth, s.heads)
    sizes = s.decoder_width, s.decoder_depth, s.decoder_heads
    return encoder, u.Decoder(encoder.grid, s.patch, s.width, *sizes)


def check_masks(masks: np.ndarray, path: str | Path, other: str) -> None:
    """InputError if none of 256 of the masks has foreground, as when 0 and 1 were stored for 0 and 255."""
    largest = masks[np.linspace(0, len(masks) - 1, min(256, len(masks))).astype(int)].max()
    if largest < 128:
        raise u.InputError(f"{path}: the largest value is {largest}, no foreground: write 0 background .. "
                           f"255 foreground, or {other}")


# ==========================================================================================================
# f^S: learned on the source's images and masks only
# ==========================================================================================================
def swap_backgrounds(s: Settings, rng, x, fg, share, own: slice, batch: int, unconstrained, jitter, gain):
    """Give about `share` of the images x (b, 3, H, W), foreground fg (b, 1, H, W), a background from X_C. Its
    colours vary by jitter and gain. Drawn for the global batch, of which x and fg are the slice `own`."""
    swap, rows = rng.random(batch) < share, rng.integers(len(unconstrained), size=batch)
    parameters = data.augmentation(rng, batch, jitter, gain)
    at = np.flatnonzero(swap[own])
    if not len(at): return x
    x_c, _, _ = data.crops(unconstrained, rows[own][at], parameters[own][at], s.image, x.device)
    at = data.to_device(at, x.device)
    x[at] = u.replace_background(x[at], fg[at], x_c)
    return x


def segmentation_batch(s: Settings, step: int, own: slice, source, unconstrained, device) -> tuple:
    """Images (b, 3, H, W), normalised, and their foreground (b, 1, H, W): strong colours (each channel times
    1 +- 0.4, beside seg_jitter), half with X_C behind."""
    rng = u.random_generator(s.seed, "segmentation", step)
    rows = data.batch_rows(len(source), s.seed, "segmentation order", step, s.seg_batch)[own]
    parameters = data.augmentation(rng, s.seg_batch, s.seg_jitter, gain=0.4)[own]
    x, fg, _ = data.crops(source, rows, parameters, s.image, device, source.masks)
    x = swap_backgrounds(s, rng, x, fg, 0.5, own, s.seg_batch, unconstrained, s.seg_jitter, 0.4)
    return data.normalise(x).contiguous(memory_format=torch.channels_last), fg


def segmentation_loss(net, x, fg, device, dtype):
    """Binary cross-entropy of f^S on images x (b, 3, H, W) against the foreground fg (b, 1, H, W) in 0..1."""
    with u.autocast(device, dtype): logits = net(x)                                      # (b, 1, H, W)
    return F.binary_cross_entropy_with_logits(logits.float(), fg)


def train_segmentation(s: Settings, run: u.Run, stop: u.StopSignal, source, unconstrained, device, world):
    """f^S by binary cross-entropy; None if stopped. not in the paper: the recipe, ours; its weight decay is
    1e-4, its warm-up 50 steps."""
    torch.manual_seed(s.seed)
    net = u.UNet(s.seg_channels).to(device, memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(u.parameter_groups(net, 1e-4), lr=s.seg_lr, fused=device.type == "cuda")
    own, parts = u.micro_batches(s.seg_batch, 0, run.rank, world)[0], {"segmentation": net}
    state = run.resume("segmentation.pt", optimiser, parts, "segmentation")
    if (start := state["step"]) == s.seg_steps: return net.eval()

    trial, first = copy.deepcopy(net), segmentation_batch(s, 0, own, source, unconstrained, device)
    dtype = run.decide_dtype("segmentation_precision", s.precision, device,
                             lambda dtype: segmentation_loss(trial, *first, device, dtype).backward())
    del trial, first  # else their memory stays taken
    if run.rank == 0: print(f"f^S: {s.seg_steps} steps of {s.seg_batch}, {dtype}", flush=True)
    model, scaler = u.parallel(net, world), u.grad_scaler(device, dtype, state)
    progress = u.Progress("f^S", s.seg_steps, s.seg_batch, start, run.rank)

    def save(done): run.save("segmentation.pt", s, optimiser, parts, stage="segmentation", step=done,
                             steps=s.seg_steps, scaler=scaler.state_dict())

    def losses(step):  # of each image alone
        rows = data.batch_rows(len(source), s.seed, "segmentation order", step, s.seg_batch)[own]
        x, fg = segmentation_batch(s, step, own, source, unconstrained, device)
        for row, *one in zip(rows, x.split(1), fg.split(1)):
            with torch.no_grad(): yield "L_seg", segmentation_loss(net, *one, device, dtype), source, row
    guard = u.Guard(optimiser, scaler, net, torch.zeros(1, device=device), save, losses)
    steps = range(start, s.seg_steps)
    batches = (segmentation_batch(s, i, own, source, unconstrained, device) for i in steps)
    for step, batch in zip(steps, data.prefetch(batches, device)):
        for group in optimiser.param_groups: group["lr"] = u.cosine_rate(step, s.seg_steps, 50, s.seg_lr)
        guard.start()
        loss = segmentation_loss(model, *batch, device, dtype)
        scaler.scale(loss).backward()
        guard.step(step, loss)
        done, stopping = step + 1, stop.requested()
        logging, saving = (done % every == 0 or done == s.seg_steps for every in (s.log_every, s.save_every))
        if logging or saving or stopping: guard.check()
        if logging:
            value = float(u.mean_over_processes(loss.detach().clone()))
            run.log(stage="segmentation", step=done, L_seg=value)
            progress.show(done, {"L_seg": value}, final=done == s.seg_steps)
        if saving or stopping: save(done)
        if stopping: return None
    return net.eval()


@torch.no_grad()
def predict_masks(s: Settings, net, dataset: data.Dataset, path: Path, run: u.Run, stop: u.StopSignal,
                  world: int, device, dtype) -> bool:
    """S_T = f^S(X_T), Sec. 3.1: soft masks (n, H, H) uint8 of the stored images, once, into the run.

    Every process writes its rows of one file, which gets its name when all are done. False if stopped.
    """
    if u.from_rank_0(path.exists()): return True
    u.statistics_of_rank_0(net)
    (n, H), part = dataset.images.shape[:2], path.with_name("target_masks.part.npy")
    with u.writing(part):
        if run.rank == 0: np.lib.format.open_memmap(part, "w+", np.uint8, (n, H, H))
    u.wait_for_all()  # outside: a peer that is gone is no failure to write
    with u.writing(part):
        mine = np.array_split(np.arange(n), world)[run.rank]  # its rows; none, if processes outnumber them
        file = open(part, "r+b")
        if len(mine): file.seek(np.load(part, mmap_mode="r").offset + int(mine[0]) * H * H)
    seen = round(s.image * dataset.meta["margin"])  # f^S learned with this many pixels to the stored crop
    progress = u.Progress("target masks", len(mine), world, rank=run.rank)
    share = np.zeros(n, np.float32)                                                      # of foreground
    for i in range(0, -(-n // world), 64):  # as many rounds on each process, for they ask each other to stop
        if stop.requested(): return False  # the same command begins them again
        if not len(rows := mine[i:i + 64]): continue
        x = data.normalise(data.load_images(dataset, rows, device))
        x = F.interpolate(x, size=seen, mode="bilinear", antialias=True)                 # (64, 3, seen, seen)
        with u.autocast(device, dtype): logits = net(x.contiguous(memory_format=torch.channels_last))
        soft = F.interpolate(logits.float().sigmoid(), size=H, mode="bilinear", antialias=True)
        masks = (255 * soft[:, 0]).round().byte().cpu().numpy()                          # (64, H, H)
        share[rows] = (masks >= 128).mean(axis=(1, 2))
        with u.writing(part): file.write(masks.tobytes())
        progress.show(i + len(rows), final=i + len(rows) == len(mine))
    with u.writing(part):
        file.flush()
        os.fsync(file.fileno())  # on the disk before it takes the name
        file.close()
    share = u.mean_over_processes(torch.from_numpy(share)) * world                       # also waits for all
    failed = ((share < 0.01) | (share > 0.90)).float().mean()
    if run.rank == 0:
        part.rename(path)
        print(f"target masks: {100 * share.mean():.0f} % foreground; {100 * failed:.1f} % of them have under "
              "1 % or over 90 %; an augmented crop that has so keeps its background", flush=True)
    u.wait_for_all()
    return True


# ==========================================================================================================
# The masked autoencoder
# ==========================================================================================================
def rows_of(s: Settings, step: int, own: slice, domains: list) -> tuple[np.ndarray, np.ndarray]:
    """Which of the domains, and which row of it, each image of a share of batch `step` is: (b,) and (b,)."""
    counts = np.array([len(dataset) for dataset, _, _ in domains])
    ends = counts.cumsum()
    rows = data.batch_rows(int(ends[-1]), s.seed, "pretraining order", step, s.batch)[own]    # of their union
    which = np.searchsorted(ends, rows, "right")
    return which, rows - (ends - counts)[which]


def pretraining_batch(s: Settings, step: int, own: slice, domains: list, unconstrained, device) -> tuple:
    """One share of global batch `step`: images (b, 3, H, W), normalised; weights and masking noise (b, N).

    domains: (data set, its masks or None, whether Eq. (2) uses them). not in the paper: rows come from their
    union, so that the larger has the larger share of a batch.
    """
    rng, N = u.random_generator(s.seed, "pretraining", step), (s.image // s.patch) ** 2
    which, rows = rows_of(s, step, own, domains)
    parameters = data.augmentation(rng, s.batch, s.jitter)[own]
    noise = data.to_device(rng.random((s.batch, N), np.float32)[own], device)            # (b, N)
    x = torch.empty(len(rows), 3, s.image, s.image, device=device)
    fg, w = torch.zeros_like(x[:, :1]), torch.ones(len(rows), N, device=device)   # (b, 1, H, W), (b, N)
    for i, (dataset, masks, weighted) in enumerate(domains):
        here = np.flatnonzero(which == i)
        if not len(here): continue
        at = data.to_device(here, device)
        x[at], seen, _ = data.crops(dataset, rows[here], parameters[here], s.image, device, masks)
        if masks is not None: fg[at] = seen
        if weighted: w[at] = u.foreground_weights(seen, s.patch, s.alpha)                # Eq. (2)
    if s.xc > 0: x = swap_backgrounds(s, rng, x, fg, s.xc, own, s.batch, unconstrained, s.jitter, 0.0)
    return data.normalise(x), w, noise


def reconstruction_loss(s: Settings, model, x, w, noise, device, dtype):
    """L_WMAE of Eq. (3) and, to compare with MAE's logs, the mean squared error of a masked pixel."""
    with u.autocast(device, dtype): predicted, m = model(x, noise, s.mask_ratio)       # (b, N, P*P*3), (b, N)
    patches = u.patchify(x, s.patch)                                                     # (b, N, P*P*3)
    if s.norm_pix: patches = u.normalise_patches(patches)
    L_WMAE = u.weighted_mae_loss(predicted, patches, w, m)                               # Eq. (3)
    with torch.no_grad(): pixel = ((predicted.float() - patches).square().mean(-1) * m).sum() / m.sum()
    return L_WMAE, pixel


def train_autoencoder(s: Settings, run: u.Run, stop: u.StopSignal, domains, unconstrained, device, world):
    """f^E and f^D by Eq. (3). Returns False if stopped."""
    torch.manual_seed(s.seed)
    encoder, decoder = networks(s)
    encoder.checkpointing, parts = s.checkpointing, {"encoder": encoder, "decoder": decoder}
    mae = u.MaskedAutoencoder(encoder, decoder).to(device)
    groups = u.parameter_groups(mae, s.weight_decay)
    optimiser = torch.optim.AdamW(groups, lr=s.lr, betas=(0.9, 0.95), fused=True)
    state = run.resume("checkpoint.pt", optimiser, parts, "pretraining")
    steps = max(1, round(s.epochs * sum(len(dataset) for dataset, _, _ in domains) / s.batch))
    if (start := state["step"]) == steps:
        if run.rank == 0: print(f"finished already: {run.folder}", flush=True)
        return True
    sums = state.get("sums", torch.zeros(3)).to(device)  # of L_WMAE, pixel, steps since the last log
    micro = u.micro_batches(s.batch, s.micro_batch, run.rank, world)

    def make(step, own): return pretraining_batch(s, step, own, domains, unconstrained, device)
    trial, first = copy.deepcopy(mae), make(0, micro[0])
    dtype = run.decide_dtype("precision", s.precision, device, lambda dtype: reconstruction_loss(
        s, trial, *first, device, dtype)[0].backward())  # on a copy, so that timing leaves no trace
    del trial, first
    if run.decide_compile(s.compile, device, steps): mae.compile()
    if run.rank == 0: print(f"MAE: {steps} steps of {s.batch} images, {dtype}, {device}", flush=True)
    model, scaler = u.parallel(mae, world), u.grad_scaler(device, dtype, state)
    progress = u.Progress("MAE", steps, s.batch, start, run.rank)

    def save(done): run.save("checkpoint.pt", s, optimiser, parts, stage="pretraining", step=done,
                             steps=steps, sums=u.mean_over_processes(sums), scaler=scaler.state_dict())

    def losses(step):  # of each image alone
        for own in micro:
            (which, rows), batch = rows_of(s, step, own, domains), make(step, own)
            for i, row, *one in zip(which, rows, *(part.split(1) for part in batch)):
                with torch.no_grad(): L_WMAE, _ = reconstruction_loss(s, mae, *one, device, dtype)
                yield "L_WMAE", L_WMAE, domains[i][0], row
    guard = u.Guard(optimiser, scaler, mae, sums, save, losses)
    ahead = data.prefetch((make(i, own) for i in range(start, steps) for own in micro), device)
    for step in range(start, steps):
        rate = u.cosine_rate(step, steps, round(s.warmup * steps), s.lr)
        for group in optimiser.param_groups: group["lr"] = rate
        guard.start()
        for _ in u.micro_steps(model, micro):
            L_WMAE, pixel = reconstruction_loss(s, model, *next(ahead), device, dtype)
            scaler.scale(L_WMAE / len(micro)).backward()
            sums += torch.stack([L_WMAE.detach(), pixel, torch.ones_like(pixel)]) / len(micro)
        guard.step(step, sums)
        done, stopping = step + 1, stop.requested()
        logging, saving = (done % every == 0 or done == steps for every in (s.log_every, s.save_every))
        if logging or saving or stopping: guard.check()
        if logging:
            L_WMAE, pixel, _ = (u.mean_over_processes(sums) / sums[2]).tolist()
            run.log(stage="pretraining", step=done, L_WMAE=L_WMAE, pixel=pixel, lr=rate)
            progress.show(done, {"L_WMAE": L_WMAE, "per masked pixel": pixel}, final=done == steps)
            sums.zero_()
        if saving or stopping: save(done)
        if stopping: return False
    return True


def main(arguments=None) -> int:
    """f^S, target masks, f^E and f^D in turn; 0 when finished, 130 or 143 when stopped (Ctrl-C, SIGTERM)."""
    s = u.parse_settings(Settings, __doc__, PRESETS, VARIANTS, arguments, TASKS)
    s.out = s.out or f"runs/{u.run_group(s.preset, s.task)}/pretrain-{s.variant}-seed{s.seed}"
    rank, world, device = u.setup_distributed(s.device)
    u.compute_with(s.threads, s.deterministic)
    check(s, world)
    x_c = s.unconstrained if s.xc > 0 or uses_f_S(s) else ""
    data.ensure_benchmark([s.source, s.target, x_c], rank)
    stop = u.StopSignal()

    # ---- data: the target's labels and masks are never opened ----------------------------------------------
    use_masks = s.masks != "none" or s.xc > 0
    source = data.Dataset(s.source, *(["masks"] if use_masks else []))
    target = data.Dataset(s.target) if s.target else None
    if use_masks: check_masks(source.masks, source.folder / "masks.npy", "give --masks none --xc 0")
    unconstrained = data.Dataset(x_c) if x_c else None
    sets = {"source": source, "target": target, "unconstrained": unconstrained}
    if rank == 0: data.say_if_enlarged(list(sets.values()), s.image)
    facts = {name: d.fingerprint for name, d in sets.items() if d is not None}
    target_masks = data.open_masks(s.target_masks, target) if s.target_masks else None
    if target_masks is not None:
        check_masks(target_masks, s.target_masks, "leave out --target-masks")
        facts["target_masks"] = u.file_checksum(s.target_masks)
    # f^S has BatchNorm, of one process's images; once the target's masks are there, nothing else has
    elastic = not uses_f_S(s) or (Path(s.out) / "target_masks.npy").exists()
    run = u.Run(s.out, s, {"data": facts, "world": world, **u.machine(device)}, rank, elastic)

    # ---- f^S, and the target's masks by it -----------------------------------------------------------------
    if uses_f_S(s):
        net = train_segmentation(s, run, stop, source, unconstrained, device, world)
        if net is None: return stop.status
        dtype = getattr(torch, run.config["segmentation_precision"])
        path = run.folder / "target_masks.npy"
        if not predict_masks(s, net, target, path, run, stop, world, device, dtype): return stop.status
        target_masks = data.open_masks(path, target)

    # ---- f^E and f^D ---------------------------------------------------------------------------------------
    domains = [(source, source.masks, s.masks != "none")]
    if target is not None: domains.append((target, target_masks, s.masks == "both"))
    finished = train_autoencoder(s, run, stop, domains, unconstrained, device, world)
    if not finished: return stop.status
    if rank == 0: print(f"finished: {run.folder}; train_finetune.py can start from it", flush=True)
    return 0


if __name__ == "__main__": u.run_script(main)
