"""evaluate.py's tables and sweeps, from planted results: paired differences; the paper's rows, words and
numbers; rows apart by what their runs differ in; error against one setting; what is read and refused."""
import itertools
import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import data
import evaluate as e
import train_finetune
import train_pretrain
import udapose as u
from test_pictures import RED, colour_at, save_checkpoint, save_dataset

NUMBERS = {"pa_epe": 1.0, "auc": 0.5, "chance": 50.0, "in_plane": 3.0, "depth": 4.0}


def result(row="full", seed=0, epe=30.0, before=None, test="target_test", preset="tiny", lift=None, **more):
    """A finished fine-tuning run; `before`: settings of its pre-training run, with the lift it had."""
    s = {"preset": preset, "variant": row, "out": f"runs/{preset}/{row}-seed{seed}", "seed": seed,
         "lam": 100.0, "labels": 1000, "epochs": 32,
         "init": f"runs/{preset}/pretrain-full-seed{seed}" if before else ""}
    made = {"kind": "finetuning", "settings": s | more, "steps": 1000, "test": test,
            "target": {"epe": epe, **NUMBERS}, "source": {"epe": 9.0, **NUMBERS}}
    if lift: made["target"]["attention"] = {"lift": lift}
    if before is not None:
        kept = {"seed": seed, "alpha": 4.0, "mask_ratio": 0.75, "epochs": 16, "out": "x"} | before
        made["pretraining"] = {"settings": kept, "target": {"attention": {"lift": [1.0, 3.0]}}}
    return made


def results(row: str, *errors: float, **more) -> list[dict]:
    """Results of a row, the first of seed 0, the next of seed 1, and so on."""
    return [result(row, seed, epe, **more) for seed, epe in enumerate(errors)]


def names(lines): return [line[0] for line in lines[1:]]


def save(folder, **named) -> list[str]:
    for name, content in named.items(): (folder / f"{name}.json").write_text(json.dumps(content))
    return [str(folder)]


# ==========================================================================================================
# Paired differences
# ==========================================================================================================
def test_difference_is_paired_by_seed():
    """Differences -2, -4, -6: mean -4, deviation 2, half the interval 4.30 * 2 / sqrt 3 = 4.97."""
    first, group = results("scratch", 40, 50, 60, 70), results("full", 38, 46, 54)
    assert e.paired_difference(group[::-1], first[:3]) == "-4.0 [-9.0, +1.0]"
    assert e.paired_difference(group[1:2], first[1:2]) == "-4.0"
    assert e.paired_difference(first, []) == e.paired_difference(group[:1], first[1:]) == "-"


def test_difference_over_some_of_the_seeds_says_so():
    """Means 55 and 46, 9 apart, but 4 where both were run."""
    first, group = results("scratch", 40, 50, 60, 70), results("full", 38, 46, 54)
    assert e.paired_difference(group, first) == "-4.0 [-9.0, +1.0] (3 seeds)"
    assert e.paired_difference(first, group[:1]) == "+2.0 (1 seed)"
    assert [row[2:4] for row in e.table(first + group)[1:3]] == [
        ["55.0 ± 12.9", "-"], ["46.0 ± 8.0", "-4.0 [-9.0, +1.0] (3 seeds)"]]


def test_differences_of_the_source_and_of_the_gap():
    """Target errors fall by 4 and 10, the source's by 1 and 3: the gap by 3 and 7."""
    made = [*results("scratch", 40, 50), *results("full", 36, 40)]
    for r, source in zip(made, (20.0, 24.0, 19.0, 21.0)): r["source"]["epe"] = source
    for of, title, mean in (("target", "minus first row [95 %]", "-7.0"), ("source", "source: minus first row [95 %]", "-2.0"),
                            ("gap", "gap: minus first row [95 %]", "-5.0")):
        lines = e.table(e.as_asked(made, of=of), minus="first")
        assert lines[0][3] == title and lines[2][3].split(" [")[0] == mean and lines[2][2] == "38.0 ± 2.8"
    eight = [result(row, seed, 30 + seed + bool(f)) for row, (f, *_) in e.CELLS.items() for seed in range(2)]
    title = "tiny: FCR, X_C, AR in all eight cells"
    for r in eight: r["source"]["epe"] += r["target"]["epe"]
    lines = {of: e.paper_tables(e.as_asked(eight, of=of), "EPE", False, "above")[title] for of in ("source", "gap")}
    assert lines["source"][0][2] == "source EPE with it minus without [95 %]" and lines["source"][1][2][:4] == "+1.0"
    assert lines["gap"][1][2] == "+0.0 [+0.0, +0.0]"


def test_rows_come_in_the_papers_order():
    """A row of a shorter pre-training beside its own; rows that are not the paper's come last."""
    names = ["small full", "tiny mine", "tiny full", "tiny epochs9", "tiny mae-epochs9", "tiny mae", "tiny scratch"]
    assert sorted(names, key=e.paper_order) == [
        "tiny scratch", "tiny mae", "tiny mae-epochs9", "tiny epochs9", "tiny full", "tiny mine", "small full"]


def test_quantiles_of_student():
    stats = pytest.importorskip("scipy.stats")
    for count, t95 in enumerate(e.T95, 2):
        assert t95 == pytest.approx(stats.t.ppf(0.975, count - 1), abs=6e-3)


def test_difference_is_to_the_row_above_or_to_the_first():
    """Of the same preset; a row that nobody ran is passed over."""
    made = [*results("scratch", 40), *results("mae", 36), *results("full", 30),
            *results("scratch", 70, preset="small"), *results("full", 50, preset="small")]
    above, first = (e.table(made, minus=minus) for minus in ("above", "first"))
    assert above[0][3] == "minus row above [95 %]" and first[0][3] == "minus first row [95 %]"
    assert [row[3] for row in above[1:]] == ["-", "-4.0", "-6.0", "-", "-20.0", ""]
    assert [row[3] for row in first[1:]] == ["-", "-4.0", "-10.0", "-", "-20.0", ""]
    paper = e.paper_tables(made, "EPE", False, "above")
    assert [row[3] for row in paper["tiny: Tables 1 and 2"] if row[1] == "1"] == ["-", "-4.0", "-6.0"]
    assert {row[3] for row in paper["tiny: Table 4"][1:]} == {"", "-"}              # not to another table's


# ==========================================================================================================
# The paper's tables
# ==========================================================================================================
PRINTED = {  # Tables 1 (to RHD) and 2 (to 3DHP), 3, 4, 9, read off the paper once more, in its order
    "Tables 1 and 2": """Zhang et al. 48.3 121.8; Ours (Scratch) 46.3 120.5; Ours (MAE) 41.7 113.5; Ours w/o
        X_C 38.6 109.2; Ours 37.1 107.0; DDC 44.6 115.6; DAN 40.5 109.5; DANN 38.0 107.9; DDC - -; DAN - -;
        DANN - -;
        ISO - 75.8; Zhang et al. 35.4 99.3; Kundu et al. - 96.2; Ours (MAE) 34.4 101.3; Ours w/o X_C 29.1
        94.6; Ours 28.0 93.6""",
    "Table 3 without X_C": "Ours w/o FCR, AR 34.4 101.3; Ours w/o FCR - -; Ours w/o AR - -; Ours 29.1 94.6",
    "Table 3 with X_C": """Ours w/o FCR, AR - -; Ours w/o FCR 34.6 104.0; Ours w/o AR 32.0 98.1;
        Ours 28.0 93.6""",
    "Table 4": "Ours w/o S_S, S_T 34.6 104.0; Ours w/o S_T 32.3 100.6; Ours 28.0 93.6; true S_T - -",
    "Table 9, alpha = 4": "r = 0.5 32.1 104.1; r = 0.75 28.0 93.6; r = 0.95 29.4 105.9",
    "Table 9, r = 0.75": "alpha = 2 31.1 98.6; alpha = 4 28.0 93.6; alpha = 8 29.8 99.0",
    "Bounds": "target labels - -; chance - -",
}


@pytest.mark.parametrize("error", ["EPE", "MPJPE"])
def test_rows_words_and_numbers_are_the_papers(error):
    human = error == "MPJPE"
    made = [result("full") | {"metric": error}]
    tables = e.paper_tables(made, error, False, "above")
    assert list(tables) == [f"tiny: {title}" for title in PRINTED]
    for title, text in PRINTED.items():
        header, *lines = tables[f"tiny: {title}"]
        assert header[-1] == ("paper: Human3.6M to 3DHP" if human else "paper: FreiHAND to RHD")
        rows = [line.strip().rsplit(" ", 2) for line in re.sub(r"\s+", " ", text).split(";")]
        rows = [row for row in rows if human or row[0] not in ("ISO", "Kundu et al.")]  # in Table 2 alone
        assert len(rows) == len(lines) and {len(line) for line in lines} == {len(header)}
        for line, (words, *numbers) in zip(lines, rows):
            assert words in line[0] and line[-1].removesuffix(" (PA)") == numbers[human], line
    assert e.paper_tables(made, "EPE" if human else "MPJPE", False, "above") == {}


def test_rows_beside_the_paper():
    made = [*results("full", 30, 31), *results("dann", 35, 37), *results("oracle", 20), *results("mine", 1)]
    tables = e.paper_tables(made, "EPE", False, "above")
    rows = {row[0]: row for row in tables["tiny: Tables 1 and 2"]}
    assert rows["full: Ours"][1:3] == ["2", "30.5 ± 0.7"] and rows["full: Ours"][3] == "-5.5 [-11.9, +0.9]"
    assert rows["ddc: DDC (our backbone)"][1:3] == ["not run", ""]
    assert {row for row in rows if rows[row][1] == "reported"} == {"Zhang et al., source only", "Zhang et al."}
    bounds = tables["tiny: Bounds"]
    assert [row[2] for row in bounds[1:]] == ["20.0", "50.0"] and bounds[2][0].startswith("chance")
    assert e.table(made)[-1][2] == "50.0"
    assert "mine" not in str(tables) and "tiny mine" in names(e.table(made))
    assert e.show_table(bounds, markdown=True).startswith("| run ")


def test_row_not_alike_stands_beside_the_paper_with_what_it_differs_in():
    made = [result(epe=30), result(epe=40, lam=1.0)]
    rows = e.paper_tables(made, "EPE", False, "above")["tiny: Table 4"]
    assert [row[0] for row in rows if row[1] == "1"] == ["full: Ours, lam 1", "full: Ours, lam 100"]
    assert [row[-1] for row in rows if row[1] == "1"] == ["28.0", "28.0"]


def test_rows_of_a_shorter_pre_training_stand_behind_the_table_they_are_of(tmp_path, capsys):
    """`epochs50` is `full` with 50 epochs; alone, as epochs25 here, it is in no table."""
    made = [*results("full", 30, 31), *results("epochs50", 34, 35), *results("alpha8-epochs50", 36, 39),
            *results("epochs25", 40)]
    tables = e.paper_tables(made, "EPE", False, "above")
    titles, added = [f"tiny: {title}" for title in PRINTED], "tiny: Table 9, r = 0.75, epochs50"
    assert list(tables) == [*titles[:-1], added, titles[-1]]
    assert [row[:1] + row[2:4] + row[-1:] for row in tables[added][1:]] == [
        ["alpha2-epochs50: alpha = 2", "", "", "31.1"], ["epochs50: alpha = 4", "34.5 ± 0.7", "-", "28.0"],
        ["alpha8-epochs50: alpha = 8", "37.5 ± 2.1", "+3.0 [-9.7, +15.7]", "29.8"]]
    assert [row[1] for row in tables["tiny: Table 9, r = 0.75"][1:]] == ["not run", "2", "not run"]
    assert [row for row, *_ in e.tables_with({"mae-epochs9"})["Tables 1 and 2, epochs9"]][:2] == ["", "scratch-epochs9"]
    e.main(["--table", "--paper", *save(tmp_path, **{f"{i}.result": r for i, r in enumerate(made)})])
    assert "not in the paper's tables: epochs25\n" in capsys.readouterr().out


def test_every_variant_has_its_place_and_the_other_rows_their_flags():
    flags = {"true-masks", "r0.5", "r0.95", "alpha2", "alpha8"}
    assert set(e.ROWS) - {""} == set(train_finetune.VARIANTS) | flags


def test_rows_in_the_order_of_the_paper():
    made = [result(row, preset=preset) for preset in ("small", "tiny")
            for row in ("other", "oracle", "full", "no-ar", "mae", "dan", "scratch")]
    rows = ["scratch", "dan", "mae", "no-ar", "full", "oracle", "other"]
    assert names(e.table(made))[:-1] == [f"{p} {row}" for p in ("tiny", "small") for row in rows]
    assert len(e.table([])) == 1 and e.paper_tables([], "EPE", False, "above") == {}


def test_eight_cells_of_fcr_xc_and_ar():
    """Each by one variant: with the pre-training it asks for, every combination of the switches once."""
    def settings(script, variant): return u.parse_settings(
        script.Settings, "", script.PRESETS, script.VARIANTS, ["--variant", variant], script.TASKS)
    cells = {}
    for variant in ("full", "no-ar", "no-xc", "no-xc-ar", "no-fcr", "no-fcr-ar", "no-fcr-xc", "mae"):
        s = settings(train_finetune, variant)
        train_finetune.complete(s)
        before = settings(train_pretrain, re.fullmatch(r"runs/tiny/pretrain-(.*)-seed0", s.init)[1])
        assert before.masks in ("both", "none") and before.xc in (0, 0.5) and s.lam in (0, 100)
        assert before.target and not s.adapt
        cells[variant] = (before.masks == "both", before.xc > 0, s.lam > 0)
    assert len(set(cells.values())) == 8
    for variant, (fcr, xc, ar) in cells.items():
        left_out = [n for n, on in (("fcr", fcr), ("xc", xc), ("ar", ar)) if not on]
        assert variant in ("full", "mae") or variant == "-".join(["no", *left_out])
    table = [row for title in ("without", "with") for row, *_ in e.TABLES[f"Table 3 {title} X_C"]]
    assert sorted(table) == sorted(cells)


# ==========================================================================================================
# Rows apart by what their runs differ in
# ==========================================================================================================
def test_runs_of_other_settings_are_rows_of_their_own():
    made = [result(seed=0, epe=30), result(seed=1, epe=32), result(seed=0, epe=40, lam=10.0)]
    lines = e.table(made)
    assert [row[:3] for row in lines[1:3]] == [
        ["tiny full, lam 10", "1", "40.0"], ["tiny full, lam 100", "2", "31.0 ± 1.4"]]
    two = [*made, result(seed=0, epe=50, lam=10.0, labels=64)]
    assert names(e.table(two))[:3] == ["tiny full, labels 64, lam 10", "tiny full, labels 1000, lam 10",
                                      "tiny full, labels 1000, lam 100"]


def test_numbers_that_print_alike_in_short_are_two_rows():
    made = [result(lam=0.1234567), result(lam=0.1234568)]
    assert names(e.table(made))[:-1] == ["tiny full, lam 0.1234567", "tiny full, lam 0.1234568"]


def test_what_one_run_of_a_row_does_not_know_has_no_mean():
    made = results("full", 30, 31)
    made[1]["target"]["pa_rigid"] = 7.0
    assert e.table(made, rigid=True)[0][4] == "target rigid PA-EPE" and e.table(made, rigid=True)[1][4] == "-"
    made[0]["target"]["pa_rigid"] = 5.0
    assert e.table(made, rigid=True)[1][4] == "6.0 ± 1.4"


def test_settings_of_the_pre_training_tell_rows_apart():
    made = [result(before={}), result(before={"alpha": 8.0}, seed=1), result(before={"seed": 0}, seed=1),
            result(before={"out": "elsewhere"}, seed=1)]
    assert {row[0]: row[1] for row in e.table(made)[1:-1]} == {
        "tiny full, pretraining.alpha 4, pretraining.seed 0": "1",
        "tiny full, pretraining.alpha 4, pretraining.seed the same": "2",
        "tiny full, pretraining.alpha 8, pretraining.seed the same": "1"}
    one = [result(seed=seed, before={"seed": 0}) for seed in range(3)]     # of one pre-training
    assert names(e.table(one))[:-1] == ["tiny full"]
    public = [result(before={}), result(init="weights.pth")]
    assert names(e.table(public))[:2] == ["tiny full, init a run", "tiny full, init weights.pth"]
    one = e.as_asked([public[0], result(init="weights.pth", seed=1), result("mae")], "init")
    assert names(e.table(one))[:-1] == ["tiny mae", "tiny full"] and e.table(one)[2][1] == "2"
    assert names(e.table(e.as_asked(public)))[:2] == names(e.table(public))[:2]
    with pytest.raises(u.InputError, match="--alike inti: choose .*init, .*pretraining.alpha, .*steps"):
        e.main(["nowhere", "--alike", "init,inti"])                        # before runs are looked for
    twice = [result(epochs=epochs) | {"kind": "pretraining"} for epochs in (80, 200)]
    assert names(e.pretraining_table(e.as_asked(twice, "lam, pretraining.epochs"))) == ["tiny full"]
    assert names(e.pretraining_table(twice)) == ["tiny full, epochs 80", "tiny full, epochs 200"]


@pytest.mark.parametrize("free", [
    {"out": "elsewhere/full-seed1"}, {"device": "cuda"}, {"threads": 1}, {"validation": "x"},
    {"save_every": 5}, {"init": "runs/tiny/pretrain-full-seed1"}, {"epochs": 64}, {"newer": "setting"}])
def test_what_changes_no_result_keeps_one_row(free):
    """Nor does a setting that the other file does not have; epochs count by the steps they come to."""
    old = {"device": "cpu", "threads": 2, "validation": "", "save_every": 1,
           "init": "runs/tiny/pretrain-full-seed0"}
    assert names(e.table([result(**old), result(**old | free | {"seed": 1})])) [:-1] == ["tiny full"]
    assert len(e.table([result(), result(seed=1) | {"steps": 500}])) == 4
    older = result(seed=1)
    del older["steps"]
    assert names(e.table([result(), older]))[:-1] == ["tiny full"]


@pytest.mark.parametrize("kind", ["finetuning", "pretraining"])
def test_a_run_older_than_a_setting_had_its_default(kind, monkeypatch):
    """A fork adds --weight-floor, 0 by default: its runs with 0.4 are no more seeds of the runs from before."""
    monkeypatch.setitem(e.DEFAULTS, kind, e.DEFAULTS[kind] | {"weight_floor": 0.0})
    made = [result(before={}), result(before={}, seed=1)]
    (made[1] if kind == "finetuning" else made[1]["pretraining"])["settings"]["weight_floor"] = 0.4
    prefix = "pretraining." * (kind == "pretraining")
    assert names(e.table(made))[:-1] == [f"tiny full, {prefix}weight_floor {v}" for v in ("0", "0.4")]
    assert [*e.sweep(made, "weight_floor", "EPE")["tiny full"]] == [0.0, 0.4]


def test_no_difference_between_errors_on_two_test_sets():
    """The chance of each is told."""
    here, there = {"test": "target_test"}, {"test": "mine_test"}
    made = [result("scratch", epe=40) | here, result("full", epe=30) | here, result("mine", epe=70) | there]
    made[2]["target"]["chance"] = 99.0
    assert [row[3] for row in e.table(made)[1:4]] == ["-", "-10.0", "-"]
    assert names(e.table(made)) == ["tiny scratch on target_test", "tiny full on target_test",
                                    "tiny mine on mine_test"] + [
        f"tiny on {test} chance: constant mean pose" for test in ("target_test", "mine_test")]
    assert e.error_notes(made[:2]) == [] and e.error_notes(made[2:]) == ["target test set: mine_test"]
    made[2] = result("no-ar", epe=70) | there
    for other, differences in ((there, ["-", "-"]), (here, ["-", "-40.0"])):   # of no-ar, then of full
        tables = e.paper_tables([*made[:2], made[2] | other], "EPE", False, "above")
        lines = tables["tiny: Table 3 with X_C"]
        assert [line[3] for line in lines if re.match("no-ar|full", line[0])] == differences


def test_iou_of_the_source_where_the_target_has_no_masks():
    made = result() | {"kind": "pretraining", "source": {"mask_iou": 0.9}}
    assert e.pretraining_table([made])[1][2:4] == ["-", "0.90"]


def test_what_is_in_no_table_of_the_paper_is_named(tmp_path, capsys):
    folder = save(tmp_path, **{"a.result": result(), "b.result": result("coral"), "c.result": result("lam10")})
    e.main(["--table", "--paper", *folder])
    assert "not in the paper's tables: coral, lam10" in capsys.readouterr().out
    e.main(["--table", *folder])
    assert "not in the paper's" not in capsys.readouterr().out


def test_an_older_file_among_rows_that_differ():
    """What is not known of it is a question mark, behind the numbers."""
    older = result(seed=2)
    del older["steps"]
    made = [older, result(), result(seed=1) | {"steps": 500}]
    assert names(e.table(made))[:-1] == [f"tiny full, steps {n}" for n in (500, 1000, "?")]


def test_chance_of_each_family_where_they_differ():
    """One line while all presets were labelled and tested by the same data."""
    made = [result(), result("scratch"), result(preset="paper-hand")]
    lines = e.table(made)
    assert [line[0] for line in lines if "chance" in line[0]] == ["chance: constant mean pose"]
    made[2]["target"] = made[2]["target"] | {"chance": 99.0}
    assert [(line[0], line[2]) for line in e.table(made) if "chance" in line[0]] == [
        ("tiny chance: constant mean pose", "50.0"), ("paper-hand chance: constant mean pose", "99.0")]
    tables = e.paper_tables(made, "EPE", False, "above")
    assert [tables[f"{preset}: Bounds"][-1][2] for preset in ("tiny", "paper-hand")] == ["50.0", "99.0"]


def test_effects_over_the_eight_cells():
    """Planted: FCR -1, X_C +2, AR -4 and, in seed s, -s more; together FCR and AR lose 0.5 of it."""
    rows = dict(zip(e.CELLS, itertools.product((1, 0), repeat=3)))
    assert rows["no-xc-ar"] == (1, 0, 0) and rows == e.CELLS               # FCR, X_C, AR
    made = [result(row, seed, 40 - f + 2 * x - (4 + seed) * a + 0.5 * f * a)
            for row, (f, x, a) in rows.items() for seed in range(3)]
    made.append(result("full", 3, 1.0))                                    # the other cells lack this seed
    lines = e.paper_tables(made, "EPE", False, "above")["tiny: FCR, X_C, AR in all eight cells"]
    assert lines[1:] == [["FCR", "3", "-0.8 [-0.8, -0.8]", "12 of 12 pairs"],
                         ["X_C", "3", "+2.0 [+2.0, +2.0]", "0 of 12 pairs"],
                         ["AR", "3", "-4.8 [-7.2, -2.3]", "12 of 12 pairs"]]     # -4.75 and 4.30 / sqrt(3)
    for other, why in ((result("mae", 1, lam=3.0), "mae is several rows"),
                       (made[-2] | {"test": "mine"}, "cells are of mine, target_test")):
        changed = [other if r is made[-2] else r for r in made] if "test" in why else [*made, other]
        if "mine" in why: changed = [r | {"test": "mine"} if r["settings"]["variant"] == "mae" else r for r in made]
        tables = e.paper_tables(changed, "EPE", False, "above")
        assert tables["tiny: FCR, X_C, AR in all eight cells"][1:] == [["FCR, X_C, AR", why]]
    assert not any("eight" in title for title in e.paper_tables(made[3:], "EPE", False, "above"))
    assert not any("eight" in title for title in e.paper_tables(made[:-4], "EPE", False, "above"))


def test_a_run_counts_once_and_that_is_said(tmp_path, capsys):
    made = [result(epe=30), result(epe=31), result(seed=1, epe=34)]
    assert e.table(made)[1][:3] == ["tiny full", "2", "32.0 ± 2.8"]
    for count, said in ((3, True), (1, False)):
        folder = tmp_path / str(count)
        folder.mkdir()
        e.main(["--table", *save(folder, **{f"{i}.result": r for i, r in enumerate(made[:count])})])
        out = capsys.readouterr().out
        assert ("not shown: 1 of 3 results, each has the row" in out) == said
        assert (f"of one that is shown: {folder}/1.result.json\n" in out) == said


def test_a_file_named_twice_counts_once(tmp_path, monkeypatch, capsys):
    save(tmp_path, result=result())
    monkeypatch.chdir(tmp_path)
    e.main(["--table", "result.json", str(tmp_path), "."])
    assert "not shown" not in capsys.readouterr().out


def test_other_source_images_are_another_row_and_two_sets_of_one_name_are_said():
    made = [result() | {"source_test": "source_test"}, result(seed=1) | {"source_test": "mine"}]
    assert names(e.table([result(), made[0]]))[:-1] == ["tiny full"]        # an old file does not say
    assert names(e.table(made))[:2] == ["tiny full, source_test mine", "tiny full, source_test source_test"]
    assert e.error_notes([made[1]]) == ["source test set: mine"] and e.error_notes(made) == []
    for r, images in zip(made, "ab"): r["tests"] = {"target": images, "source": "c"}
    made += [result("mae", 2) | {"tests": made[0]["tests"]}, result("mae", 3), result(task="human") | {
        "tests": {"target": "d", "source": "e"}}]                          # bodies have their own
    assert e.error_notes(made) == ["target target_test: 2 sets of images, or renderings, go by this name; another "
                                   "than most in rows full"]
    both = [result(), result(seed=1, test="shifted_test")]
    assert e.error_notes(both) == [] and e.error_notes(both[1:]) == ["target test set: shifted_test"]


def test_what_only_one_of_some_results_holds_is_no_number():
    two = [result(lift=[1.0, 2.0]), result(seed=1, lift=[1.0])]
    assert e.table(two)[1][-1] == "-"                                      # --alike depth
    broken = {"kind": "pretraining", "settings": result()["settings"], "source": {},
              "target": {"reconstruction": [1.0, float("nan"), 1.0]}}
    assert e.pretraining_table([broken])[1][-1] == "-"


def test_lift_before_and_after_fine_tuning():
    made = [result(before={}, lift=[1.0, 2.0]), result(seed=1, before={}, lift=[1.5, 1.0]),
            result("scratch", lift=[0.5, 0.25])]
    scratch, full = e.table(made)[1:3]
    assert scratch[8:] == ["-", "0.50 0.25"] and full[8:] == ["1.00 3.00", "1.25 1.50"]
    assert e.table(made)[0][8:] == ["lift before", "attention lift"]
    assert e.table([*made, result(seed=2, before={})])[2][8:] == ["1.00 3.00", "-"]  # not known of a seed


def test_errors_in_the_plane_and_in_depth():
    made = results("full", 30, 31)
    made[1]["target"] |= {"in_plane": 4.0, "depth": 7.0}
    assert e.table(made)[0][6] == "in plane, depth" and e.table(made)[1][6] == "3.5 5.5"
    del made[1]["target"]["depth"]                                         # an older file
    assert e.table(made)[1][6] == "-"


# ==========================================================================================================
# Sweeps
# ==========================================================================================================
def test_sweep_collects_what_differs_in_one_setting():
    made = [*results("full", 30, 31, before={}), result("lam1", 0, 35, before={}, variant="full", lam=1.0),
            result("lam1", 1, 36, before={}, variant="full", lam=1.0),
            result("zero", 0, 33, before={}, variant="full", lam=0.0),
            result("both", 0, 99, before={"alpha": 8.0}, variant="full", lam=7.0),     # alone in two settings
            *results("scratch", 40, 41, lam=0.0)]
    lines = e.sweep(made, "lam", "EPE")
    assert list(lines) == ["tiny full"] and list(lines["tiny full"]) == [0, 1, 100]
    errors = {v: [r["target"]["epe"] for r in group] for v, group in lines["tiny full"].items()}
    assert errors == {0: [33], 1: [35, 36], 100: [30, 31]}
    assert e.sweep(made, "lam", "MPJPE") == e.sweep(made, "labels", "EPE") == {}
    alpha = [*made[:2], result("alpha2", 0, 32, before={"alpha": 2.0}, variant="full")]
    assert list(e.sweep(alpha, "alpha", "EPE")["tiny full"]) == [2, 4]
    assert e.sweep(alpha, "pretraining.alpha", "EPE") == e.sweep(alpha, "alpha", "EPE")
    alpha.append(result("epochs", 0, 32, before={"epochs": 99}, variant="full"))
    assert list(e.sweep(alpha, "epochs", "EPE")["tiny full"]) == [16, 99]              # those of pre-training


def test_sweep_has_a_line_for_each_variant_and_each_other_setting():
    made = [result(f"{row}{n}", 0, 30, variant=row, labels=n, epochs=32000 / n, sigma=sigma)
            for row, sigma in (("scratch", 2.0), ("full", 2.0), ("full", 3.0)) for n in (1000, 64)]
    lines = e.sweep(made, "labels", "EPE")
    assert {name: list(points) for name, points in lines.items()} == {
        "tiny scratch": [64, 1000], "tiny full, sigma 2": [64, 1000], "tiny full, sigma 3": [64, 1000]}
    every = result("every", variant="full", labels=0) | {"labels": 1000}   # 0: all that there are
    assert list(e.sweep([made[-4], every | {"settings": every["settings"] | {"sigma": 2.0, "seed": 1}},
                         made[-3]], "labels", "EPE")["tiny full"]) == [64, 1000]
    other_steps = [result(), result("few", variant="full", labels=64) | {"steps": 60}]
    assert e.sweep(other_steps, "labels", "EPE") == {}                                  # a shorter training


def test_sweep_from_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = save(tmp_path, a=result(), **{"b.result": result("l", 0, 36, variant="full", lam=0.5)},
                  **{"c.result": result(epe=33.0)})
    assert e.main(["--sweep", "lam", "--pictures", str(tmp_path / "out"), *folder]) == 0
    text = capsys.readouterr().out
    assert re.search(r"tiny full, lam 0\.5 +\| 1 +\| 36\.0 +\| - ", text)
    assert re.search(r"tiny full, lam 100 +\| 1 +\| 33\.0 +\| -3\.0 ", text)   # a.json is no result.json
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["sweep-lam-EPE.png"]
    with pytest.raises(u.InputError, match="--sweep labels: no two runs .* what differs here: lam$"):
        e.main(["--sweep", "labels", *folder])
    shutil.rmtree(tmp_path / "out")
    before = sorted(tmp_path.iterdir())
    assert e.main(["--sweep", "lam", "--pictures", "none", *folder]) == 0
    assert sorted(tmp_path.iterdir()) == before


def test_sweep_prefers_the_run_of_the_variants_own_name(tmp_path, capsys):
    """A changed method has its variant and its settings, and another folder."""
    folder = save(tmp_path, **{"a.result": result("attn-last", 0, 99.0, variant="full"), "b.result": result(),
                               "c.result": result("lam1", 0, 36, variant="full", lam=1.0)})
    e.main(["--sweep", "lam", "--pictures", "none", *folder])
    text = capsys.readouterr().out
    assert re.search(r"tiny full, lam 100 +\| 1 +\| 30\.0 ", text) and "a.result.json\n" in text
    assert "not shown: 1 of 3" in text


def test_sweep_over_test_sets_reads_every_result(tmp_path, capsys):
    folder = save(tmp_path, **{"full.result": result(), "other": result(epe=33.0, test="shifted_test")})
    assert e.main(["--sweep", "test", "--pictures", "none", *folder]) == 0
    text = capsys.readouterr().out
    assert "tiny full, test shifted_test" in text and "tiny full, test target_test" in text


# ==========================================================================================================
# Files
# ==========================================================================================================
def test_results_on_another_test_set_are_read_by_its_name(tmp_path):
    folder = save(tmp_path, **{"full.result": result(), "other": result(epe=33.0, test="shifted_test")},
                  config={"settings": {}}, speed=[1])                                   # no results
    errors = {test: [r["target"]["epe"] for r in e.read_results(folder, test)]
              for test in ("", "target_test", "shifted_test", "*")}
    assert errors == {"": [30], "target_test": [30], "shifted_test": [33], "*": [30, 33]}
    one = e.read_results([str(tmp_path / "full.result.json")])             # a file by its own name
    assert [r["target"]["epe"] for r in one] == [30]
    with pytest.raises(u.InputError, match="nowhere: no such folder or file"):
        e.read_results([*folder, str(tmp_path / "nowhere")])
    with pytest.raises(u.InputError, match="no result.json of elsewhere; run evaluate.py without --table"):
        e.read_results(folder, "elsewhere")
    (tmp_path / "bad.result.json").write_text("{")
    with pytest.raises(u.InputError, match=r"bad.result.json: not JSON \(.*\); remove it"):
        e.read_results(folder)


@pytest.mark.parametrize("change", [
    {"settings": {}}, {"settings": []}, {"settings": None}, {"target": {}}, {"target": 5},
    {"target": NUMBERS | {"epe": "x"}}, {"target": NUMBERS | {"epe": None}}, {"pretraining": 3},
    {"settings": result(lam=[1.0])["settings"]}, {"settings": result(out=5)["settings"]},
    {"kind": "pretraining", "target": {"mask_iou": "x"}},
    {"source": result()["source"] | {"compared": 5}}])
def test_a_damaged_result_is_named(tmp_path, change):
    folder = save(tmp_path, **{"a.result": result(), "b.result": result(seed=1) | change})
    for option in ("--table", "--paper"):
        with pytest.raises(u.InputError, match="b.result.json: not what it should be"):
            e.main(["--table", option, *folder])


@pytest.mark.parametrize("name", ["config", "result", "my_result", "."])
def test_a_test_set_does_not_overwrite_a_runs_files(name):
    with pytest.raises(u.InputError, match="--target-test .*rename the folder"):
        e.open_tests("", f"sets/{name}" if name != "." else name, "hand", 0)


def test_measuring_records_the_pre_training_run_and_the_test_set(tmp_path, monkeypatch):
    """Its settings, and the attention before fine-tuning, which differs from that after it."""
    save_dataset(tmp_path / "toy")
    run = {"source": str(tmp_path / "toy"), "init": str(tmp_path / "pretrain-full-seed0")}
    save_checkpoint(tmp_path / "pretrain-full-seed0", train_pretrain, seed=0, alpha=7.0)
    save_checkpoint(tmp_path / "full-seed1", train_finetune, seed=1, **run)
    save_checkpoint(tmp_path / "gone-seed1", train_finetune, seed=1, **run | {"init": "nowhere"})
    toy = data.Dataset(tmp_path / "toy", "keypoints", "intrinsics", "masks")
    tests = {"source": toy, "target": toy}
    full, before, gone = (e.measure(tmp_path / name / "checkpoint.pt", tests, 0, "cpu")
                          for name in ("full-seed1", "pretrain-full-seed0", "gone-seed1"))
    assert full["test"] == "toy" and full["pretraining"]["settings"]["alpha"] == 7
    assert full["pretraining"]["target"]["attention"] == before["target"]["attention"]
    assert full["target"]["attention"] != before["target"]["attention"] and "pretraining" not in gone
    assert json.loads((tmp_path / "full-seed1/result.json").read_text()) == full
    assert full["logged"] == e.last_logged(tmp_path / "full-seed1/checkpoint.pt") and full["logged"]
    assert before["logged"] and full["made_by"] == {}
    monkeypatch.setattr(data, "chunks", lambda n: [np.arange(1), np.arange(1, n)])     # the same in two parts
    again = e.measure(tmp_path / "full-seed1/checkpoint.pt", tests, 0, "cpu")
    assert again["target"]["attention"] == full["target"]["attention"]
    assert again["pretraining"]["target"] == full["pretraining"]["target"]


def test_what_is_gone_by_the_second_time_is_taken_over(tmp_path):
    """The pre-training run was removed, the source moved: the same checkpoint, the same images."""
    save_dataset(tmp_path / "toy")
    save_dataset(tmp_path / "source")
    save_checkpoint(tmp_path / "pretrain-full-seed0", train_pretrain, seed=0)
    save_checkpoint(tmp_path / "full-seed0", train_finetune, source=str(tmp_path / "source"),
                    init=str(tmp_path / "pretrain-full-seed0"))
    toy, path = data.Dataset(tmp_path / "toy", "keypoints", "intrinsics", "masks"), tmp_path / "full-seed0/checkpoint.pt"
    def measure(): return e.measure(path, {"source": toy, "target": toy}, 0, "cpu")
    first = measure()
    shutil.rmtree(tmp_path / "pretrain-full-seed0")
    (tmp_path / "source").rename(tmp_path / "moved")
    assert "pretraining" in first and "labels" in first and first["target"]["chance"] > 0
    assert measure() == first == json.loads((path.parent / "result.json").read_text())
    state = torch.load(path)
    torch.save(state | {"seconds": 2.0}, path)                             # trained again since
    again = measure()
    assert "pretraining" not in again and "labels" not in again and np.isnan(again["target"]["chance"])


def test_a_damaged_result_is_named_before_anything_is_measured(tmp_path, monkeypatch):
    save_dataset(tmp_path / "toy")
    save_checkpoint(tmp_path / "full-seed0", train_finetune, source=str(tmp_path / "toy"))
    (tmp_path / "full-seed0/result.json").write_text("{")
    monkeypatch.setattr(e, "measure_finetuned", lambda *_: pytest.fail("measured"))
    toy = data.Dataset(tmp_path / "toy", "keypoints", "intrinsics")
    with pytest.raises(u.InputError, match="result.json: not what it should be"):
        e.measure(tmp_path / "full-seed0/checkpoint.pt", {"source": toy, "target": toy}, 0, "cpu")


def test_a_run_on_data_of_ones_own_is_not_measured_on_the_benchmark(tmp_path, monkeypatch):
    """Where a flag was forgotten: said before the benchmark is rendered or anything measured."""
    monkeypatch.setattr(data, "make_benchmark", lambda *_: pytest.fail("rendered"))
    monkeypatch.chdir(tmp_path)
    own = {"source": "datasets/freihand_train", "target": "datasets/rhd_train"}
    hands = {"source": "datasets/hands/source_train", "target": "datasets/hands/figure_train"}
    save_checkpoint(tmp_path / "own/full", train_finetune, **own)
    save_checkpoint(tmp_path / "half/scratch", train_finetune, **own | {"target": hands["target"]})
    save_checkpoint(tmp_path / "there/full", train_finetune, **hands | {"target": own["target"]})
    save_checkpoint(tmp_path / "large/full", train_finetune, source="datasets/large/hands/source_train")
    for runs, more, says in (("own", [], "own/full: trained on datasets/freihand_train; .* by itself, with --source-test and "
                              "--target-test$"), ("half", ["--source-test", "x"], "freihand_train; .*, with --target-test$"),
                             ("there", ["--target-test", "x"], "trained on datasets/rhd_train; .* with --source-test$"),
                             ("large", [], "on datasets/large/hands/source_train; measure")):
        with pytest.raises(u.InputError, match=says): e.main([runs, *more])
    e.check_test_flags(tmp_path / "a/checkpoint.pt", hands, "", "")
    e.check_test_flags(tmp_path / "a/checkpoint.pt", hands | {"target": ""}, "", "")    # source-only
    with pytest.raises(u.InputError, match="--source-test: nothing is measured here"):
        e.main(["--table", "own", "--source-test", "x"])


@pytest.mark.parametrize("first", ["target_test", "mine_test"])
def test_a_result_of_other_test_images_stays_and_that_is_said(first, tmp_path, capsys):
    """Of another name: in a file of its own. Of the same name, one that was changed or is another's: the
    newest is what tables show, the former has the images' fingerprint in its name."""
    for name in (first, "other"): save_dataset(tmp_path / name)
    run = tmp_path / "full-seed0"
    save_checkpoint(run, train_finetune, source=str(tmp_path / "other"))

    def measure(name):
        test = data.Dataset(tmp_path / name, "keypoints", "intrinsics")
        fingerprint = test.fingerprint
        error = e.measure(run / "checkpoint.pt", {"source": test, "target": test}, 0, "cpu")["target"]["epe"]
        np.save(tmp_path / name / "keypoints.npy", 2 * test.keypoints)
        return error, fingerprint, capsys.readouterr().out

    def kept(name): return json.loads((run / name).read_text())["target"]["epe"]
    for name, place in ((first, "result.json"), ("other", "other.json")):
        (before, fingerprint, said), (now, _, says) = measure(name), measure(name)
        old = f"{place}.{fingerprint}-{fingerprint}"
        assert before != now == kept(place) and kept(old) == before
        assert "other images" not in said and f"{place} was of other images, and is now {old}" in says
        shown = e.read_results([str(run)], name)
        assert [(r["target"]["epe"], r["file"]) for r in shown] == [(now, str(run / place))]


def test_a_result_holds_the_last_losses(tmp_path):
    lines = [{"stage": "a", "step": 1, "L": 3.0}, {"stage": "b", "step": 1, "L": 9.0},
             {"stage": "b", "step": 2, "L": 8.0}, {"stage": "b", "step": 2, "epe": 7.0}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    last = {"a": lines[0], "b": lines[2] | lines[3]}
    assert e.last_logged(tmp_path / "checkpoint.pt") == last
    for broken in ('{"step": 1}\n', "{"):
        (tmp_path / "log.jsonl").write_text(broken)
        with pytest.raises(u.InputError, match="log.jsonl: not what it should be") as caught:
            e.last_logged(tmp_path / "checkpoint.pt")
        assert str(caught.value).count("log.jsonl") == 1


def test_the_pre_training_run_is_found_beside_and_only_if_it_is_the_same(tmp_path, capsys):
    save_checkpoint(tmp_path / "pretrain-full-seed0", train_pretrain, seed=0)
    save_checkpoint(tmp_path / "full-seed0", train_finetune)
    run, before = (tmp_path / name / "checkpoint.pt" for name in ("full-seed0", "pretrain-full-seed0"))
    settings, checksum = {"init": "runs/elsewhere/pretrain-full-seed0"}, u.file_checksum(before)
    assert e.made_by(run) == {} and e.pretraining_of(run, settings) == before
    facts = {"data": {"init": checksum}, "threads": 1}
    config = {"settings": {"lr": 1}, "facts": facts, "precision": "bfloat16"}
    (run.parent / "config.json").write_text(json.dumps(config))
    assert e.made_by(run) == facts | {"precision": "bfloat16"}
    assert e.pretraining_of(run, settings) == before and capsys.readouterr().out == ""
    shutil.rmtree(before.parent)
    save_checkpoint(before.parent, train_pretrain, seed=1)                 # trained again
    assert e.pretraining_of(run, settings) is None and e.pretraining_of(run, {"init": "nowhere"}) is None
    assert capsys.readouterr().out.count("measured without its pre-training") == 2
    assert e.pretraining_of(run, {"init": ""}) is None and e.pretraining_of(run, {"init": str(before)}) is None
    (run.parent / "config.json").write_text("{")
    with pytest.raises(u.InputError, match="config.json: not what it should be"): e.made_by(run)


# ==========================================================================================================
# Pictures of sweeps
# ==========================================================================================================
def test_positions_on_an_axis():
    at = lambda *values: e.positions(list(values)).tolist()  # noqa: E731
    assert at(0.5, 0.75, 0.95) == [0.5, 0.75, 0.95] and at("a", "b", "c") == [0, 1, 2]
    assert at(0.1, 1, 10, 100) == pytest.approx([-1, 0, 1, 2])
    assert at(2, 4, 8) == pytest.approx(np.log10([2, 4, 8])) and at(0, 1, 10) == pytest.approx([-1, 0, 1])
    assert at(0, 0.25, 0.5) == [0, 0.25, 0.5] and at(0, 5) == [0, 5]


def test_sweep_draws_mean_and_spread(monkeypatch):
    seen = {}
    chart = e.chart
    def spy(*a): seen.update(curves=a[1], y=a[3], marks=a[4]); return chart(*a)
    monkeypatch.setattr(e, "chart", spy)
    lines = {"full": {1: results("full", 30, 34), 10: results("full", 31), 100: results("full", 36, 36)},
             "no-ar": {10: results("no-ar", 50, 52)}}
    assert isinstance(e.draw_sweep(lines, "lam", "EPE"), Image.Image)
    x, mean, deviation = seen["curves"]["full"]
    assert x == [0, 1, 2] and mean.tolist() == [32, 31, 36]
    assert deviation.tolist() == pytest.approx([8 ** 0.5, np.nan, 0], nan_ok=True)     # of one value: none
    assert seen["curves"]["no-ar"][0] == [1] and seen["marks"] == {0: "1", 1: "10", 2: "100"}
    assert seen["y"][0] < 32 - 8 ** 0.5 and seen["y"][1] > 51 + 2 ** 0.5


def test_chart_draws_bars_and_dots():
    panel = e.chart("title", {"a": ([1, 2], [10.0, 20.0], [5.0, 0.0])}, {"a": RED}, (0, 40), {1: "one", 2: "two"})
    left, right = (e.LEFT + s * (e.CHART[0] - e.LEFT - e.RIGHT) for s in (0.05 / 1.1, 1.05 / 1.1))
    at = lambda v: e.CHART[1] - e.FOOT - v / 40 * (e.CHART[1] - e.FOOT - e.TOP)  # noqa: E731
    for x, y in ((left, 10), (left, 5.2), (left, 14.8), (right, 20)):
        assert tuple(colour_at(panel, (x, at(y)))) == RED
    assert all(tuple(colour_at(panel, (left, at(y)))) != RED for y in (4.5, 15.5))
    grid = np.flatnonzero((np.array(panel)[round(at(37))] == e.PALE).all(-1))           # upright lines
    assert set(np.round((grid - left) / (right - left), 2)) == {0, 1}                    # at the marks alone
    assert tuple(colour_at(panel, (left + 7, at(10)))) == RED                            # a dot, not a corner
    one = e.chart("title", {"a": ([1, 2], [10.0, 20.0], [np.nan, 0.0])}, {"a": RED}, (0, 40), {1: "one", 2: "two"})
    assert [tuple(colour_at(one, (left - x, at(10)))) for x in (0, 7)] == [e.PAPER, RED]   # a ring
    assert tuple(colour_at(one, (right, at(20)))) == RED


def test_minus_a_row_by_its_name(tmp_path):
    made = results("scratch", 40, 41) + results("mae", 35, 34) + results("full", 30, 31)
    lines = e.table(made, minus="mae")
    assert lines[0][3] == "minus mae [95 %]" and lines[2][3] == "-"
    assert lines[1][3].startswith("+6.0") and lines[3][3].startswith("-4.0")
    # another row is named "z, init a run"
    a_run = [*results("run", 10), *results("z", 30, before={}), *results("z", 33, init="weights.pth")]
    assert [line[3] for line in e.table(a_run, minus="run")[1:4]] == ["-", "+20.0", "+23.0"]
    lam10 = [*made, result("lam10", 0, 31, variant="full", lam=10.0), result("my run", 0, 29)]
    assert [line[3] for line in e.table(lam10, minus="my run")[3:6]] == ["+1.0 (1 seed)", "+2.0", "-"]
    paper = e.paper_tables(made, "EPE", False, "scratch")["tiny: Table 3 with X_C"]
    assert paper[-1][3].startswith("-10.0")                                # of another table
    with pytest.raises(u.InputError, match="--minus mae: is several rows: tiny mae, lam 3; tiny mae, lam 100"):
        e.table([*made, result("mae", 0, lam=3.0)], minus="mae")
    for i, r in enumerate(made): u.write_json(tmp_path / f"{i}-result.json", r)
    for option in (["--table"], ["--sweep", "lam"]):
        with pytest.raises(u.InputError, match="--minus ddc: choose above, first, full, mae, scratch"):
            e.main([*option, "--minus", "ddc", str(tmp_path)])
    with pytest.raises(SystemExit): e.main(["--table", "--target", "x", str(tmp_path)])  # of another script
    with pytest.raises(u.InputError, match="--threads -1: give a number not below 0"):
        e.main(["--table", "--threads", "-1", str(tmp_path)])


# ==========================================================================================================
# Measures of a pre-training run, by hand
# ==========================================================================================================
def rejected(check, *wrong) -> None:
    """Each of these wrong variants fails the check."""
    for variant in wrong:
        with pytest.raises(AssertionError): check(variant)


def test_pck_curve():
    """Of 0, 10, 50, 60 mm: a joint at the threshold counts, one without a label does not."""
    curve, area = e.pck_curve(torch.tensor([[60, 10], [torch.nan, 50], [0, torch.nan]]), 50.0, points=6)
    assert curve.tolist() == [0.25, 0.5, 0.5, 0.5, 0.5, 0.75] and area == pytest.approx(0.5)


def half_and_quarter():
    """Masks (2, 1, 4, 8) of 2 patches of 4 px: the left patch half foreground; the right one a quarter."""
    masks = torch.zeros(2, 1, 4, 8)
    masks[0, :, :2, :4] = 1
    masks[1, :, :1, 4:] = 1
    return masks


def check_lift(attention_lift):
    """Share of attention on the foreground, a patch counting by its share of it; its area."""
    maps = torch.tensor([[[0.3, 0.1], [0.0, 0.5]], [[0.2, 0.6], [0.1, 0.0]]])                # (2, L, N)
    share, area = attention_lift(maps, half_and_quarter(), 4)
    assert torch.allclose(share, torch.tensor([[0.5 * 0.75, 0.0], [0.25 * 0.75, 0.0]]))
    assert torch.allclose(area, torch.tensor([0.25, 0.125]))
    share, area = attention_lift(torch.full((2, 3, 2), 0.4), half_and_quarter(), 4)
    assert torch.allclose(share / area[:, None], torch.ones(2, 3))         # indifference


def test_attention_lift():
    check_lift(e.attention_lift)
    area = lambda masks: torch.nn.functional.avg_pool2d(masks, 4).flatten(1)  # noqa: E731
    rejected(check_lift, lambda maps, x, patch: ((maps * area(x)[:, None]).sum(-1), area(x).mean(1)),
             lambda maps, x, patch: (e.attention_lift(maps, x, patch)[0], area(x).sum(1)))


def check_overlap(overlap):
    predicted = torch.tensor([[0.9, 0.6, 0.4, 0.1], [0.5, 0.0, 0.0, 0.0]])
    truth = torch.tensor([[1.0, 0.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
    assert overlap(predicted, truth).tolist() == [[1, 3], [1, 1]]
    assert overlap(torch.zeros(2, 4), torch.zeros(2, 4)).tolist() == [[0, 0], [0, 0]]


def test_overlap():
    check_overlap(e.overlap)
    rejected(check_overlap, lambda p, t: e.overlap(p > 0.5, t), lambda p, t: e.overlap(p, t).flip(1),
             lambda p, t: torch.stack([e.overlap(p, t)[:, 0], (p >= 0.5).sum(1) + (t >= 0.5).sum(1)], 1))


def test_measures_of_nothing_are_no_numbers(tmp_path):
    """No foreground, in the truth or predicted: neither a bad overlap nor a perfect reconstruction."""
    save_dataset(tmp_path / "set")
    np.save(tmp_path / "set/masks.npy", np.zeros((4, 60, 60), np.uint8))
    dataset, cpu = data.Dataset(tmp_path / "set", "masks"), torch.device("cpu")
    assert np.isnan(e.measure_masks(lambda x: torch.full_like(x[:, :1], -9.0), dataset, 48, cpu))
    s = {"image": 48, "patch": 16, "mask_ratio": 0.5, "norm_pix": False}
    mae = lambda x, noise, r: (u.patchify(x, 16) + 1, (noise > 0.5).float())  # noqa: E731
    on, edge, beside = e.measure_reconstruction(mae, dataset, s, cpu)
    assert np.isnan([on, edge]).all() and beside == pytest.approx(1.0)


def test_an_image_of_two_labelled_joints_has_no_aligned_error():
    """Two points fit any two exactly. It counts in the error itself; one without a label in nothing."""
    torch.manual_seed(0)
    truth, meta = 50 * torch.randn(3, 5, 3), {"joints": list("abcde"), "root": 0}
    predicted = truth + 10 * torch.randn(3, 5, 3)
    whole = e.pose_metrics(predicted[:1], truth[:1], meta)
    truth[1, 2:], truth[2] = torch.nan, torch.nan
    some = e.pose_metrics(predicted, truth, meta)
    assert whole["images"] == 1 and some["images"] == 2 and whole["epe"] != some["epe"]
    assert [some[key] for key in ("pa_epe", "pa_rigid")] == pytest.approx([whole["pa_epe"], whole["pa_rigid"]])


def test_iou_over_the_images_of_all_chunks(tmp_path, monkeypatch):
    """Not the mean of each chunk's: all masks are squares; the net sees half of the first image's."""
    save_dataset(tmp_path / "set")
    dataset, seen = data.Dataset(tmp_path / "set", "masks"), []
    whole = e.with_masks(dataset, np.arange(len(dataset)), 48, torch.device("cpu"))[1]

    def net(x):
        mine = 20 * whole[sum(seen):sum(seen) + len(x)] - 10
        if not seen: mine[0, :, :, :24] = -10
        seen.append(len(x))
        return mine
    monkeypatch.setattr(data, "chunks", lambda n: [np.arange(1), np.arange(1, n)])
    first = (whole[0, 0, :, 24:] >= 0.5).sum() / (whole[0] >= 0.5).sum()
    every = [(m >= 0.5).sum() for m in whole]
    assert e.measure_masks(net, dataset, 48, torch.device("cpu")) == pytest.approx(
        float((sum(every) - (1 - first) * every[0]) / sum(every)))


def check_reconstruction(reconstruction_error):
    """Hidden patches alone, on, at the edge of, beside the foreground; a pixel's mean: sums, numbers."""
    patches = torch.zeros(2, 4, 2)                                         # squared errors 5, 4, 8, 49
    predicted = torch.tensor([[1.0, 3.0], [2.0, 2.0], [4.0, 0.0], [7.0, 7.0]]).expand(2, 4, 2)
    m = torch.tensor([[1.0, 1.0, 1.0, 0.0], [1.0, 0.0, 1.0, 0.0]])
    area = torch.tensor([[0.5, 0.1, 0.09, 1.0], [0.9, 0.3, 0.49, 0.0]])
    assert reconstruction_error(predicted, patches, m, area).tolist() == [
        [[5, 4, 8], [1, 1, 1]], [[5, 8, 0], [1, 1, 0]]]


def test_reconstruction_error():
    right = e.reconstruction_error
    check_reconstruction(right)
    rejected(check_reconstruction, lambda p, x, m, area: right(p, x, torch.ones_like(m), area),
             lambda p, x, m, area: right(p, x, 1 - m, area), lambda p, x, m, area: right(p, x, m, 1 - area),
             lambda p, x, m, area: right(p, x, m, area) * torch.tensor([[2.0], [1.0]]))


def test_a_better_autoencoder_has_smaller_errors(tmp_path):
    """The whole measure: an f^D that always answers the mean colour, and one that answers a worse one."""
    save_dataset(tmp_path / "set")
    dataset = data.Dataset(tmp_path / "set", "masks")
    s = {"image": 48, "patch": 8, "mask_ratio": 0.75, "norm_pix": False}
    answer = lambda value: lambda x, noise, r: (  # noqa: E731
        torch.full((len(x), 36, 192), value), (noise < 0.75).float())
    near, far = (e.measure_reconstruction(answer(v), dataset, s, torch.device("cpu")) for v in (0.0, 9.0))
    assert len(near) == 3 and all(0 < a < b for a, b in zip(near, far))
