"""Sheets of poses, attention and reconstructions, and charts of curves, drawn with Pillow.

Needed by evaluate.py and `data.py show`. Takes arrays and names, never a model or a data set. Everything is
drawn at twice its size and halved when it is saved, which smooths lines. Sizes in this file are doubled.
"""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from support.run import write_atomically
from support.tables import in_order, plain

CELL, CHART, GAP, LINE = 384, (1000, 640), 14, 42  # a panel, a chart, the space between, a line of text
LEFT, TOP, RIGHT, FOOT = 72, 54, 30, 48  # margins of axes; both sums are equal, so that a square stays one
FONT, SMALL = ImageFont.load_default(27), ImageFont.load_default(23)
PAPER, INK, GREY, PALE = (255, 255, 255), (40, 40, 40), (130, 130, 130), (225, 225, 225)
COLOURS = ((230, 60, 60), (240, 170, 30), (60, 200, 80), (60, 140, 250), (200, 90, 230), (60, 210, 210),
           (140, 90, 50), (250, 120, 170), (100, 100, 100), (150, 160, 0))
HOT = 4.0  # a patch is red if its attention is this many times the mean, or more
POSE_TITLES = ["predicted", "front: x, y in mm", "from the right: z, y", "attention, mean of blocks"]


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a picture at half its size, make its folder if needed, and say so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda part: picture.reduce(2).save(part, "PNG"))
    print(f"wrote {path}", flush=True)


def fitting(text: str, width: float) -> str:
    """Shorten text to `width` px by cutting its middle, because names often differ at the end."""
    whole, kept = text, len(text) // 2
    while FONT.getlength(text) > width and kept > 1:
        kept -= 1
        text = f"{whole[:kept]}..{whole[-kept:]}"
    return text


def sheet(rows: list[list], titles: list[str], heading: str) -> Image.Image:
    """One picture of rows of equal panels [(picture, caption)], under a heading and a title per column."""
    w, h = rows[0][0][0].size[0] + GAP, rows[0][0][0].size[1] + LINE + GAP
    width = max(GAP + max(map(len, rows)) * w, 2 * GAP + int(FONT.getlength(heading)))
    page = Image.new("RGB", (width, 2 * LINE + len(rows) * h), PAPER)
    draw = ImageDraw.Draw(page)
    draw.text((GAP, 6), heading, INK, FONT)
    for i, title in enumerate(titles):
        draw.text((GAP + i * w, LINE), title, INK, FONT)
    for r, row in enumerate(rows):
        for i, (panel, caption) in enumerate(row):
            page.paste(panel, (GAP + i * w, 2 * LINE + r * h))
            at = GAP + i * w, LINE - GAP + 4 + (r + 1) * h
            draw.text(at, fitting(caption, panel.size[0]), INK, FONT)
    return page


def to_panel(x: Tensor) -> Image.Image:
    """A square image (3, H, H) or mask (1, H, H) in 0..1 as a panel."""
    pixels = (255 * x.expand(3, -1, -1).clamp(0, 1)).round().byte().permute(1, 2, 0)  # (H, H, 3)
    return Image.fromarray(pixels.cpu().numpy()).resize((CELL, CELL), Image.Resampling.BICUBIC)


def in_panel(uv: Tensor, side: int) -> np.ndarray:
    """Pixels of the network's crop -> pixels of a panel that shows it. Pixel centres are integers."""
    return ((uv + 0.5) * CELL / side - 0.5).cpu().numpy()


def heat(panel: Image.Image, values: Tensor) -> Image.Image:
    """Values (N,) of a square grid of patches over a panel: blue is 0, red HOT times their mean or more."""
    side = round(len(values) ** 0.5)
    hue = (170 * (1 - values / values.mean() / HOT)).clamp(min=0).byte().reshape(side, side)  # 170: blue
    full = Image.new("L", (side, side), 255)
    layer = Image.merge("HSV", [Image.fromarray(hue.cpu().numpy()), full, full]).convert("RGB")
    layer = layer.resize(panel.size, Image.Resampling.NEAREST)  # one colour per patch
    return Image.blend(panel.convert("L").convert("RGB"), layer, 0.45)


def draw_skeleton(draw, uv: np.ndarray, bones: list, width: int, colour: tuple = ()) -> None:
    """Bones between joints uv (K, 2) px (NaN: unlabelled), in one colour or in one per limb."""
    limb, known = -1, np.isfinite(uv).all(axis=1)  # (K,)
    joined = {i for bone in bones if known[list(bone)].all() for i in bone}
    dots = [(uv[i], colour or COLOURS[0]) for i in np.flatnonzero(known) if i not in joined]
    for i, (a, b) in enumerate(bones):
        limb += i == 0 or a != bones[i - 1][1]  # a bone from the end of the last one continues its limb
        if known[[a, b]].all():
            ink = colour or COLOURS[limb % 6]
            draw.line([tuple(uv[a]), tuple(uv[b])], fill=ink, width=width)
            dots.append((uv[b], ink))
    for (x, y), ink in dots:
        draw.ellipse((x - width, y - width, x + width, y + width), fill=ink)


def ticks(a: float, b: float) -> list[float]:
    """Round numbers from a to b: at most six steps of 1, 2 or 5 times a power of ten."""
    low, high = sorted((float(a), float(b)))
    power = 10.0 ** np.floor(np.log10((high - low) / 6))
    step = float(next(m * power for m in (1, 2, 5, 10) if 6 * m * power >= high - low))
    return [step * i for i in range(int(np.ceil(low / step)), int(np.floor(high / step)) + 1)]


def axes(size: tuple, x: tuple, y: tuple, marks: dict[float, str] | None = None):
    """A panel with a grid from x[0], y[0] (lower left) to x[1], y[1], and the map from values (n, 2) to px.
    marks: {x: words} instead of round numbers."""
    panel = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(panel)
    scale = (size[0] - LEFT - RIGHT) / (x[1] - x[0]), (TOP + FOOT - size[1]) / (y[1] - y[0])

    def place(values) -> np.ndarray:
        return (np.asarray(values) - (x[0], y[0])) * scale + (LEFT, size[1] - FOOT)

    for v, words in (marks or {v: f"{v:g}" for v in ticks(*x)}).items():
        draw.line([*place((v, y[0])), *place((v, y[1]))], PALE, 2)
        draw.text(tuple(place((v, y[0])) + (0, 6)), words, GREY, SMALL, anchor="ma")
    for v in ticks(*y):
        draw.line([*place((x[0], v)), *place((x[1], v))], PALE, 2)
        draw.text(tuple(place((x[0], v)) - (7, 0)), f"{v:g}", GREY, SMALL, anchor="rm")
    return panel, place


def view(pose: np.ndarray, truth: np.ndarray | None, across: int, bones: list) -> Image.Image:
    """A pose (K, 3) in mm from the root, in parallel projection with y down. The truth is thin and grey.

    across 0: x points right, as the camera sees it. across 2: z points right, as seen from the right side.
    The truth sets the scale, so that runs can be compared, unless the pose would leave the picture.
    """
    shown = pose if truth is None else truth
    low, high = np.nanmin(shown, axis=0), np.nanmax(shown, axis=0)
    middle = (low + high) / 2
    farthest = np.nanmax(np.abs(pose - middle)[:, [across, 1]])
    half = max(0.6 * (high - low).max(), 1.05 * farthest, 1.0)
    x, y = (middle[axis] + (-half, half) for axis in (across, 1))
    panel, place = axes((CELL, CELL), x, y[::-1])
    draw = ImageDraw.Draw(panel)
    if truth is not None:
        draw_skeleton(draw, place(truth[:, [across, 1]]), bones, 3, GREY)
    draw_skeleton(draw, place(pose[:, [across, 1]]), bones, 6)
    return panel


def chart(title: str, curves: dict[str, tuple], marks: dict | None = None, names: list | None = None):
    """Curves {name: (x, y, half the length of error bars)}, all (n,), with a legend below.

    marks: {x: words} at the points of a sweep; without them x starts at 0. names: of the curves in all charts
    of a sheet, so that each has one colour and the charts are equally high.
    """
    xs = np.concatenate([x for x, _, _ in curves.values()])
    ys = np.concatenate([y + sign * np.nan_to_num(half)
                         for _, y, half in curves.values() for sign in (-1, 1)])
    room = 0.1 * max(np.ptp(ys), 1e-3)
    margin = 0.05 * np.ptp(xs) if marks else 0
    x = (xs.min() - margin if marks else 0, xs.max() + margin)
    panel, place = axes(CHART, x, (ys.min() - room, ys.max() + room), marks)
    names = names or list(curves)
    panel = ImageOps.expand(panel, (0, 0, 0, 38 * len(names)), PAPER)
    draw = ImageDraw.Draw(panel)
    draw.text((LEFT, 6), title, INK, FONT)
    for i, (name, (x, y, half)) in enumerate(curves.items()):
        colour = COLOURS[names.index(name) % len(COLOURS)]
        draw.line(place(np.transpose([x, y])).ravel().tolist(), colour, 5, joint="curve")
        for v, mean, bar in zip(x, y, half, strict=True):
            if bar > 0:
                draw.line([*place((v, mean - bar)), *place((v, mean + bar))], colour, 3)
            if marks or len(x) == 1:  # a line of one point would not show
                inside = PAPER if np.isnan(bar) else colour  # a ring: one seed
                draw.circle(tuple(place((v, mean))), 9, inside, colour, 4)
        draw.text((LEFT, CHART[1] + 38 * i), fitting(name, CHART[0] - LEFT), colour, FONT)
    return panel


def reconstruction_sheet(heading: str, images: list[tuple], names: list[str], masks: Tensor | None, weights):
    """Fig. 2: masked input, reconstruction and original (3, H, H) per row; f^S's mask and Eq. (2), if given.

    names: of rows. masks (n, 1, H, H) by f^S; weights (n, N), which those masks give in the loss, or None.
    """
    rows = [[(to_panel(image), name if i == 0 else "") for i, image in enumerate(row)]
            for row, name in zip(images, names, strict=True)]
    for i, row in enumerate(rows if masks is not None else ()):
        row.append((to_panel(masks[i]), ""))
        if weights is not None:
            words = f"weight {float(weights[i].min()):.1f} to {float(weights[i].max()):.1f}"
            row.append((heat(row[2][0], weights[i]), words))
    titles = ["masked input", "reconstruction", "original", "mask by f^S", "w by this mask, Eq. (2)"]
    return sheet(rows, titles[: len(rows[0])], heading)


def pose_panels(panel, uv, pose, attention: Tensor, bones: list, true_uv=None, truth=None) -> list:
    """A row of Figs. 3 and 4: 2D skeleton (the true one thin), 3D from two sides, attention."""
    flat = panel.copy()
    if true_uv is not None:
        draw_skeleton(ImageDraw.Draw(flat), true_uv, bones, 2, PAPER)
    draw_skeleton(ImageDraw.Draw(flat), uv, bones, 5)
    return [flat, view(pose, truth, 0, bones), view(pose, truth, 2, bones), heat(panel, attention)]


def lift_caption(lift: Tensor) -> str:
    """Words for a lift; none if the test set has no masks."""
    return f"on foreground {float(lift):.2f} x" if lift.isfinite() else ""


def poses_sheet(looks: dict[str, dict], bones: list, test: str) -> Image.Image:
    """Figs. 3 and 4: every image under every run, one below the other. looks: `look_at` in evaluate.py."""
    rows = []
    for i in range(len(next(iter(looks.values()))["panels"])):
        for name, seen in looks.items():
            (uv, true_uv), (pose, truth) = ([both[i] for both in seen[key]] for key in ("uv", "pose"))
            true, attention = seen["panels"][i].copy(), seen["maps"][i].mean(dim=0)
            draw_skeleton(ImageDraw.Draw(true), true_uv, bones, 5)
            panels = [true, *pose_panels(seen["panels"][i], uv, pose, attention, bones, true_uv, truth)]
            lift = lift_caption(seen["lift"][i].mean())
            captions = name, f"error {float(seen['error'][i]):.1f} mm", "", "", lift
            rows.append(list(zip(panels, captions, strict=True)))
    heading = f"{test}; white and grey: true pose, in mm, y down. Attention on the foreground: 1 x is chance"
    return sheet(rows, ["true", *POSE_TITLES], heading)


def attention_sheet(looks: dict[str, dict], test: str) -> Image.Image:
    """Fig. 5: the class attention of every block, for every image under every run."""
    rows = []
    for i in range(len(next(iter(looks.values()))["panels"])):
        for name, seen in looks.items():
            maps = [(heat(seen["panels"][i], a), lift_caption(lift))
                    for a, lift in zip(seen["maps"][i], seen["lift"][i], strict=True)]
            rows.append([(seen["panels"][i], name), *maps])
    titles = [test, *(f"block {i}" for i in range(1, max(map(len, rows))))]
    heading = f"Class-token attention; blue 0, red {HOT:g} x the mean. On the foreground: 1 x is chance"
    return sheet(rows, titles, heading)


def curves_sheet(logs: dict[str, list[dict]]) -> Image.Image | None:
    """Every logged value over the steps, one chart per value. logs: {run: lines of its log.jsonl}."""
    panels, keys = [], dict.fromkeys(key for lines in logs.values() for line in lines for key in line)
    for key in (key for key in keys if key not in ("stage", "step", "lr")):
        curves = {}
        for run, lines in logs.items():
            points = [(line["step"], line[key], 0) for line in lines if key in line]  # 0: no error bars
            curves |= {run: np.transpose(points)} if points else {}
        panels.append((chart(f"{key}, over steps", curves, None, list(logs)), ""))
    rows = [panels[i : i + 2] for i in range(0, len(panels), 2)]
    return sheet(rows, [], "Training, first seed of each run") if rows else None


def sweep_chart(lines: dict[str, dict], title: str) -> Image.Image:
    """Mean and standard deviation over seeds, against the sorted values of a setting, equally far apart.
    lines: {line: {value: [errors]}}."""
    values = sorted({v for points in lines.values() for v in points}, key=in_order)
    curves = {}
    for name, points in lines.items():
        mean = np.array([np.mean(e) for e in points.values()])
        deviation = np.array([np.std(e, ddof=1) if len(e) > 1 else np.nan for e in points.values()])
        curves[name] = [values.index(v) for v in points], mean, deviation
    panel = chart(title, curves, {i: plain(v) for i, v in enumerate(values)})
    return sheet([[(panel, "")]], [], "Mean and standard deviation over seeds; a ring: one seed")
