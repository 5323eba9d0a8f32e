"""README.md and docs/ against the code: commands are understood, tables are what they print, diffs apply.

The shell blocks run with a `python` and a `torchrun` that only write down what they were called with. The
demo and the command for the tests run for real in .ci/run, the commands on own data in test_training.py.

    python tests/test_readme.py    writes the present line numbers into the links of the pages
"""

import contextlib
import functools
import inspect
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from conftest import DECODER, HEAD, SEGMENTATION, TINY, write_set
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
import evaluate  # noqa: E402
import train_finetune  # noqa: E402
import train_pretrain  # noqa: E402
from support import hands  # noqa: E402
from support import run as runs  # noqa: E402

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = {page.name: page.read_text() for page in PAGES}
BLOCKS = [block for text in TEXT.values() for block in re.findall(r"```sh\n(.*?)```", text, re.S)]
BLOCKS += [f"bash assets/results/run_all.sh {part}" for part in ("hands", "bodies", "tiny")]
FLOWING = " ".join(" ".join(TEXT.values()).split())  # a command in a sentence may run over two lines
INLINE = sorted(set(re.findall(r"`(python \S+\.py [^`]*)`", FLOWING)))
DIFFS = dict(re.findall(r"<!-- diff: (\S+) -->\n```diff\n(.*?)```", TEXT["forking.md"], re.S))
LINK = re.compile(r"\[`(\w+)`\]\(\.\./([\w/]+\.py)#L(\d+)\)")
NUMBER = re.compile(r"(?<![\w.])[+-]?\d+\.\d+(?![\w.])")
TRIED = set()  # sizes of networks that were tried before: that takes half a second
STUB = '#!/bin/sh\necho "$(printf "%s\\037" "$@")" >> "$RECORD"\n'  # one write: two of xargs do not mix


# ==== Commands ==========================================================================================
def recorded(block: str, folder: Path) -> list[list[str]]:
    """The calls of python and torchrun in a block, in order, each from the script's name on."""
    folder.mkdir()
    for name, text in {"srun": '#!/bin/sh\nexec "$@"\n', **dict.fromkeys(
            ("python", "python3", "torchrun", "pip", "scontrol"), STUB)}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    environment = {"PATH": f"{folder}:/usr/bin:/bin", "RECORD": str(folder / "calls"), "SLURM_NNODES": "2",
                   "SLURM_JOB_NODELIST": "a,b", "SLURM_JOB_ID": "1"}
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", block.replace(". .venv/bin/activate", "true")],
                          cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = (folder / "calls").read_text().splitlines() if (folder / "calls").exists() else []
    calls = [line.split("\037")[:-1] for line in lines]
    return [call[next(i for i, word in enumerate(call) if word.endswith(".py")):]
            for call in calls if any(word.endswith(".py") for word in call)]


@pytest.fixture(scope="module")
def calls(tmp_path_factory) -> list[list[list[str]]]:
    """The calls of every block, and of every command in a sentence."""
    folder = tmp_path_factory.mktemp("shell")
    return [recorded(block, folder / str(i)) for i, block in enumerate([*BLOCKS, *INLINE])]


def settings(call: list[str]):
    """Settings of a training command, completed and checked by its script. None: -h, or a flag of a diff."""
    module = {"train_pretrain.py": train_pretrain, "train_finetune.py": train_finetune}[call[0]]
    if {"-h", "--ar-blocks", "--registers", "self"} & set(call):
        return None
    s = runs.parse_settings(module.Settings, "", module.PRESETS, module.VARIANTS, call[1:], module.TASKS)
    if module is train_finetune:
        module.complete(s)
    else:
        sizes = (s.image, s.patch, s.width, s.depth, s.heads, s.mask_ratio)
        untried = mock.patch.multiple(train_pretrain, networks=lambda _: (), UNet=mock.MagicMock(),
                                      MaskedAutoencoder=mock.MagicMock())
        with untried if sizes in TRIED else contextlib.nullcontext():
            module.complete(s, world=1)
        TRIED.add(sizes)
    return s


@pytest.fixture(scope="module")
def trainings(calls) -> list[list]:
    """The settings of each block's trainings."""
    with mock.patch.object(inspect, "getsource", functools.cache(inspect.getsource)):  # it is slow
        made = [[settings(call) for call in block if call[0].startswith("train_")] for block in calls]
    return [[s for s in block if s is not None] for block in made]


def test_training_commands_are_understood(trainings):
    assert sum(map(len, trainings)) > 150


def test_other_commands_are_understood(calls):
    for call in (call for block in calls for call in block):
        assert (ROOT / call[0]).is_file(), call
        if call[0] == "evaluate.py" and "-h" not in call:
            evaluate.parse_arguments(call[1:])
        if call[0] == "data.py" and call[1] not in ("-h", "mine") and "-h" not in call:
            works = dict.fromkeys(("show", "check", "convert_dataset", "make_benchmark"), mock.DEFAULT)
            with mock.patch.multiple(data, **works) as done:
                data.main(call[1:])
            assert sum(work.called for work in done.values()) == 1, call


def test_no_two_commands_want_one_folder(trainings):
    """A run folder belongs to one set of settings: with others, the second command would be refused."""
    wanted: dict[str, dict] = {}
    for s in (s for block in trainings for s in block):
        own = {k: v for k, v in vars(s).items() if k not in ("threads", "variant")}
        assert wanted.setdefault(s.out, own) == own, s.out


def test_what_a_run_starts_from_is_made_before(trainings):
    """By an earlier command of its block or, if its block does not make it, by another block."""
    def made_in(block):
        return {s.out for s in block if isinstance(s, train_pretrain.Settings)}

    everywhere = set().union(*map(made_in, trainings))
    for block in trainings:
        before = set()
        for s in block:
            if isinstance(s, train_pretrain.Settings):
                before.add(s.out)
            elif s.init in made_in(block):
                assert s.init in before, s.out
            elif s.init not in ("", "WEIGHTS"):
                assert s.init in everywhere or (ROOT / s.init).is_file(), s.out


# ==== Tables ============================================================================================
def numbers(text: str) -> set[str]:
    """The decimal numbers in a text, without a plus sign."""
    return {number.lstrip("+") for number in NUMBER.findall(text)}


def printed(block: str, folder: Path, capsys) -> str:
    """What the commands on committed results print."""
    out = ""
    for call in recorded(block, folder):
        if call[0] == "evaluate.py" and any(word.startswith("assets/") for word in call):
            words = [str(ROOT / word) if word.startswith("assets/") else word for word in call[1:]]
            if "--sweep" in words and "--pictures" not in words:
                words += ["--pictures", str(folder)]
            capsys.readouterr()
            evaluate.main([*words, "--markdown"])
            out += capsys.readouterr().out
    return out


def own_numbers(table: str) -> set[str]:
    """The numbers of a table without those of the paper and of verdicts."""
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if not line.startswith("| ---")]
    ours = [i for i, head in enumerate(rows[0]) if not re.search("paper|verdict", head)]
    return set().union(*(numbers(" | ".join(row[i] for i in ours if i < len(row)))
                         for row in rows[1:] if not row[0].startswith("paper")))


def sections(text: str) -> list[tuple[str, list[str]]]:
    """(block, tables) pairs of a page: the tables between a shell block and the next one."""
    parts = re.split(r"```sh\n(.*?)```", text, flags=re.S)
    tables = [re.findall(r"(?:^\|.*\n)+", part, re.M) for part in parts[2::2]]
    return list(zip(parts[1::2], tables, strict=True))


def test_tables_hold_what_the_commands_above_them_print(tmp_path, capsys):
    """Every number of ours in a table that follows a command on committed results is in its output."""
    count = 0
    for i, (block, tables) in enumerate(sections(TEXT["results.md"])):
        out = printed(block, tmp_path / str(i), capsys)
        for table in tables if "assets/" in block else ():  # the others need runs
            missing = own_numbers(table) - numbers(out)
            assert not missing, f"{block}\nprints no {sorted(missing)}"
            count += 1
    assert count >= 10


def test_numbers_of_the_readme_are_printed(tmp_path, capsys):
    blocks = re.findall(r"```sh\n(.*?)```", TEXT["README.md"], re.S)
    block = next(block for block in blocks if "assets/results" in block)
    table = re.search(r"## Does it work\?\n\n((?:^\|.*\n)+)", TEXT["README.md"], re.M)[1]
    assert numbers(table) <= numbers(printed(block, tmp_path / "block", capsys))


# ==== Links and names ===================================================================================
def defined_at(name: str, path: str) -> int:
    """The line of a file that defines a function, class or setting."""
    lines = (ROOT / path).read_text().splitlines()
    pattern = re.compile(rf"(class |def |    )?{name}\b ?[(:=]")
    return next((i for i, line in enumerate(lines, 1) if pattern.match(line)), 0)


def test_links_to_lines_of_code():
    links = [link for text in TEXT.values() for link in LINK.findall(text)]
    assert len(links) > 30
    for name, path, line in links:
        assert defined_at(name, path) == int(line), f"{name}: call python tests/test_readme.py"


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.S), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_somewhere():
    count = 0
    for page in PAGES:
        for link in re.findall(r"\]\(([^)]*)\)", re.sub(r"```.*?```", "", page.read_text(), flags=re.S)):
            if link.startswith("http"):
                continue
            path, _, anchor = link.partition("#")
            place = (page.parent / path).resolve() if path else page
            assert place.exists(), f"{page.name}: {link}"
            if anchor and place.suffix == ".md":
                assert anchor in anchors(place.read_text()), f"{page.name}: {link}"
            count += 1
    assert count > 60


def test_files_that_are_named_exist():
    for page, text in TEXT.items():
        for name in re.findall(r"`((?:assets|tests|support|docs)/[\w./*-]*)`", text):
            assert (ROOT / name).exists() or list(ROOT.glob(name)), f"{page}: {name}"


def test_the_readme_is_short_and_its_file_tree_complete():
    text = TEXT["README.md"]
    assert len(text.splitlines()) <= 180 and len(text.split()) <= 1800
    tree = re.search(r"## Read the code\n\n```\n(.*?)```", text, re.S)[1]
    named = {line.split()[0].rstrip("/") for line in tree.splitlines()}
    assert named == {"support", "docs", "assets", "tests"} | {path.name for path in ROOT.glob("*.py")}
    path = ("udapose", "train_pretrain", "train_finetune")
    lines = sum(len((ROOT / f"{name}.py").read_text().splitlines()) for name in path)
    lines += (ROOT / "data.py").read_text().splitlines().index("# Commands")
    said = int(re.search(r"in about ([\d,]+) lines", text)[1].replace(",", ""))
    assert abs(lines - said) <= 50


# ==== The diffs of docs/forking.md ======================================================================
FEW = [*TINY, *"--source S --target T --epochs 1".split()]
PRETRAIN = [*FEW, *DECODER, *SEGMENTATION, *"--unconstrained S --out p".split()]
FINETUNE = [*FEW, *HEAD, *"--init p --out f".split()]
MEASURE = "f --source-test S --target-test T --pictures none --markdown".split()
TRIALS = {  # what each diff adds to the commands of both stages; None: no training
    "a-loss-on-target-images": ([], ["--variant", "no-ar", "--adapt", "self"]),
    "a-setting": ([], ["--ar-blocks", "1"]),
    "a-head": ([], []),
    "a-backbone": (["--registers", "2"], ["--registers", "2"]),
    "a-data-set": None,
}


def forked(folder: Path, diff: str) -> Path:
    """A copy of the code with a diff applied."""
    for path in [*ROOT.glob("*.py"), *ROOT.glob("support/**/*.py")]:
        (folder / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / path.relative_to(ROOT))
    done = subprocess.run(["git", "apply", "-"], input=diff, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def called(folder: Path, *code: str) -> str:
    done = subprocess.run([sys.executable, *code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("recipe", [name for name, trial in TRIALS.items() if trial])
def test_a_diff_applies_trains_and_is_measured(recipe, tmp_path):
    assert DIFFS.keys() == TRIALS.keys()
    folder = forked(tmp_path / "fork", DIFFS[recipe])
    for name, domain in (("S", "source"), ("T", "target")):
        write_set(folder / name, domain, 8)
    pretrain, finetune = TRIALS[recipe]
    out = called(folder, "-c", f"""
import evaluate, train_finetune, train_pretrain
train_pretrain.main({PRETRAIN + pretrain})
train_finetune.main({FINETUNE + finetune})
evaluate.main({MEASURE})""")
    assert out.count("finished: ") == 2 and "\n| f " in out


def test_the_new_reader_converts(tmp_path):
    """Two hands of the publisher MINE become a data set whose labels pass the checks."""
    folder = forked(tmp_path / "fork", DIFFS["a-data-set"])
    root = tmp_path / "MINE"
    (root / "train").mkdir(parents=True)
    poses = hands.sample_hand(np.random.default_rng(0), 2)[0][:, :21]  # (2, 21, 3) mm, wrist at 0
    poses += np.float32([0, 0, 700])
    K, labels = np.array([[600.0, 0, 159.5], [0, 600.0, 119.5], [0, 0, 1]]), {}
    for i, xyz in enumerate(poses):
        uv = xyz @ K.T
        label = {"xyz": xyz / 1000, "uv": uv[:, :2] / uv[:, 2:], "K": K}
        labels[f"{i:05d}.jpg"] = {key: value.tolist() for key, value in label.items()}
        Image.new("RGB", (320, 240), (90, 60, 40)).save(root / f"train/{i:05d}.jpg")
    (root / "train/labels.json").write_text(json.dumps(labels))
    called(folder, *f"data.py mine {root} {tmp_path}/out --split train --workers 1".split())
    assert len(data.Dataset(tmp_path / "out", "keypoints")) == 2


if __name__ == "__main__":
    for page in PAGES:
        text = LINK.sub(lambda m: f"[`{m[1]}`](../{m[2]}#L{defined_at(m[1], m[2])})", page.read_text())
        page.write_text(text)
