"""README and the page of results against the code: commands are understood, tables are what they print, names exist.

Its blocks of commands run in a shell in which `python` and `torchrun` only write down what they were called with
(the demo, the tests and the own-data block are run for real elsewhere).
"""
import re
import subprocess
from pathlib import Path

import pytest

import data
import evaluate
import train_finetune
import train_pretrain
import udapose as u

ROOT = Path(__file__).resolve().parents[1]
README, RESULTS = ((ROOT / name).read_text() for name in ("README.md", "assets/results/README.md"))
BLOCKS = re.findall(r"```sh\n(.*?)```", README + RESULTS, re.S)
INLINE = re.findall(r"`(python \S+\.py[^`]*)`", " ".join((README + RESULTS).split()))  # in sentences; a line may end in one
STUB = '#!/bin/sh\necho "$(printf "%s\\037" "$@")" >> "$RECORD"\n'  # one write: two of xargs do not mix


def recorded(block: str, folder: Path) -> list[list[str]]:
    """What a block calls python (or torchrun) with, in its order, each call from the script's name on."""
    folder.mkdir()
    for name in ("python", "python3", "torchrun", "pip", "scontrol"):
        (folder / name).write_text(STUB)
        (folder / name).chmod(0o755)
    (folder / "srun").write_text('#!/bin/sh\nexec "$@"\n')
    (folder / "srun").chmod(0o755)
    environment = {"PATH": f"{folder}:/usr/bin:/bin", "RECORD": str(folder / "calls")}
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", block.replace(". .venv/bin/activate", "true")],
                          cwd=ROOT, env=environment | {"SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "a,b",
                                                       "SLURM_JOB_ID": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    calls = [line.split("\037")[:-1] for line in (folder / "calls").read_text().splitlines()]
    calls = [call[next(i for i, word in enumerate(call) if word.endswith(".py")):]
             for call in calls if any(word.endswith(".py") for word in call)]
    return calls


@pytest.fixture(scope="module")
def calls(tmp_path_factory) -> list[list[list[str]]]:
    """The calls of each block, and of each command in a sentence."""
    folder = tmp_path_factory.mktemp("shell")
    return [recorded(block, folder / str(i)) for i, block in enumerate([*BLOCKS, *INLINE])]


def settings(call: list[str]):
    """What a training command sets, checked as the script checks it, with its run folder filled in."""
    module = {"train_pretrain.py": train_pretrain, "train_finetune.py": train_finetune}[call[0]]
    s = u.parse_settings(module.Settings, "", module.PRESETS, module.VARIANTS, call[1:], module.TASKS)
    if module is train_finetune: module.complete(s)
    else:
        module.check(s)
        s.out = s.out or f"runs/{u.run_group(s.preset, s.task)}/pretrain-{s.variant}-seed{s.seed}"
    return s


@pytest.fixture(scope="module")
def trainings(calls) -> list[list]:
    """The settings of each block's trainings."""
    return [[settings(call) for call in block if call[0].startswith("train_")] for block in calls]


def test_every_block_calls_something(calls):
    silent = [block for block, own in zip([*BLOCKS, *INLINE], calls) if not own and "pytest" not in block]
    assert not silent and sum(map(len, calls)) > 200


def test_training_commands_are_understood(trainings):
    assert sum(map(len, trainings)) > 150


def test_no_two_commands_want_one_folder(trainings):
    """A run folder belongs to one set of settings: with others, the second command would be refused."""
    wanted: dict[str, dict] = {}
    for s in (s for block in trainings for s in block):
        own = {k: v for k, v in vars(s).items() if k not in ("threads", "variant")}
        assert wanted.setdefault(s.out, own) == own, s.out


def test_what_a_run_starts_from_is_made_before(trainings):
    """Earlier in its block; or, where its block does not make it, in another. WEIGHTS stands for a file."""
    def made_in(block): return {s.out for s in block if isinstance(s, train_pretrain.Settings)}
    everywhere = set().union(*map(made_in, trainings))
    for block in trainings:
        own, before = made_in(block), set()
        for s in block:
            if isinstance(s, train_pretrain.Settings): before.add(s.out)
            elif s.init in own: assert s.init in before, s.out
            elif s.init not in ("", "WEIGHTS"): assert s.init in everywhere or (ROOT / s.init).is_file(), s.out


def test_other_scripts_exist_and_so_do_the_readers(calls):
    for call in (call for block in calls for call in block):
        assert (ROOT / call[0]).is_file(), call
        if call[0] == "data.py": assert call[1] in {"hands", "bodies", "show", "check", *data.READERS}, call
    assert {*re.findall(r"`data\.py (\w+)", README)} >= {*data.READERS}


def printed(call: list[str], folder: Path, capsys) -> str:
    """What evaluate.py prints for a command of README, with Markdown tables; pictures go to the folder."""
    words = [path for word in call[1:] for path in (sorted(ROOT.glob(word)) if "*" in word else [word])]
    words = [str(ROOT / word) if str(word).startswith("assets") else str(word) for word in words]
    if "--pictures" in words: words[words.index("--pictures") + 1] = str(folder)
    capsys.readouterr()
    assert evaluate.main([*words, "--markdown"]) == 0
    return capsys.readouterr().out


def test_tables_of_finished_runs_are_printed_as_the_commands_say(calls, tmp_path, capsys):
    known = [call for block in calls for call in block if call[0] == "evaluate.py" and any("assets/" in word for word in call)]
    assert len(known) >= 8
    for call in known: assert "| " in printed(call, tmp_path, capsys), call
    assert {path.name for path in tmp_path.iterdir()} >= {"sweep-labels-EPE.png", "sweep-lam-EPE.png",
                                                          "sweep-test-EPE.png"}


@pytest.mark.parametrize("heading, arguments", [
    ("## Hands: `--preset small`", "--table --minus first assets/results/small-[!h]*"),
    ("## The default: `--preset tiny`", "--table --minus first assets/results/tiny-*"),
    ("## Bodies: `--preset small --task human`", "--table --minus first assets/results/small-human-*")])
def test_tables_are_what_the_commands_print(heading, arguments, tmp_path, capsys):
    """Line by line: a number in a table that no committed result holds fails here."""
    section = RESULTS.partition(f"\n{heading}\n")[2].partition("\n##")[0]
    lines = printed(["evaluate.py", *arguments.split()], tmp_path, capsys).splitlines()
    lines = [line for line in lines if line.startswith("| ")]
    ours = [line for line in section.splitlines() if line.startswith("| ")]
    assert len(lines) > 5 and ours[:len(lines)] == lines


def test_the_first_table_is_what_the_committed_runs_print(tmp_path, capsys):
    """That of the demo, whose two runs are in assets."""
    shown = printed("evaluate.py --table assets/results/tiny-scratch-seed0* assets/results/tiny-full-seed0*".split(),
                    tmp_path, capsys)
    lines = [line for line in shown.splitlines() if line.startswith("|")]
    assert len(lines) == 5 and "\n".join(lines) in README


def test_table_of_switches_is_what_the_command_prints(tmp_path, capsys):
    shown = printed("evaluate.py --table --paper assets/results/small-[!h]*".split(), tmp_path, capsys)
    lines = [line for line in shown.partition("in all eight cells\n\n")[2].splitlines() if line.startswith("|")]
    assert len(lines) == 5 and "\n".join(lines) in RESULTS


def test_summary_of_the_results_is_what_the_files_hold():
    """A cell of the first table of results: mean and spread of its row's files; the second look's without spread."""
    lines = re.findall(r"^\| `([a-z][\w-]*)`.*? \| (.*?) \| (.*?) \| (.*?) \|$", README.partition("## Results\n")[2], re.M)
    assert len(lines) == 7
    def column(folder, name): return [result["target"]["epe"] for result in evaluate.read_results(
        sorted(map(str, (ROOT / "assets" / folder).glob(f"{name}-seed?.*json"))), "*")]
    for row, hands, again, bodies in lines:
        assert hands == evaluate.spread(column("results", f"small-{row}"))
        assert bodies == evaluate.spread(column("results", f"small-human-{row}"))
        if again != "-": assert again == evaluate.spread(column("shifted", f"small-{row}")).split(" ")[0]


def test_tables_of_what_ar_does_are_what_the_files_hold():
    """Mean and spread of both errors, the paired difference to nothing that holds the encoder."""
    section = RESULTS.partition("### What AR does")[2].partition("\n##")[0]
    lines = re.findall(r"^\| `([\w.-]+)` \|.*? \| (.*?) \| (.*?) \| (.*?) \|$", section, re.M)
    def runs(row): return evaluate.read_results(sorted(map(str, (ROOT / "assets/sweeps").glob(f"small-{row}-seed?.*json"))))
    assert len(lines) == 6 + 5
    for row, error, minus, source in lines:
        free = "source-only-decay1" if row.startswith("source-only") else "no-ar-decay1"
        assert error == evaluate.spread([r["target"]["epe"] for r in runs(row)]), row
        assert source == evaluate.spread([r["source"]["epe"] for r in runs(row)]), row
        assert minus == ("-" if row == free else evaluate.paired_difference(runs(row), runs(free))), row
    def effect(row, free):
        held, none = evaluate.by_seed(runs(row)), evaluate.by_seed(runs(free))
        return [held[seed] - none[seed] for seed in sorted(held)]
    for on, words in (("target_train", "mm on target images"), ("source_train", "on the source's"), ("unconstrained", "on X_C")):
        pairs = zip(effect(f"source-only-ar-on-{on}", "source-only-decay1"), effect(f"ar-on-{on}", "no-ar-decay1"))
        said = evaluate.interval([without - seen for without, seen in pairs]).replace("+", "")
        assert f"{said} {words}" in " ".join(section.split()), said
    short = effect("ar-on-target_train-epochs50", "no-ar-epochs50")        # seeds 1 and 2
    long, blind = effect("ar-on-target_train", "no-ar-decay1"), effect("source-only-ar-on-target_train", "source-only-decay1")
    one, two, three = ("{:+.1f} and {:+.1f}".format(*pair) for pair in (short, long[1:], blind[1:]))
    assert f"AR changes the error by {one} mm; from the first it was {two} on these seeds, from the second {three}." in \
        " ".join(section.split())


def test_tables_of_labels_and_lambda_are_what_the_files_hold():
    """Mean and spread over the seeds of each value's runs; lambda 0 is no-ar."""
    results = evaluate.read_results([str(ROOT / "assets/results"), str(ROOT / "assets/sweeps")])
    def cells(heading, row): return re.search(rf"^\| {row} \| (.*) \|$", RESULTS.partition(heading)[2], re.M)[1].split(" | ")
    def errors(groups, domain): return [evaluate.spread([r[domain]["epe"] for r in group]) for group in groups]
    labels = evaluate.sweep(evaluate.as_asked(results, "init"), "labels", "EPE")
    for row in ("scratch", "full"):
        assert cells("### Fewer labels", f"`{row}`") == errors(labels[f"small {row}"].values(), "target")
    none = [r for r in results if r["kind"] == "finetuning" and evaluate.row_name(r) == "small no-ar"]
    lam = [none, *evaluate.sweep(results, "lam", "EPE")["small full"].values()]
    for domain in ("target", "source"): assert cells("### lambda", f"{domain} EPE") == errors(lam, domain)
    def long(row): return [r for r in results if evaluate.row_name(r) == f"small {row}-labels10000-steps10000"]
    scratch, full = errors([long("scratch"), long("full")], "target")
    minus = evaluate.paired_difference(long("full"), long("scratch"))
    assert f"it is {scratch} and {full}, minus 10 %: {minus}" in " ".join(README.split())
    assert f"scratch comes to {scratch}, full to {full}: **{minus}, minus 10 %**" in " ".join(RESULTS.split())


def anchors(text: str) -> set[str]:
    """Names that a page's headings have on GitHub, behind the #."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.S), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_somewhere():
    pages, count = {ROOT / "README.md": README, ROOT / "assets/results/README.md": RESULTS}, 0
    for page, text in pages.items():
        for link in re.findall(r"\]\(([^)]*)\)", " ".join(text.split())):
            path, _, anchor = link.partition("#")
            place = (page.parent / path).resolve() if path else page
            assert place.exists(), link
            if anchor: assert anchor in anchors(pages[place]), link
            count += 1
    assert count > 20


def test_names_in_the_readme_exist():
    files = {name.rstrip("/") for name in re.findall(r"[`(]((?:assets|tests)/[\w./-]+)[`) :]", README)}
    assert len(files) > 15
    for name in files: assert (ROOT / name).exists() or list(ROOT.glob(f"{name}*")), name
    equations = re.findall(r"^\| Eq\. \(\d\).*?\| (`.*?) \|", README, re.M)
    names = re.findall(r"`(\w+)`", " ".join(equations))
    assert len(names) >= 9
    for name in names: assert hasattr(u, name), name
