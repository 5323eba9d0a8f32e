"""Tables from planted results: which runs are averaged, paired differences, the paper's rows, sweeps.

Then the files that results are read from, and metrics by hand.
"""

import itertools
import json
import re

import pytest
import torch

import evaluate
import train_finetune
import train_pretrain
from support import tables
from support.run import InputError, parse_settings

NUMBERS = {"pa_epe": 1.0, "auc": 0.5, "chance": 50.0, "in_plane": 3.0, "depth": 4.0}
NUMBERS |= {"images": 10, "compared": "21 of 21 joints", "protocol": "as published"}


def result(row="full", seed=0, epe=30.0, before=None, test="hands/target_test", preset="tiny", **more):
    """A finished fine-tuning run. `before`: settings of its pre-training run, which had a lift of 1 and 3."""
    s = {"preset": preset, "variant": row, "out": f"runs/{preset}/{row}-seed{seed}", "seed": seed,
         "lam": 100.0, "labels": 1000, "epochs": 32, "source": "datasets/hands/source_train",
         "init": f"runs/{preset}/pretrain-full-seed{seed}" if before is not None else ""}
    made = {"kind": "finetuning", "row": row, "settings": s | more, "steps": 1000, "seconds": 60.0,
            "metric": "EPE", "test": test, "source_test": "hands/source_test",
            "tests": {"source": "s", "target": test},
            "target": {"epe": epe, **NUMBERS}, "source": {"epe": 9.0, **NUMBERS}}
    if before is not None:
        kept = {"seed": seed, "alpha": 4.0, "mask_ratio": 0.75, "epochs": 16, "out": "x"} | before
        made["pretraining"] = {"settings": kept, "target": {"lift": [1.0, 3.0]}}
    return made


def results(row: str, *errors: float, **more) -> list[dict]:
    """Results of a row, the first of seed 0, the next of seed 1, and so on."""
    return [result(row, seed, epe, **more) for seed, epe in enumerate(errors)]


def table(made, minus="", every=False, rigid=False) -> list[dict[str, str]]:
    """The table's lines as {title: cell}."""
    rows = evaluate.rows_of(made, "finetuning")
    header, *lines = tables.table(rows, tables.reference_row(rows, minus), every, rigid)
    return [dict(zip(header, line, strict=True)) for line in lines]


def labels(made, kind="finetuning") -> list[str]:
    return [row.label for row in evaluate.rows_of(made, kind)]


def save(path, made: list[dict]) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in made))
    return str(path)


# ==== Mean, spread, paired difference ===================================================================
def test_difference_is_paired_by_seed():
    """Differences -2, -4, -6: mean -4, standard deviation 2, half the interval 4.30 * 2 / sqrt 3 = 4.97.

    Over some of the seeds it says so: the means are 55 and 46, 9 apart, but 4 over the seeds of both rows.
    """
    first, group = results("scratch", 40, 50, 60, 70), results("full", 38, 46, 54)
    assert tables.paired_difference(group[::-1], first[:3]) == "-4.0 [-9.0, +1.0]"
    assert tables.paired_difference(group[1:2], first[1:2]) == "-4.0"
    assert tables.paired_difference(group[:1], first[1:]) == "-"
    assert tables.paired_difference(group, first) == "-4.0 [-9.0, +1.0] (3 seeds)"
    assert tables.paired_difference(first, group[:1]) == "+2.0 (1 seed)"
    assert [line["target EPE"] for line in table(first + group)] == ["55.0 ± 12.9", "46.0 ± 8.0"]


def test_target_source_and_gap_each_with_its_difference():
    """Target errors fall by 4 and 10, the source's by 1 and 3: the gap by 3 and 7."""
    made = [*results("scratch", 40, 50), *results("full", 36, 40)]
    for r, source in zip(made, (20.0, 24.0, 19.0, 21.0), strict=True):
        r["source"]["epe"] = source
    line = table(made, every=True)[1]
    assert (line["target EPE"], line["source EPE"], line["gap"]) == ("38.0 ± 2.8", "20.0 ± 1.4", "18.0 ± 1.4")
    differences = [line[f"{of}minus scratch [95 %]"].split(" [")[0] for of in ("", "source ", "gap ")]
    assert differences == ["-7.0", "-2.0", "-5.0"]


def test_row_that_differences_are_taken_to():
    made = results("mae", 36) + results("full", 30) + results("scratch", 40)
    column = [line["minus scratch [95 %]"] for line in table(made)]
    assert column == ["-", "-4.0", "-10.0"]  # without a name: scratch
    assert [line["minus full [95 %]"] for line in table(made, "full")] == ["+10.0", "+6.0", "-"]
    assert "minus mae [95 %]" in table(made[:2])[0]  # no scratch: the first row
    two = [*made, result("full", 0, 33, lam=10.0)]
    differences = [line["minus full, lam 10 [95 %]"] for line in table(two, "full, lam 10")]
    assert differences == ["+7.0", "+3.0", "-", "-3.0"]
    with pytest.raises(InputError, match="--minus full: several rows: full, lam 10; full, lam 100"):
        table(two, "full")


def test_what_one_run_of_a_row_does_not_know_has_no_mean():
    made = results("full", 30, 31)
    made[1]["target"]["pa_rigid"] = 7.0
    line = table(made, every=True, rigid=True)[0]
    assert (line["rigid PA-EPE"], line["in plane, depth"]) == ("-", "3.0 4.0")


def test_lift_before_and_after_fine_tuning():
    made = [result(before={}), result(seed=1, before={}), result("scratch")]
    for r, lift in zip(made, ([1.0, 2.0], [1.5, 1.0], [0.5, 0.25]), strict=True):
        r["target"]["lift"] = lift
    scratch, full = table(made, every=True)
    assert (scratch["lift before"], scratch["lift"]) == ("-", "0.50 0.25")
    assert (full["lift before"], full["lift"]) == ("1.00 3.00", "1.25 1.50")


# ==== Which runs are averaged ===========================================================================
def test_runs_of_other_settings_are_rows_of_their_own():
    made = [result(seed=0, epe=30), result(seed=1, epe=32), result(seed=0, epe=40, lam=10.0)]
    assert [(line["run"], line["seeds"], line["target EPE"]) for line in table(made)] == [
        ("full, lam 10", "1", "40.0"), ("full, lam 100", "2", "31.0 ± 1.4")]


def test_settings_of_the_pre_training_tell_rows_apart():
    made = [result(before={}), result(before={"alpha": 8.0}, seed=1), result(before={"seed": 0}, seed=1),
            result(before={"out": "elsewhere"}, seed=1)]
    assert {line["run"]: line["seeds"] for line in table(made)} == {
        "full, pretraining.alpha 4, pretraining.seed 0": "1",
        "full, pretraining.alpha 4, pretraining.seed the same": "2",
        "full, pretraining.alpha 8, pretraining.seed the same": "1"}
    assert labels([result(seed=seed, before={"seed": 0}) for seed in range(3)]) == ["full"]  # of one run
    public = labels([result(before={}), result(init="weights.pth")])
    assert public == ["full, init pre-trained", "full, init weights.pth"]
    assert len(labels([result(before={}), result(before={"init": "weights.pth"}, seed=1)])) == 2
    before = [result(epochs=epochs) | {"kind": "pretraining"} for epochs in (80, 200)]
    assert labels(before, "pretraining") == ["full, pretraining.epochs 80", "full, pretraining.epochs 200"]
    for masks, rows in (("runs/tiny/pretrain-full-seed0", 1), ("true/masks.npy", 2)):  # f^S of a run; a file
        assert len(labels([result(before={}), result(seed=1, before={"target_masks": masks})])) == rows


@pytest.mark.parametrize("free", [
    {"out": "elsewhere/full-seed1"}, {"device": "cuda"}, {"threads": 1}, {"validation": "x"},
    {"init": "runs/tiny/pretrain-full-seed1"}, {"epochs": 64}, {"newer": "setting"}])
def test_what_changes_no_result_keeps_one_row(free):
    """Nor does a setting that the other run does not know. Epochs count by the steps they come to."""
    old = {"device": "cpu", "threads": 2, "validation": ""}
    old["init"] = "runs/tiny/pretrain-full-seed0"
    assert labels([result(**old), result(**old | free | {"seed": 1})]) == ["full"]
    assert len(labels([result(), result(seed=1) | {"steps": 500}])) == 2


@pytest.mark.parametrize("kind", ["finetuning", "pretraining"])
def test_a_run_older_than_a_setting_had_its_default(kind, monkeypatch):
    """A fork adds --weight-floor, by default 0. Its runs with 0.4 are no seeds of the runs from before."""
    monkeypatch.setitem(evaluate.DEFAULTS, kind, evaluate.DEFAULTS[kind] | {"weight_floor": 0.0})
    made = [result(before={}), result(before={}, seed=1)]
    (made[1] if kind == "finetuning" else made[1]["pretraining"])["settings"]["weight_floor"] = 0.4
    prefix = "pretraining." * (kind == "pretraining")
    assert labels(made) == [f"full, {prefix}weight_floor {v}" for v in ("0", "0.4")]
    assert [*tables.sweep(made, "weight_floor", evaluate.DEFAULTS)["full"]] == [0.0, 0.4]


def test_two_test_sets_are_never_averaged_or_subtracted():
    """Neither of other names, nor of one name with other images. Each preset has its table, and own data."""
    made = [result(), result(seed=1, test="hands/shifted_test"), result(seed=2, preset="small")]
    other = result(seed=3)
    other["tests"] = {"source": "s", "target": "other images"}
    own = result("mine", test="mine/test", source="mine/train")
    found = tables.families([*made, other, own])
    assert [(title, len(some)) for title, some in found] == [
        ("tiny on hands/shifted_test", 1), ("tiny on hands/target_test", 1), ("tiny on hands/target_test", 1),
        ("mine/test", 1), ("small on hands/target_test", 1)]


def test_rows_come_in_the_papers_order():
    """Rows that are not the paper's come last."""
    names = ["full", "mine", "oracle", "mae", "dan", "scratch"]
    made = [result(name) for name in names]
    assert labels(made) == ["scratch", "dan", "mae", "full", "oracle", "mine"]


# ==== The paper's tables ================================================================================


def paper(made) -> dict[str, list[list[str]]]:
    rows = evaluate.rows_of(made, "finetuning")
    lines = tables.table(rows, tables.reference_row(rows, ""))
    return tables.paper_tables(rows, [*lines, tables.chance_line(rows, len(lines[0]))])


def test_a_row_has_the_same_errors_in_every_table():
    for row in set(tables.ROWS) - {""}:
        found = {tuple(errors) for rows in tables.TABLES.values() for name, _, *errors in rows if name == row}
        assert len(found) == 1, found


def test_rows_beside_the_papers():
    made = [*results("full", 30, 31), *results("dann", 35, 37), *results("mine", 1)]
    made += [result("mae", epe=41, lam=1.0), result("mae", epe=42, lam=2.0)]
    rows = {line[0]: line for line in paper(made)["Tables 1 and 2"]}
    assert rows["full: Ours"][1:4] == ["2", "30.5 ± 0.7", "-5.5 [-11.9, +0.9]"]
    assert rows["ddc: DDC (our backbone)"][1:3] == ["not run", ""]
    assert rows["scratch: Ours (Scratch)"][-1] == "46.3" and rows["full: Ours"][-1] == "28.0"
    human = {line[0]: line for line in paper([r | {"metric": "MPJPE"} for r in made])["Tables 1 and 2"]}
    assert human["ISO"][-1] == "75.8 (PA)" and human["full: Ours"][-1] == "93.6"
    reported = [row for row in rows if rows[row][1] == "reported"]
    assert reported == ["Zhang et al., source only", "Zhang et al."]
    assert [rows[f"mae, lam {lam}: Ours (MAE)"][-1] for lam in (1, 2)] == ["34.4", "34.4"]


def test_eight_cells_of_fcr_xc_and_ar():
    """Each is one variant: with the pre-training that it asks for, every combination of the switches once."""
    def settings(script, variant):
        flags = ["--variant", variant]
        return parse_settings(script.Settings, "", script.PRESETS, script.VARIANTS, flags, script.TASKS)

    for variant, cell in tables.CELLS.items():
        s = settings(train_finetune, variant)
        train_finetune.complete(s)
        before = settings(train_pretrain, re.fullmatch(r"runs/tiny/pretrain-(.*)-seed0", s.init)[1])
        assert before.masks in ("both", "none") and before.target and not s.adapt
        assert (before.masks == "both", before.xc > 0, s.lam > 0) == cell
    assert len(set(tables.CELLS.values())) == 8
    both = [row for title in ("without", "with") for row, *_ in tables.TABLES[f"Table 3 {title} X_C"]]
    assert sorted(both) == sorted(tables.CELLS)
    flags = {"true-masks", "r0.5", "r0.95", "alpha2", "alpha8"}
    assert set(tables.ROWS) - {""} <= set(train_finetune.VARIANTS) | flags


def test_effects_over_the_eight_cells():
    """Planted: FCR -1, X_C +2, AR -4 and, in seed s, -s more; together FCR and AR lose 0.5 of it."""
    cells = dict(zip(tables.CELLS, itertools.product((1, 0), repeat=3), strict=True))
    assert cells == tables.CELLS  # FCR, X_C, AR
    errors = {row: {seed: 40 - f + 2 * x - (4 + seed) * a + 0.5 * f * a for seed in range(3)}
              for row, (f, x, a) in cells.items()}
    errors["full"][3] = 1.0  # the other cells lack this seed
    assert tables.effects(errors)[1:] == [
        ["FCR", "3", "-0.8 [-0.8, -0.8]", "12 of 12 pairs"],
        ["X_C", "3", "+2.0 [+2.0, +2.0]", "0 of 12 pairs"],
        ["AR", "3", "-4.8 [-7.2, -2.3]", "12 of 12 pairs"]]  # -4.75, and 4.30 / sqrt(3)
    del errors["mae"]
    assert tables.effects(errors) == []


# ==== Sweeps ============================================================================================
def test_sweep_collects_what_differs_in_one_setting():
    def sweep(made, setting):
        return tables.sweep(made, setting, evaluate.DEFAULTS)

    made = [*results("full", 30, 31, before={}), *results("lam1", 35, 36, before={}, variant="full", lam=1.0),
            result("zero", 0, 33, before={}, variant="full", lam=0.0),
            result("both", 0, 99, before={"alpha": 8.0}, variant="full", lam=7.0),  # alone in two settings
            *results("scratch", 40, 41, lam=0.0)]
    lines = sweep(made, "lam")
    errors = {v: [r["target"]["epe"] for r in runs] for v, runs in lines["full"].items()}
    assert list(lines) == ["full"] and errors == {0: [33], 1: [35, 36], 100: [30, 31]}
    assert sweep(made, "labels") == sweep(made, "nothing") == {}
    shorter = result("few", variant="full", labels=64) | {"steps": 60}
    assert sweep([result(), shorter], "labels") == {}
    made = [result(f"{row}{n}", 0, 30, variant=row, labels=n, epochs=32000 / n, sigma=sigma)
            for row, sigma in (("scratch", 2.0), ("full", 2.0), ("full", 3.0)) for n in (1000, 64)]
    assert {name: list(points) for name, points in sweep(made, "labels").items()} == {
        "scratch": [64, 1000], "full, sigma 2": [64, 1000], "full, sigma 3": [64, 1000]}


def test_sweep_from_the_command_line(tmp_path, capsys):
    """A changed method has its variant and settings, and another folder: the variant's own run counts."""
    made = [result("attn-last", 0, 99.0, variant="full"), result(epe=33.0)]
    made.append(result("l", 0, 36, variant="full", lam=0.5))
    place = save(tmp_path / "some.jsonl", made)
    evaluate.main(["--sweep", "lam", "--pictures", str(tmp_path / "out"), place])
    text = capsys.readouterr().out
    assert re.search(r"full, lam 0\.5 +\| 1 +\| 36\.0 ", text)
    assert re.search(r"full, lam 100 +\| 1 +\| 33\.0 +\| -3\.0 ", text)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["sweep-lam-tiny-on-hands-target_test.png"]
    with pytest.raises(InputError, match="--sweep labels: no two runs of a variant differ in it"):
        evaluate.main(["--sweep", "labels", place])


# ==== The command line, files of results, and the shipped ones ==========================================
def test_tables_from_the_command_line(tmp_path, capsys):
    made = [result("scratch", epe=60), result(), result(epe=31)]
    made.append(result() | {"kind": "pretraining", "source": {}})
    place = save(tmp_path / "some.jsonl", made)
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n')
    evaluate.main(["--table", "--all", str(tmp_path), place])  # a file that is named twice counts once
    text = capsys.readouterr().out
    assert "\ntiny on hands/target_test\n" in text and "IoU of f^S" in text
    assert re.search(r"chance: constant mean pose \| +\| 50\.0 +\| +\| 50\.0", text)
    assert "target: 10 images of hands/target_test (hands/target_test); EPE over 21 of 21 joints, " in text
    assert "roots aligned; as published\n" in text
    assert "worse on the target than the constant mean pose: scratch\n" in text
    assert "not shown, because a run of the same row, seed and settings is: full seed 0\n" in text
    evaluate.main(["--table", "--paper", "--markdown", place])
    assert "| full: Ours " in capsys.readouterr().out
    evaluate.main(["--table", place, "--only", "scr*", "*-seed7"])
    assert "full" not in capsys.readouterr().out


def test_wrong_names_are_answered_with_the_right_ones(tmp_path):
    place = save(tmp_path / "some.jsonl", [result(), result("mae")])
    empty, half = save(tmp_path / "empty.jsonl", []), tmp_path / "half.jsonl"
    half.write_text("{")
    for flags, words in (([place, "--minus", "x"], "--minus x: choose mae, full"),
                         ([place, "--only", "x"], "--only x: choose full, mae"),
                         ([str(tmp_path / "nowhere")], "nowhere: no such folder or file"),
                         ([empty], "no results here; measure first, without --table"),
                         ([str(half)], "half.jsonl: not a readable file of results .*; remove it")):
        with pytest.raises(InputError, match=words):
            evaluate.main(["--table", *flags])


# ==== Metrics by hand ===================================================================================
def test_area_under_pck():
    """Of 0, 10, 50, 60 mm, thresholds 0, 10, .. 50 have 1/4, 1/2, 1/2, 1/2, 1/2, 3/4. NaN does not count."""
    errors = torch.tensor([[60, 10], [torch.nan, 50], [0, torch.nan]])
    assert evaluate.pck_auc(errors, 50.0, points=6) == pytest.approx(0.5)


META = {"joints": list("abcde"), "root": 0}


def test_an_image_of_two_labelled_joints_has_no_aligned_error():
    """Two points fit any two exactly. It counts in the error itself; an image with one label in nothing."""
    truth = 50 * torch.randn(3, 5, 3)
    predicted = truth + 10 * torch.randn(3, 5, 3)
    whole = evaluate.pose_metrics(predicted[:1], truth[:1], META)
    truth[1, 2:], truth[2] = torch.nan, torch.nan
    some = evaluate.pose_metrics(predicted, truth, META)
    assert whole["images"] == 1 and some["images"] == 2 and whole["epe"] != some["epe"]
    for key in ("pa_epe", "pa_rigid"):
        assert some[key] == pytest.approx(whole[key])


def test_a_prediction_that_is_not_finite_is_refused_and_not_left_out():
    """A joint whose prediction overflows would count as not labelled, and improve the error."""
    truth = 50 * torch.randn(4, 5, 3)
    predicted = truth + 10
    truth[3, 2] = predicted[3, 2] = torch.nan  # not labelled: nothing is missed
    assert evaluate.pose_metrics(predicted, truth, META)["images"] == 4
    for wrong in (torch.nan, torch.inf):
        predicted[1, 3, 0] = wrong
        with pytest.raises(InputError, match="predictions are not finite"):
            evaluate.pose_metrics(predicted, truth, META)


def test_attention_lift():
    """Share of attention on the foreground, a patch counting by its share of it; its area.

    Two patches of 4 px: the left one half foreground, the right one a quarter.
    """
    masks = torch.zeros(2, 1, 4, 8)
    masks[0, :, :2, :4] = 1
    masks[1, :, :1, 4:] = 1
    maps = torch.tensor([[[0.3, 0.1], [0.0, 0.5]], [[0.2, 0.6], [0.1, 0.0]]])  # (2, L, N)
    share, area = evaluate.attention_lift(maps, masks, 4)
    assert torch.allclose(share, torch.tensor([[0.5 * 0.75, 0.0], [0.25 * 0.75, 0.0]]))
    assert torch.allclose(area, torch.tensor([0.25, 0.125]))
    share, area = evaluate.attention_lift(torch.full((2, 3, 2), 0.4), masks, 4)
    assert torch.allclose(share / area[:, None], torch.ones(2, 3))  # indifference


def test_reconstruction_error():
    """Hidden patches alone, on, at the edge of, and beside the foreground; a pixel's mean: sums, numbers."""
    patches = torch.zeros(2, 4, 2)  # squared errors 5, 4, 8, 49
    predicted = torch.tensor([[1.0, 3.0], [2.0, 2.0], [4.0, 0.0], [7.0, 7.0]]).expand(2, 4, 2)
    m = torch.tensor([[1.0, 1.0, 1.0, 0.0], [1.0, 0.0, 1.0, 0.0]])
    area = torch.tensor([[0.5, 0.1, 0.09, 1.0], [0.9, 0.3, 0.49, 0.0]])
    assert evaluate.reconstruction_error(predicted, patches, m, area).tolist() == [
        [[5, 4, 8], [1, 1, 1]], [[5, 8, 0], [1, 1, 0]]]
