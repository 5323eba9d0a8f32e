"""Results of many runs: which are averaged, the statistics of a row, the paper's tables, and sweeps.

Needed by evaluate.py alone. Everything here works on rows and results that are passed in; no run is opened.
"""

import itertools
import json
import re
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import numpy as np

from support.rendering import in_benchmark
from support.run import InputError, run_group

# The paper's tables: (our row, the paper's words, its error FreiHAND to RHD, its error Human3.6M to 3DHP).
# A row without a name of ours is a method that we did not run.
TABLES = {
    "Tables 1 and 2": (
        ("", "Zhang et al., source only", 48.3, 121.8),
        ("scratch", "Ours (Scratch)", 46.3, 120.5),
        ("source-only-mae", "Ours (MAE), source only", 41.7, 113.5),
        ("source-only-no-xc", "Ours w/o X_C, source only", 38.6, 109.2),
        ("source-only", "Ours, source only", 37.1, 107.0),
        ("ddc", "DDC (our backbone)", 44.6, 115.6),
        ("dan", "DAN (our backbone)", 40.5, 109.5),
        ("dann", "DANN (our backbone)", 38.0, 107.9),
        ("mae-ddc", "DDC (our backbone, MAE weights)", "-", "-"),
        ("mae-dan", "DAN (our backbone, MAE weights)", "-", "-"),
        ("mae-dann", "DANN (our backbone, MAE weights)", "-", "-"),
        ("", "ISO", "-", "75.8 (PA)"),
        ("", "Zhang et al.", 35.4, 99.3),
        ("", "Kundu et al.", "-", 96.2),
        ("mae", "Ours (MAE)", 34.4, 101.3),
        ("no-xc", "Ours w/o X_C", 29.1, 94.6),
        ("full", "Ours", 28.0, 93.6),
    ),
    "Table 3 without X_C": (
        ("mae", "Ours w/o FCR, AR", 34.4, 101.3),
        ("no-fcr-xc", "Ours w/o FCR", "-", "-"),
        ("no-xc-ar", "Ours w/o AR", "-", "-"),
        ("no-xc", "Ours", 29.1, 94.6),
    ),
    "Table 3 with X_C": (
        ("no-fcr-ar", "Ours w/o FCR, AR", "-", "-"),
        ("no-fcr", "Ours w/o FCR", 34.6, 104.0),
        ("no-ar", "Ours w/o AR", 32.0, 98.1),
        ("full", "Ours", 28.0, 93.6),
    ),
    "Table 4": (
        ("no-fcr", "Ours w/o S_S, S_T", 34.6, 104.0),
        ("source-masks", "Ours w/o S_T", 32.3, 100.6),
        ("full", "Ours", 28.0, 93.6),
        ("true-masks", "true S_T: an upper bound", "-", "-"),
    ),
    "Table 9, alpha = 4": (
        ("r0.5", "r = 0.5", 32.1, 104.1),
        ("full", "r = 0.75", 28.0, 93.6),
        ("r0.95", "r = 0.95", 29.4, 105.9),
    ),
    "Table 9, r = 0.75": (
        ("alpha2", "alpha = 2", 31.1, 98.6),
        ("full", "alpha = 4", 28.0, 93.6),
        ("alpha8", "alpha = 8", 29.8, 99.0),
    ),
    "Bounds": (("oracle", "target labels instead of the source's", "-", "-"),),
}
ROWS = [row for rows in TABLES.values() for row, *_ in rows]
ORDER = {row: place for place, row in enumerate(ROWS)}  # of a row in several tables: its last place
CELLS = {  # which of FCR, X_C, AR are on in these eight rows
    "full": (1, 1, 1),
    "no-ar": (1, 1, 0),
    "no-xc": (1, 0, 1),
    "no-xc-ar": (1, 0, 0),
    "no-fcr": (0, 1, 1),
    "no-fcr-ar": (0, 1, 0),
    "no-fcr-xc": (0, 0, 1),
    "mae": (0, 0, 0),
}
# two-sided 95 % quantiles of Student's t for 2, 3, .. 10 values; for more, that of 10 is a little too wide
T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)


# ==========================================================================================================
# Files of results
# ==========================================================================================================
def read_lines(path: Path) -> list[dict]:
    """The results in a .jsonl file. Other lines are skipped."""
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError) as problem:
        raise InputError(f"{path}: not a readable file of results ({problem}); remove it") from problem
    return [line for line in lines if isinstance(line, dict) and "kind" in line]


def read_results(places: list[str], only: list[str]) -> list[dict]:
    """The results in these files and in all .jsonl files below these folders; `only` those of some rows."""
    paths = []
    for place in map(Path, places):
        if not place.exists():
            raise InputError(f"{place}: no such folder or file")
        paths += [place] if place.is_file() else sorted(place.rglob("*.jsonl"))
    paths = dict.fromkeys(path for path in paths if path.name != "log.jsonl")  # each file once
    results = [r for path in paths for r in read_lines(path)]
    if not results:
        raise InputError(f"{', '.join(places)}: no results here; measure first, without --table")
    names = [(r["row"], f"{r['row']}-seed{r['settings']['seed']}") for r in results]
    chosen = [r for r, own in zip(results, names, strict=True)
              if not only or any(fnmatch(name, pattern) for name in own for pattern in only)]
    if not chosen:
        raise InputError(f"--only {' '.join(only)}: choose {', '.join(sorted({row for row, _ in names}))}")
    return chosen


# ==========================================================================================================
# Rows: which runs are averaged
# ==========================================================================================================
FREE = {"preset", "variant", "task", "out", "seed", "init", "epochs", "validation", "device", "threads",
        "workers", "compile", "checkpointing", "save_every", "log_every", "validate_every"}  # define no row


class Row(NamedTuple):
    """Runs that differ in the seed alone."""

    name: str  # of their folders, without -seedN
    label: str  # the name and, if runs of this name differ in a setting, its value: "full, lam 10"
    runs: list[dict]  # their results


def row_name(settings: dict) -> str:
    """The row that a run belongs to: the name of its folder without -seedN."""
    return re.sub(r"-seed\d+$", "", Path(settings["out"]).name).removeprefix("pretrain-")


def families(results: list[dict]) -> list[tuple[str, list[dict]]]:
    """[(title, results)] that share a table: of one preset and task, on the same test sets. tiny is first."""
    found = {}
    for r in results:
        s = r["settings"]
        ours = in_benchmark(s["source"]) or s["preset"].startswith("paper")  # else the preset says nothing
        title = f"{run_group(s['preset'], s.get('task', 'hand'))} on {r['test']}" if ours else r["test"]
        found.setdefault((title, r["source_test"], *r["tests"].values()), []).append(r)
    order = sorted(found, key=lambda key: (not key[0].startswith("tiny"), key))
    return [(key[0], found[key]) for key in order]


def settings_of(results: list[dict], defaults: dict[str, dict]) -> list[dict]:
    """The settings that define a row: runs that agree on all of them are averaged over seeds.

    defaults: {"pretraining": .., "finetuning": ..}, which runs had from before a setting existed. Steps stand
    for epochs: fewer labels in more epochs are the same training. A setting without a default that some of
    the runs do not know is not compared.
    """

    def defined(kind: str, settings: dict) -> dict:
        return {k: v for k, v in (defaults[kind] | settings).items() if k not in FREE}

    known = []
    for r in results:
        before = r["settings"] if r["kind"] == "pretraining" else r.get("pretraining", {}).get("settings")
        own = {}
        if before:
            kept = {"epochs": before["epochs"], "seed": before["seed"], "init": before.get("init", "")}
            own = defined("pretraining", before) | kept
            own["target_masks"] *= own["target_masks"].endswith(".npy")  # a run's: f^S was not trained again
            own = {f"pretraining.{k}": v for k, v in own.items()}
        if r["kind"] == "finetuning":
            own |= defined("finetuning", r["settings"]) | {"steps": r["steps"]}
            own["labels"] = r.get("labels", own["labels"])
            own["init"] = "pre-trained" if before else re.sub(r"-seed\d+$", "", r["settings"]["init"])
        known.append(own)
    if len({own.get("pretraining.seed") for own in known}) > 1:  # not one pre-training for all seeds
        for r, own in zip(results, known, strict=True):
            if own.get("pretraining.seed") == r["settings"]["seed"]:
                own["pretraining.seed"] = "the same"
    common = [k for k in known[0] if all(k in own for own in known)]
    return [{k: own[k] for k in common} for own in known]


def rows_of(results: list[dict], kind: str, defaults: dict[str, dict]) -> list[Row]:
    """The rows of a family, in the paper's order, then in that of the alphabet. Of two runs of a row and a
    seed, the first counts."""
    named, rows = {}, []
    for r in results:
        if r["kind"] == kind:
            named.setdefault(r["row"], []).append(r)
    for name in sorted(named, key=lambda name: (ORDER.get(name, len(ROWS)), name)):
        known, groups = settings_of(named[name], defaults), {}
        differ = [k for k in known[0] if len({own[k] for own in known}) > 1]
        for r, own in zip(named[name], known, strict=True):
            groups.setdefault(tuple(own[k] for k in differ), {}).setdefault(r["settings"]["seed"], r)
        for values in sorted(groups, key=lambda values: [in_order(v) for v in values]):
            what = "".join(f", {k} {plain(v)}" for k, v in zip(differ, values, strict=True))
            rows.append(Row(name, name + what, list(groups[values].values())))
    return rows


def reference_row(rows: list[Row], minus: str) -> Row | None:
    """The row that differences are taken to: named `minus`; without a name scratch, else the first row."""
    found = [row for row in rows if (minus or "scratch") in (row.name, row.label)]
    if minus and len(found) > 1:
        raise InputError(f"--minus {minus}: several rows: {'; '.join(row.label for row in found)}")
    return found[0] if found else None if minus else rows[0]


# ==========================================================================================================
# Statistics of a row, and printing
# ==========================================================================================================
def spread(values: list[float], digits: int = 1) -> str:
    """Mean and, over several seeds, the sample standard deviation. "-" if a value is not known (NaN)."""
    if np.isnan(values).any():
        return "-"
    mean = f"{np.mean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {np.std(values, ddof=1):.{digits}f}"


def means(values: list[list[float] | None], digits: int) -> str:
    """Means over the seeds of lists (seeds, n). "-" if a seed has none, or a NaN."""
    if not values or not all(values) or np.isnan(values).any():
        return "-"
    return " ".join(f"{v:.{digits}f}" for v in np.mean(values, axis=0))


def interval(differences: list[float]) -> str:
    """Mean of paired differences and, from two on, its 95 % interval by Student's t."""
    d = np.asarray(differences)
    if len(d) < 2:
        return f"{d[0]:+.1f}" if len(d) else "-"
    half = T95[min(len(d), 10) - 2] * d.std(ddof=1) / len(d) ** 0.5
    return f"{d.mean():+.1f} [{d.mean() - half:+.1f}, {d.mean() + half:+.1f}]"


def error(result: dict, of: str) -> float:
    """A run's error on the target or the source, or the gap between the two, mm."""
    return error(result, "target") - error(result, "source") if of == "gap" else result[of]["epe"]


def by_seed(runs: list[dict], of: str = "target") -> dict[int, float]:
    """{seed: error} of the runs of a row."""
    return {r["settings"]["seed"]: error(r, of) for r in sorted(runs, key=lambda r: r["settings"]["seed"])}


def paired_difference(runs: list[dict], reference: list[dict] | None, of: str = "target") -> str:
    """Error minus the reference row's, over the seeds that both have: mean and 95 % interval.

    If a row has more seeds than these, their number is added: it is then not the difference of the means.
    """
    if reference is None or runs is reference:
        return "-"
    ours, theirs = by_seed(runs, of), by_seed(reference, of)
    seeds = [seed for seed in ours if seed in theirs]
    few = 0 < len(seeds) < max(len(ours), len(theirs))
    text = interval([ours[seed] - theirs[seed] for seed in seeds])
    return text + f" ({len(seeds)} seed{'s' * (len(seeds) > 1)})" * few


def plain(value) -> str:
    """A setting's value as it is printed: 0.75, not 0.750; all digits where %g would drop some."""
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)


def in_order(value) -> tuple:
    """Sorting key of settings' values: numbers before words."""
    return (False, value) if isinstance(value, (int, float)) else (True, str(value))


def show_table(lines: list[list[str]], markdown: bool = False) -> str:
    """Columns aligned, as text or as Markdown. The first line is the header."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    if markdown:
        lines = [lines[0], ["-" * width for width in widths], *lines[1:]]
    text = [" | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    return "\n".join(f"| {line} |" if markdown else line.rstrip() for line in text) + "\n"


# ==========================================================================================================
# The table of fine-tuned runs, and that of pre-training runs
# ==========================================================================================================
def table(rows: list[Row], reference: Row | None, every=False, rigid=False) -> list[list[str]]:
    """Lines of text, the header first, for the rows of one family.

    every: all columns; rigid: PA errors are aligned without scale.
    """
    to = reference and reference.runs
    against = f"minus {reference.label} [95 %]" if reference else "difference"
    lines = []
    for _, label, runs in rows:
        name, target = runs[0]["metric"], [r["target"] for r in runs]
        cells = {
            "run": label,
            "seeds": str(len(runs)),
            f"target {name}": spread([error(r, "target") for r in runs]),
            against: paired_difference(runs, to),
            f"source {name}": spread([error(r, "source") for r in runs]),
            "gap": spread([error(r, "gap") for r in runs]),
        }
        if every:
            aligned = "pa_rigid" if rigid else "pa_epe"
            parts = [[t.get(part, np.nan) for part in ("in_plane", "depth")] for t in target]
            before = [r.get("pretraining", {}).get("target", {}) for r in runs]
            cells |= {
                f"source {against}": paired_difference(runs, to, "source"),
                f"gap {against}": paired_difference(runs, to, "gap"),
                f"{'rigid ' * rigid}PA-{name}": spread([t.get(aligned, np.nan) for t in target]),
                "AUC": spread([t["auc"] for t in target], 3),
                "in plane, depth": means(parts, 1),
                "lift before": means([b.get("lift") for b in before], 2),
                "lift": means([t.get("lift") for t in target], 2),
                "target, seed by seed": " ".join(f"{e:.1f}" for e in by_seed(runs).values()),
                "minutes": spread([r["seconds"] / 60 for r in runs]),
            }
        lines.append(list(cells.values()))
    return [list(cells), *lines]


def pretraining_table(rows: list[Row]) -> list[list[str]]:
    """Lines of text for pre-training runs: IoU of f^S; attention of f^A and errors of f^D by region."""
    lines = [["pre-training", "seeds", "IoU of f^S, target", "source", "lift, target",
              "error on, at edge of, beside the foreground", "the same, source", "minutes"]]
    for _, label, runs in rows:
        target, source = ([r[domain] for r in runs] for domain in ("target", "source"))
        iou = [spread([d.get("mask_iou", np.nan) for d in some], 2) for some in (target, source)]
        errors = [means([d["reconstruction"] for d in some if "reconstruction" in d], 3)
                  for some in (target, source)]
        lift, minutes = means([d.get("lift") for d in target], 2), spread([r["seconds"] / 60 for r in runs])
        lines.append([label, str(len(runs)), *iou, lift, *errors, minutes])
    return lines


def chance_line(rows: list[Row], width: int) -> list[str]:
    """The error of answering every image with the mean pose of the training labels; `width` cells."""
    target, source = (spread([rows[0].runs[0][domain]["chance"]]) for domain in ("target", "source"))
    return ["chance: constant mean pose", "", target, "", source, *[""] * (width - 5)]


def notes(rows: list[Row]) -> list[str]:
    """What the errors are measured on: images, compared joints, protocol; and rows worse than chance."""
    found = []
    for row, (domain, test) in itertools.product(rows, (("target", "test"), ("source", "source_test"))):
        for r in row.runs:
            words = [f"{domain}: {r[domain]['images']} images of {r[test]} ({r['tests'][domain]})",
                     f"{r['metric']} over {r[domain]['compared']}, roots aligned", r[domain].get("protocol")]
            found.append("; ".join(filter(None, words)))
    worse = [row.label for row in rows
             if np.mean([r["target"]["epe"] - r["target"]["chance"] for r in row.runs]) > 0]
    if worse:
        found.append(f"worse on the target than the constant mean pose: {', '.join(worse)}")
    return list(dict.fromkeys(found))


# ==========================================================================================================
# The paper's tables
# ==========================================================================================================
def paper_tables(rows: list[Row], lines: list[list[str]]) -> dict[str, list[list[str]]]:
    """{title: lines} in the paper's order and words, with its numbers in the last column.

    rows: of one test set; lines: the header, one of each row, and chance. Rows that nobody ran say so.
    """
    header, *lines, chance = lines
    ours, empty, tables = list(zip(rows, lines, strict=True)), [""] * (len(header) - 2), {}
    human = rows[0].runs[0]["metric"] == "MPJPE"
    reference = f"paper: {'Human3.6M to 3DHP' if human else 'FreiHAND to RHD'}"
    for title, entries in TABLES.items():
        tables[title] = [[*header, reference]]
        for name, words, *errors in entries:
            number = str(errors[human])
            if not name and number == "-":  # a method of the paper's other table
                continue
            found = [[f"{line[0]}: {words}", *line[1:]] for row, line in ours if name and row.name == name]
            absent = [f"{name}: {words}", "not run"] if name else [words, "reported"]
            tables[title] += [[*line, number] for line in found or [[*absent, *empty]]]
    tables[title].append([*chance, ""])
    if text := effects({row.name: by_seed(row.runs) for row in rows}):
        tables["FCR, X_C, AR in all eight cells"] = text
    return tables


def effects(errors: dict[str, dict[int, float]]) -> list[list[str]]:
    """What each of FCR, X_C and AR does to the error, over its four pairs of cells; [] unless all eight ran.

    errors: {row: {seed: error}}. An interval is over the seeds that all cells have, each with the mean of its
    four pairs.
    """
    seeds = sorted(set.intersection(*(set(errors.get(cell, ())) for cell in CELLS)))
    if not seeds:
        return []
    lines = [["switch", "seeds", "target error with it minus without [95 %]", "lower in"]]
    for i, switch in enumerate(("FCR", "X_C", "AR")):
        pairs = [(on, off) for (on, a), (off, b) in itertools.product(CELLS.items(), repeat=2)
                 if a[i] > b[i] and a[:i] + a[i + 1:] == b[:i] + b[i + 1:]]
        d = np.array([[errors[on][s] - errors[off][s] for on, off in pairs] for s in seeds])  # (seeds, 4)
        lower = f"{(d < 0).sum()} of {d.size} pairs"
        lines.append([switch, str(len(seeds)), interval(d.mean(axis=1)), lower])
    return lines


# ==========================================================================================================
# Sweeps
# ==========================================================================================================
def sweep(results: list[dict], setting: str, defaults: dict[str, dict]) -> dict[str, dict]:
    """{line: {value of the setting: results}}: runs of one variant that differ in nothing else but the seed.

    results: on one test set. `setting` is one of fine-tuning or of pre-training. Of two runs that agree in
    everything, the one named after its variant counts, or else the one with the shorter name.
    """
    found = {}
    for variant in dict.fromkeys(r["settings"]["variant"] for r in results):
        runs = [r for r in results if r["settings"]["variant"] == variant]
        runs.sort(key=lambda r: (r["row"] != variant, len(r["row"])))
        lines: dict[tuple, dict] = {}
        for result, own in zip(runs, settings_of(runs, defaults), strict=True):
            key = setting if setting in own else f"pretraining.{setting}"
            if key in own:
                value = own.pop(key)
                points = lines.setdefault(tuple(own.items()), {})
                points.setdefault(value, {}).setdefault(result["settings"]["seed"], result)
        lines = {others: points for others, points in lines.items() if len(points) > 1}
        for others, points in lines.items():
            what = [f", {k} {plain(v)}" for k, v in others if any((k, v) not in line for line in lines)]
            values = sorted(points, key=in_order)
            found["".join([variant, *what])] = {value: list(points[value].values()) for value in values}
    return found
