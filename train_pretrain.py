"""Stage 1, Sec. 3.1: segmentation network f^S -> target masks -> masked autoencoder f^E, f^D on both domains.

    python train_pretrain.py                                         the embedded benchmark, minutes on a CPU
    python train_pretrain.py --preset paper-hand --device cuda       the paper's size on one GPU
    torchrun --nproc_per_node 8 train_pretrain.py --preset paper-hand

The same command again resumes a run that was stopped. Variants of the paper's tables: --variant (see VARIANTS), or any
of --masks, --xc, --r, --alpha on its own. Writes checkpoint.pt (f^E, f^D), segmentation.pt (f^S), target_masks.npy.
"""
import contextlib
import copy
import dataclasses
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import data
import udapose as u


@dataclasses.dataclass
class Settings:
    preset: str = "tiny"          # sizes and schedule: tiny, small, paper-hand, paper-human
    variant: str = "full"         # row of the paper's tables: see VARIANTS
    run: str = ""                 # run folder; default runs/PRESET/pretrain-VARIANT-seedSEED
    source: str = "datasets/hands/source_train"        # data-set folder with masks
    target: str = "datasets/hands/target_train"        # data-set folder, images only; "" for source only
    unconstrained: str = "datasets/hands/unconstrained"  # X_C, images only
    target_masks: str = ""        # .npy with masks of the target to use instead of f^S's (an upper bound, Table 4)
    masks: str = "both"           # domains whose masks weight Eq. 2 (Table 4): both, source, none
    xc: float = 0.5               # share of images whose background is replaced from X_C; 0: never (ours: half)
    r: float = 0.75               # masking ratio (paper Sec. 7, Table 9)
    alpha: float = 4.0            # sharpness of the foreground weights, Eq. 2 (paper Sec. 7, Table 9)
    norm_pix: bool = False        # reconstruct pixels normalised per patch (MAE's option; Eq. 3 has raw pixels)
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
    warmup: float = 0.05          # share of the steps in which the learning rate rises (MAE: 40 of 800 epochs)
    lr: float = 2.4e-3            # peak learning rate of AdamW (paper Sec. 7; already scaled to batch 4096)
    weight_decay: float = 0.05    # of AdamW (paper Sec. 7)
    jitter: float = 0.4           # brightness, contrast, saturation 1 +- jitter (ours)
    seg_steps: int = 20000        # steps of f^S (ours; the paper is silent on its training)
    seg_batch: int = 64           # images a step of f^S (ours)
    seg_lr: float = 1e-3          # peak learning rate of f^S (ours)
    seg_jitter: float = 0.6       # colour jitter of f^S: strong, since it has to work on a domain it never saw (ours)
    seed: int = 0                 # of everything random
    device: str = "auto"          # auto, cpu, cuda
    threads: int = 0              # CPU threads of a process; 0: torch's choice
    precision: str = "auto"       # auto (timed at start-up), float32, bfloat16
    save_every: int = 200         # steps between checkpoints: what a kill can lose
    log_every: int = 50           # steps between lines of log.jsonl


TINY = dict(image=48, patch=8, width=96, depth=4, heads=3, decoder_width=64, decoder_heads=2, seg_channels=24,
            batch=128, epochs=16, lr=1.5e-3, seg_steps=700, seg_batch=32)
PRESETS = {
    "tiny": TINY,
    "small": TINY | dict(epochs=80, seg_steps=2000, seg_batch=48, save_every=500),
    "paper-hand": dict(source="datasets/freihand_train", target="datasets/rhd_train",
                       unconstrained="datasets/imagenet_val", micro_batch=256),
    "paper-human": dict(source="datasets/h36m_train", target="datasets/3dhp_train",
                        unconstrained="datasets/imagenet_val", micro_batch=256),
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


def check(s: Settings) -> None:
    if s.masks not in ("both", "source", "none"): raise u.InputError(f"masks {s.masks!r}: both, source or none")
    if not 0 < s.r < 1: raise u.InputError(f"r = {s.r}: the masking ratio lies between 0 and 1")
    if not 0 <= s.xc <= 1: raise u.InputError(f"xc = {s.xc}: a share between 0 and 1")


# ==========================================================================================================
# f^S: learned on the source's images and masks only
# ==========================================================================================================
def segmentation_batch(s: Settings, step: int, own: slice, source, unconstrained, device) -> tuple:
    """Images (b, 3, H, W), normalised, and masks (b, 1, H, W) in 0..1: strong colours, half the backgrounds from X_C."""
    rng = u.random_generator(s.seed, "segmentation", step)
    rows = data.batch_rows(len(source), s.seed, "segmentation order", step, s.seg_batch)
    parameters = data.augmentation(rng, s.seg_batch, s.seg_jitter, gain=0.4)
    swap, xc_rows = rng.random(s.seg_batch) < 0.5, rng.integers(len(unconstrained), size=s.seg_batch)
    xc_parameters = data.augmentation(rng, s.seg_batch, s.seg_jitter, gain=0.4)
    x, m, _ = data.crops(source, rows[own], parameters[own], s.image, device, source.masks)
    swap, at = swap[own], torch.from_numpy(np.flatnonzero(swap[own])).to(device)
    x_c, _, _ = data.crops(unconstrained, xc_rows[own][swap], xc_parameters[own][swap], s.image, device)
    x[at] = u.replace_background(x[at], m[at], x_c)
    return data.normalise(x), m


def train_segmentation(s: Settings, run: u.Run, stop: u.StopSignal, source, unconstrained, rank, world, device):
    """f^S, trained by binary cross-entropy. not in the paper: the whole recipe (Sec. 3.1 says "pre-trained")."""
    torch.manual_seed(s.seed)
    net = u.UNet(s.seg_channels).to(device, memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(u.parameter_groups(net, 1e-4), lr=s.seg_lr)
    state = run.resume("segmentation.pt", segmentation=net, optimiser=optimiser)
    start, seconds = (state["step"], state["seconds"]) if state else (0, 0.0)
    if start == s.seg_steps: return net.eval()
    model = DistributedDataParallel(net) if world > 1 else net
    own = u.share_of_batch(s.seg_batch, 0, rank, world)[0]

    def loss_of(network, x, m, dtype):
        with u.autocast(device, dtype): logits = network(x.to(memory_format=torch.channels_last))
        return F.binary_cross_entropy_with_logits(logits.float(), m)

    trial, first = copy.deepcopy(net), segmentation_batch(s, 0, own, source, unconstrained, device)
    dtype = getattr(torch, run.decide("segmentation_precision", lambda: u.choose_precision(
        s.precision, device, lambda dtype: loss_of(trial, *first, dtype).backward())))
    if rank == 0: print(f"f^S: {s.seg_steps} steps of {s.seg_batch} images, {dtype}, {device}", flush=True)
    progress, begin = u.Progress("f^S", s.seg_steps, s.seg_batch, start, rank), time.perf_counter()
    steps = range(start, s.seg_steps)
    for step, batch in zip(steps, data.prefetch(
            segmentation_batch(s, i, own, source, unconstrained, device) for i in steps)):
        for group in optimiser.param_groups: group["lr"] = u.cosine_rate(step, s.seg_steps, 50, s.seg_lr)
        loss = loss_of(model, *batch, dtype)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        done, stopping = step + 1, stop.requested(device)
        if done % s.log_every == 0:
            value = float(u.mean_over_processes(loss.detach()))
            run.log(stage="segmentation", step=done, L_seg=value)
            progress.show(done, {"L_seg": value}, final=done == s.seg_steps)
        if done % s.save_every == 0 or done == s.seg_steps or stopping:
            run.save("segmentation.pt", {"settings": dataclasses.asdict(s), "stage": "segmentation", "step": done,
                                         "seconds": seconds + time.perf_counter() - begin,
                                         "segmentation": net.state_dict(), "optimiser": optimiser.state_dict()})
        if stopping: return None
    return net.eval()


@torch.no_grad()
def predict_masks(s: Settings, net, dataset: data.Dataset, path: Path, rank: int, device, dtype) -> None:
    """S_T = f^S(X_T), Sec. 3.1: soft masks (n, H, H) uint8 of every stored target image, written once into the run."""
    if rank == 0 and not path.exists():
        n, H = dataset.images.shape[:2]
        seen = round(s.image * dataset.meta["margin"])  # f^S learned at this many pixels for the stored crop
        masks = np.empty((n, H, H), np.uint8)
        progress = u.Progress("target masks", n, 1)
        for i in range(0, n, 64):
            rows = np.arange(i, min(i + 64, n))
            x = F.interpolate(data.load_images(dataset, rows, device), size=seen, mode="bilinear", antialias=True)
            with u.autocast(device, dtype): logits = net(data.normalise(x).to(memory_format=torch.channels_last))
            soft = F.interpolate(logits.float().sigmoid(), size=H, mode="bilinear", antialias=True)
            masks[rows] = (255 * soft[:, 0]).round().byte().cpu().numpy()
            progress.show(int(rows[-1]) + 1, final=rows[-1] == n - 1)
        u.write_atomically(path, lambda part: np.save(open(part, "wb"), masks))
    if u.distributed(): torch.distributed.barrier()


# ==========================================================================================================
# The masked autoencoder
# ==========================================================================================================
def pretraining_batch(s: Settings, step: int, own: slice, domains: list, unconstrained, device) -> tuple:
    """One share of global batch `step`: images (b, 3, H, W), normalised; patch weights and masking noise (b, N).

    domains: (data set, its masks or None, whether they weight Eq. 2) for source and target; rows come from their union.
    """
    rng, N = u.random_generator(s.seed, "pretraining", step), (s.image // s.patch) ** 2
    sizes = [len(dataset) for dataset, _, _ in domains]
    rows = data.batch_rows(sum(sizes), s.seed, "pretraining order", step, s.batch)[own]
    parameters = data.augmentation(rng, s.batch, s.jitter)[own]
    noise = torch.from_numpy(rng.random((s.batch, N), np.float32)[own]).to(device)
    swap, xc_rows = (rng.random(s.batch) < s.xc)[own], rng.integers(2 ** 62, size=s.batch)[own]
    xc_parameters = data.augmentation(rng, s.batch, s.jitter)[own]
    x = torch.empty(len(rows), 3, s.image, s.image, device=device)
    m, w = torch.zeros_like(x[:, :1]), torch.ones(len(rows), N, device=device)
    for k, (dataset, masks, weighted) in enumerate(domains):
        here = np.flatnonzero((rows >= sum(sizes[:k])) & (rows < sum(sizes[:k + 1])))
        if not len(here): continue
        at = torch.from_numpy(here).to(device)
        images, mask, _ = data.crops(dataset, rows[here] - sum(sizes[:k]), parameters[here], s.image, device, masks)
        x[at] = images
        if masks is not None: m[at] = mask
        if weighted: w[at] = u.foreground_weights(mask, s.patch, s.alpha)                # Eq. (2)
    if swap.any():
        at = torch.from_numpy(np.flatnonzero(swap)).to(device)
        x_c, _, _ = data.crops(unconstrained, xc_rows[swap] % len(unconstrained), xc_parameters[swap], s.image, device)
        x[at] = u.replace_background(x[at], m[at], x_c)
    return data.normalise(x), w, noise


def reconstruction_loss(s: Settings, model, x, w, noise, device, dtype):
    """L_WMAE of Eq. (3) and, for comparison with MAE's logs, the plain mean squared error of a masked pixel."""
    with u.autocast(device, dtype): predicted, m = model(x, noise, s.r)
    patches = u.patchify(x, s.patch)                                                     # (b, N, P*P*3)
    if s.norm_pix:
        patches = (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6).sqrt()
    L_WMAE = u.weighted_mae_loss(predicted, patches, w, m)                               # Eq. (3)
    with torch.no_grad(): pixel = ((predicted.float() - patches).square().mean(-1) * m).sum() / m.sum()
    return L_WMAE, pixel


def train_autoencoder(s: Settings, run: u.Run, stop: u.StopSignal, domains, unconstrained, rank, world, device):
    torch.manual_seed(s.seed)
    encoder = u.Encoder((s.image, s.image), s.patch, s.width, s.depth, s.heads)
    decoder = u.Decoder(encoder.grid, s.patch, s.width, s.decoder_width, s.decoder_depth, s.decoder_heads)
    mae = u.MaskedAutoencoder(encoder, decoder).to(device)
    optimiser = torch.optim.AdamW(u.parameter_groups(mae, s.weight_decay), lr=s.lr, betas=(0.9, 0.95), fused=True)
    state = run.resume("checkpoint.pt", encoder=encoder, decoder=decoder, optimiser=optimiser)
    start, seconds, sums = (state["step"], state["seconds"], state["sums"].to(device)) if state else \
        (0, 0.0, torch.zeros(2, device=device))
    images = sum(len(dataset) for dataset, _, _ in domains)
    steps = max(1, round(s.epochs * images / s.batch))
    if start == steps: return steps, state["seconds"]
    shares = u.share_of_batch(s.batch, s.micro_batch, rank, world)
    batches = ([pretraining_batch(s, i, own, domains, unconstrained, device) for own in shares]
               for i in range(start, steps))

    def one_pass(dtype):  # on a copy, so that timing leaves no trace
        reconstruction_loss(s, trial, *first[0], device, dtype)[0].backward()
    trial, first = copy.deepcopy(mae), [pretraining_batch(s, 0, shares[0], domains, unconstrained, device)]
    dtype = getattr(torch, run.decide("precision", lambda: u.choose_precision(s.precision, device, one_pass)))
    if rank == 0: print(f"masked autoencoder: {steps} steps of {s.batch} images, {dtype}, {device}", flush=True)

    model = DistributedDataParallel(mae) if world > 1 else mae
    progress, begin = u.Progress("MAE", steps, s.batch, start, rank), time.perf_counter()
    for step, shares_of_batch in zip(range(start, steps), data.prefetch(batches)):
        rate = u.cosine_rate(step, steps, round(s.warmup * steps), s.lr)
        for group in optimiser.param_groups: group["lr"] = rate
        optimiser.zero_grad(set_to_none=True)
        for i, batch in enumerate(shares_of_batch):
            last = i == len(shares_of_batch) - 1  # gradients travel between processes once a step
            with contextlib.nullcontext() if world == 1 or last else model.no_sync():
                L_WMAE, pixel = reconstruction_loss(s, model, *batch, device, dtype)
                (L_WMAE / len(shares_of_batch)).backward()
                sums += torch.stack([L_WMAE.detach(), pixel]) / len(shares_of_batch)
        optimiser.step()
        done, stopping = step + 1, stop.requested(device)
        if done % s.log_every == 0 or done == steps:
            since = done % s.log_every or s.log_every
            L_WMAE, pixel = (u.mean_over_processes(sums) / since).tolist()
            if not np.isfinite(L_WMAE): raise u.InputError(f"L_WMAE is {L_WMAE} at step {done}: lower --lr, or "
                                                           "--precision float32; the last checkpoint is sound")
            run.log(stage="pretraining", step=done, L_WMAE=L_WMAE, pixel=pixel, lr=rate)
            progress.show(done, {"L_WMAE": L_WMAE, "per masked pixel": pixel}, final=done == steps)
            sums.zero_()
        if done % s.save_every == 0 or done == steps or stopping:
            run.save("checkpoint.pt", {"settings": dataclasses.asdict(s), "stage": "pretraining", "step": done,
                                       "steps": steps, "sums": sums, "encoder": encoder.state_dict(),
                                       "seconds": seconds + time.perf_counter() - begin,
                                       "decoder": decoder.state_dict(), "optimiser": optimiser.state_dict()})
        if stopping: return None
    return steps, seconds + time.perf_counter() - begin


def main(arguments=None) -> int:
    s = u.parse_settings(Settings, __doc__, PRESETS, VARIANTS, arguments)
    check(s)
    s.run = s.run or f"runs/{s.preset}/pretrain-{s.variant}-seed{s.seed}"
    rank, world, device = u.setup_distributed(s.device)
    if s.threads: torch.set_num_threads(s.threads)
    data.ensure_benchmark([s.source, s.target, s.unconstrained], rank)
    stop = u.StopSignal()

    # ---- data: the target's labels and masks are never opened ----------------------------------------------
    use_masks = s.masks != "none" or s.xc > 0
    source = data.Dataset(s.source, *(["masks"] if use_masks else []))
    target = data.Dataset(s.target) if s.target else None
    unconstrained = data.Dataset(s.unconstrained) if use_masks else None
    facts = {name: d.fingerprint for name, d in (("source", source), ("target", target)) if d is not None}
    run = u.Run(s.run, s, {"data": facts, "world": world}, rank)

    # ---- f^S, and the target's masks by it -------------------------------------------------------------------
    target_masks = None
    if target is not None and s.target_masks: target_masks = data.open_masks(s.target_masks, target)
    elif target is not None and use_masks and (s.masks == "both" or s.xc > 0):
        net = train_segmentation(s, run, stop, source, unconstrained, rank, world, device)
        if net is None: return 130
        dtype = getattr(torch, run.config["segmentation_precision"])
        predict_masks(s, net, target, run.folder / "target_masks.npy", rank, device, dtype)
        target_masks = data.open_masks(run.folder / "target_masks.npy", target)

    # ---- f^E and f^D -----------------------------------------------------------------------------------------
    domains = [(source, source.masks, s.masks != "none")]
    if target is not None: domains.append((target, target_masks, s.masks == "both"))
    outcome = train_autoencoder(s, run, stop, domains, unconstrained, rank, world, device)
    if outcome is None: return 130
    if rank == 0:
        steps, seconds = outcome
        u.write_json(run.folder / "result.json", {"kind": "pretraining", "settings": dataclasses.asdict(s),
                                                  "steps": steps, "seconds": round(seconds, 1)})
        print(f"finished: {run.folder}/checkpoint.pt, {seconds / 60:.1f} minutes of pre-training", flush=True)
    return 0


if __name__ == "__main__": u.run_script(main)
