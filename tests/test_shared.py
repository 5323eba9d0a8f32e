"""What the three scripts share: randomness, batches, learning rate, checkpoints, run folders, settings."""
import contextlib
import dataclasses
import json
import os
import re
import resource
import shutil
import signal
import tracemalloc
import types
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

import train_pretrain
import udapose as u


def rejected(check, wrong) -> None:
    with pytest.raises(AssertionError): check(wrong)


# ==========================================================================================================
# Randomness
# ==========================================================================================================
def check_generator(function):
    """The same numbers for the same (seed, purpose, step), in any order of calls; others for all others."""
    purposes = ("order", "noise", "esion")                                 # one length, the same letters
    keys = [(seed, purpose, step) for seed in range(4) for purpose in purposes for step in range(4)]
    draws = {key: function(*key).random(8).tolist() for key in keys}
    for key in reversed(keys): assert function(*key).random(8).tolist() == draws[key]
    firsts = [x for draw in draws.values() for x in draw]
    assert len(set(firsts)) == len(firsts), "two streams share numbers"


def test_random_generator(): check_generator(u.random_generator)


@pytest.mark.parametrize("wrong", [
    lambda seed, purpose, step: np.random.default_rng(seed + step + len(purpose)),
    lambda seed, purpose, step: np.random.default_rng([seed, len(purpose), step]),
    lambda seed, purpose, step: np.random.default_rng([seed, ord(purpose[0])]),
    lambda seed, purpose, step: np.random.default_rng()],
    ids=["a sum: seed 1 is seed 0 one step on", "purposes of one length alike", "no step", "no seed"])
def test_random_generator_check_rejects(wrong): rejected(check_generator, wrong)


def test_random_numbers_are_the_same_in_every_process():
    """Python's own hash() of a string changes with every process; the CRC-32 of "order" is this for ever."""
    own = np.random.default_rng(np.random.SeedSequence([0, 4113142680, 7]))
    assert u.random_generator(0, "order", 7).random() == own.random()


# ==========================================================================================================
# Batches, learning rate, weight decay, precision
# ==========================================================================================================
def test_micro_batches_by_hand():
    assert u.micro_batches(8, 2, 1, 2) == [slice(4, 6), slice(6, 8)]
    assert u.micro_batches(8, 0, 1, 2) == [slice(4, 8)]                   # 0: the whole share at once
    assert u.micro_batches(8, 100, 0, 4) == [slice(0, 2)]


@pytest.mark.parametrize("batch, micro, world", [(24, 0, 1), (24, 3, 2), (24, 2, 4), (24, 1, 3)])
def test_shares_cover_the_batch_once(batch, micro, world):
    shares = [s for rank in range(world) for s in u.micro_batches(batch, micro, rank, world)]
    assert [i for s in shares for i in range(batch)[s]] == list(range(batch))
    assert len({s.stop - s.start for s in shares}) == 1


def test_uneven_shares_are_refused():
    with pytest.raises(u.InputError, match="batch 10 .* 4 processes"): u.micro_batches(10, 0, 0, 4)
    with pytest.raises(u.InputError, match="--micro-batch 3 .* 4"): u.micro_batches(8, 3, 0, 2)
    with pytest.raises(u.InputError, match="--seg-batch 5 "): u.micro_batches(5, 0, 0, 2, "--seg-batch")


def check_rate(rate):
    """10 steps, 2 of warm-up, peak 8: 4, 8, then half a cosine from 8 to 0 over the remaining 8 steps."""
    assert [rate(i, 10, 2, 8.0) for i in (0, 1, 2)] == [4, 8, 8]
    assert abs(rate(6, 10, 2, 8.0) - 4) < 1e-12 and abs(rate(10, 10, 2, 8.0)) < 1e-12
    assert abs(rate(4, 10, 2, 8.0) - 8 * (1 + 0.5 ** 0.5) / 2) < 1e-12
    rates = [rate(i, 10, 2, 8.0) for i in range(2, 11)]
    assert rates == sorted(rates, reverse=True)
    assert rate(0, 10, 0, 8.0) == 8 and rate(3, 3, 3, 8.0) == 8            # no warm-up; nothing but warm-up


def test_cosine_rate():
    check_rate(u.cosine_rate)
    rejected(check_rate, lambda i, n, w, peak: u.cosine_rate(i + 1, n, w, peak))
    rejected(check_rate, lambda i, n, w, peak: u.cosine_rate(i, n, 0, peak))
    linear = lambda i, n, w, peak: peak * min((i + 1) / max(w, 1), (n - i) / max(n - w, 1), 1)  # noqa: E731
    rejected(check_rate, linear)


def test_no_weight_decay_on_offsets_scales_and_tokens():
    encoder = u.Encoder((8, 8), 4, 8, 1, 2)
    mae = u.MaskedAutoencoder(encoder, u.Decoder(encoder.grid, 4, 8, 8, 1, 2))
    decay, plain = u.parameter_groups(mae, 0.05)
    names = {id(p): n for n, p in mae.named_parameters()}
    assert decay["weight_decay"] == 0.05 and plain["weight_decay"] == 0
    decayed, spared = ({names[id(p)] for p in g["params"]} for g in (decay, plain))
    assert decayed | spared == set(names.values()) and not decayed & spared
    assert spared == {n for n in names.values() if n.endswith(("bias", "_token")) or "norm" in n}


@pytest.mark.parametrize("fast, chosen", [(0.5, "bfloat16"), (0.95, "float32"), (2.0, "float32")])
def test_precision_is_what_is_clearly_faster(monkeypatch, fast, chosen):
    clock = [0.0]

    def one_pass(dtype): clock[0] += fast if dtype == torch.bfloat16 else 1.0
    monkeypatch.setattr(u, "time", types.SimpleNamespace(perf_counter=lambda: clock[0]))
    assert u.choose_precision("auto", torch.device("cpu"), one_pass) == chosen
    assert u.choose_precision("float32", torch.device("cpu"), None) == "float32"   # named: not timed


def test_precision_while_a_neighbour_is_busy(monkeypatch):
    """For half of the passes everything takes four times as long."""
    clock, passes = [0.0], iter(range(99))

    def one_pass(dtype): clock[0] += (4 if next(passes) >= 6 else 1) * (0.5 if dtype == torch.bfloat16 else 1)
    monkeypatch.setattr(u, "time", types.SimpleNamespace(perf_counter=lambda: clock[0]))
    assert u.choose_precision("auto", torch.device("cpu"), one_pass) == "bfloat16"


def test_a_type_that_memory_does_not_hold_is_not_chosen():
    def one_pass(dtype):
        if dtype == torch.float32: raise torch.OutOfMemoryError("CUDA out of memory.")
    assert u.choose_precision("auto", torch.device("cpu"), one_pass) == "bfloat16"


def test_a_gpu_without_bfloat16_is_offered_float16(monkeypatch):
    tried = []
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    u.choose_precision("auto", torch.device("cuda"), tried.append)
    assert set(tried) == {torch.float32, torch.float16}


@pytest.mark.parametrize("wanted, device, steps, on", [
    ("on", "cpu", 1, True), ("off", "cuda", 10 ** 6, False), ("auto", "cuda", 2000, True),
    ("auto", "cuda", 1999, False), ("auto", "cpu", 10 ** 6, False), ("auto", "cuda:1", 2000, False)])
def test_compile_where_it_pays(wanted, device, steps, on, monkeypatch):
    """On the second GPU it cannot: it is of an old kind."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda gpu: (6, 1) if gpu.index else (7, 0))
    monkeypatch.setattr(u, "no_compile", lambda device: "")
    assert u.wants_compile(wanted, torch.device(device), steps) is on


def test_compile_where_there_is_no_compiler(tmp_path, monkeypatch, capsys):
    """auto goes on without it, on all processes if one has none; one who wants it is told before anything is
    decided; and a later --compile counts, whatever was chosen before."""
    def broken(*_): raise RuntimeError("Failed to find C compiler\nmore")
    monkeypatch.setattr(torch, "compile", lambda function: broken)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda gpu: (7, 0))
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert u.no_compile(cpu) == "Failed to find C compiler"
    with monkeypatch.context() as patch:
        patch.setattr(u, "no_compile", lambda device: "no compiler")
        assert u.wants_compile("auto", gpu, 2000) is False
        assert capsys.readouterr().out == "torch.compile does not work here (no compiler); goes on without it\n"
        assert not u.wants_compile("auto", cpu, 2000) and not u.wants_compile("off", gpu, 2000)
        assert capsys.readouterr().out == ""
    def run(switch): return u.Run(str(tmp_path), train_pretrain.Settings(compile=switch), {}, 0)
    made = run("on")
    with pytest.raises(u.InputError, match="^--compile on: .* does not work here \\(Failed to find C compiler\\)$"):
        made.decide_compile("on", cpu, 1)
    assert "compile" not in json.loads((tmp_path / "config.json").read_text())
    monkeypatch.setattr(u, "no_compile", lambda device: "")
    assert made.decide_compile("auto", gpu, 2000) is True
    made.lock.close()
    (tmp_path / "log.jsonl").touch()
    again = run("off")                                                     # is not refused
    assert again.decide_compile("auto", cpu, 1) is True                    # what auto chose is kept
    assert again.decide_compile("off", gpu, 2000) is False and again.decide_compile("on", cpu, 1) is True
    monkeypatch.setattr(u, "from_all_ranks", lambda why: [why, "no compiler"])
    assert u.wants_compile("auto", gpu, 2000) is False


def test_float32_is_not_rounded_to_fewer_digits(monkeypatch):
    """As convolutions are on a GPU by torch's default, and products in some containers."""
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("high")
    u.compute_with(0)
    assert torch.get_float32_matmul_precision() == "highest" and not torch.backends.cudnn.allow_tf32


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *a, **k: None)
    monkeypatch.setenv("RANK", "2"), monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(u.InputError, match="^--nproc_per_node: more processes than the 2 GPUs here$"):
        u.setup_distributed("cuda")


def test_gradients_travel_with_the_last_micro_batch_only():
    """DistributedDataParallel keeps gradients at home inside its no_sync()."""
    inside = []

    class Model(torch.nn.Module):
        @contextlib.contextmanager
        def no_sync(self):
            inside.append(True)
            yield
            inside.pop()
    assert [(batch, bool(inside)) for batch in u.micro_steps(Model(), ["a", "b", "c"])] == [
        ("a", True), ("b", True), ("c", False)]
    assert list(u.micro_steps(part(3), ["a", "b"])) == ["a", "b"]           # one process


def test_autocast_only_below_float32():
    for dtype in (torch.float32, torch.bfloat16):
        with u.autocast(torch.device("cpu"), dtype): product = torch.ones(2, 2) @ torch.ones(2, 2)
        assert product.dtype == dtype


def test_one_process_on_the_cpu(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert u.setup_distributed("cpu") == (0, 1, torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert u.setup_distributed("auto") == (0, 1, torch.device("cpu"))
    with pytest.raises(u.InputError, match="no CUDA device"): u.setup_distributed("cuda")
    assert u.mean_over_processes(torch.tensor([3.0])).tolist() == [3]


# ==========================================================================================================
# Files
# ==========================================================================================================
def failing(path):
    path.write_bytes(b"half of the new")
    raise OSError(28, "No space left on device")


def into_dev_full(path):
    with open("/dev/full", "w") as file: file.write("x")


@pytest.mark.parametrize("write", [failing, into_dev_full])
def test_a_failed_write_keeps_the_old_file(tmp_path, write):
    path = tmp_path / "a.json"
    with pytest.raises(u.InputError, match="a.json.*No space left.*nothing was saved"):
        u.write_atomically(path, write)
    assert list(tmp_path.iterdir()) == []
    u.write_json(path, {"a": 1})
    with pytest.raises(u.InputError, match="a.json.*No space left.*previous one is intact"):
        u.write_atomically(path, write)
    assert json.loads(path.read_text()) == {"a": 1} and list(tmp_path.iterdir()) == [path]


@pytest.fixture
def small_disk():
    """No file may grow beyond 20,000 bytes: what a full disk does to a writer in the middle of its work."""
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("values", [2_100, 5_100, 100_000])    # the limit falls on different writes
@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_a_full_disk_keeps_the_old_checkpoint(tmp_path, small_disk, kind, values):
    path, large = tmp_path / "checkpoint.pt", np.random.default_rng(0).random(values)
    save = {"torch": lambda p, x: torch.save({"settings": {}, "w": torch.from_numpy(x)}, p),
            "numpy": lambda p, x: np.save(open(p, "wb"), x)}[kind]
    u.write_atomically(path, lambda p: save(p, large[:10]))
    old = path.read_bytes()
    if values > 2_500:
        with pytest.raises(u.InputError, match="checkpoint.pt.*previous one is intact") as error:
            u.write_atomically(path, lambda p: save(p, large))
        assert "\n" not in str(error.value) and path.read_bytes() == old
    else: u.write_atomically(path, lambda p: save(p, large))
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_on_the_disk_before_it_takes_the_name(tmp_path, monkeypatch):
    order, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: order.append("sync") or fsync(file))
    monkeypatch.setattr(os, "replace", lambda a, b: order.append("rename") or replace(a, b))
    u.write_json(tmp_path / "a.json", [1])
    assert order == ["sync", "rename"]


def test_an_error_without_a_text_is_reported_too(tmp_path):
    def write(path): raise OSError
    with pytest.raises(u.InputError, match="a.json"): u.write_atomically(tmp_path / "a.json", write)


def test_checkpoint_round_trip(tmp_path):
    state = {"settings": {"a": 1}, "w": torch.randn(3)}
    u.write_atomically(tmp_path / "c.pt", lambda p: torch.save(state, p))
    assert torch.equal(u.read_checkpoint(tmp_path / "c.pt")["w"], state["w"])


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"\x80\x04.", b"PK\x03\x04 and no more"])
def test_garbage_is_no_checkpoint(tmp_path, content):
    (tmp_path / "c.pt").write_bytes(content)
    with pytest.raises(u.InputError, match="c.pt: not a readable checkpoint") as error:
        u.read_checkpoint(tmp_path / "c.pt")
    assert "\n" not in str(error.value)


def test_other_checkpoints_are_refused(tmp_path):
    with pytest.raises(u.InputError, match="x.pt: no such checkpoint"): u.read_checkpoint(tmp_path / "x.pt")
    with pytest.raises(u.InputError, match="not a readable checkpoint"): u.read_checkpoint(tmp_path)
    for state in ({"model": {}}, [1], torch.ones(2)):
        torch.save(state, tmp_path / "c.pt")
        with pytest.raises(u.InputError, match="c.pt: not a checkpoint of this project"):
            u.read_checkpoint(tmp_path / "c.pt")
    torch.save({"settings": {}, "path": types.SimpleNamespace()}, tmp_path / "c.pt")  # not plain
    with pytest.raises(u.InputError, match="not a readable checkpoint"): u.read_checkpoint(tmp_path / "c.pt")


def part(D): return torch.nn.Sequential(torch.nn.Linear(D, 2), torch.nn.Linear(2, 2))


def test_load_parts():
    ours, theirs = part(3), part(3)
    u.load_parts("c.pt", {"encoder": theirs.state_dict(), "step": 3}, encoder=ours)
    for a, b in zip(ours.parameters(), theirs.parameters()): assert torch.equal(a, b)


@pytest.mark.parametrize("state, says", [
    ({"decoder": {}}, r"c.pt: holds no encoder"),
    ({"encoder": part(4).state_dict()}, r"c.pt: encoder.0.weight is \(2, 4\) in the file and \(2, 3\) here"),
    ({"encoder": part(3)[:1].state_dict()}, r"encoder.1.(weight|bias) is nothing in the file and \(2,"),
    ({"encoder": part(3).state_dict() | {"2.gamma": torch.ones(5)}}, r"encoder.2.gamma is \(5,\).*nothing")])
def test_load_parts_names_the_key_and_both_shapes(state, says):
    with pytest.raises(u.InputError, match=says): u.load_parts("c.pt", state, encoder=part(3))


# ==========================================================================================================
# Settings
# ==========================================================================================================
@dataclasses.dataclass
class Settings:
    preset: str = "tiny"          # sizes: tiny, large
    variant: str = "full"         # row of the table
    out: str = ""                 # run folder
    width: int = 8                # width of f^E, 100 % of it (Table 5)
    lr: float = 1e-3              # learning rate (paper Sec. 7)
    norm_pix: bool = False        # pixels normalised per patch
    save_every: int = 10          # steps between checkpoints


PRESETS = {"tiny": {}, "large": {"width": 64, "lr": 5e-4}}
VARIANTS = {"full": {}, "slow": {"lr": 1e-5, "norm_pix": True}}


def settings(*arguments):
    return u.parse_settings(Settings, "what it does", PRESETS, VARIANTS, list(arguments))


def test_settings_preset_then_variant_then_flags():
    assert settings() == Settings()
    large = settings("--preset", "large")
    assert (large.preset, large.width, large.lr) == ("large", 64, 5e-4)
    both = settings("--variant", "slow", "--preset", "large")
    assert (both.width, both.lr, both.norm_pix) == (64, 1e-5, True)
    mine = settings("--preset", "large", "--variant", "slow", "--lr", "0.5", "--no-norm-pix", "--width", "3")
    assert (mine.width, mine.lr, mine.norm_pix, mine.variant) == (3, 0.5, False, "slow")
    assert settings("--lr", "1e-3", "--preset", "large").lr == 1e-3   # a flag that repeats the default


@pytest.mark.parametrize("arguments", [["--unknown", "1"], ["--preset", "huge"], ["--variant", "none"],
                                       ["stray"], ["--width", "wide"], ["--lr"], ["--norm-pix", "5"]])
def test_unknown_flags_exit_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop: settings(*arguments)
    assert stop.value.code == 2 and "error:" in capsys.readouterr().err


def test_help_is_the_comment_behind_the_field(capsys):
    with pytest.raises(SystemExit) as stop: settings("-h")
    text = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert stop.value.code == 0 and "what it does" in text
    for comment in ("--width INT width of f^E, 100 % of it (Table 5) [8", "learning rate (paper Sec. 7) [0.001",
                    "pixels normalised per patch [False]", "--save-every INT steps between checkpoints [10]"):
        assert comment in text, comment


def test_script_turns_input_errors_into_one_line(capsys):
    def fails(): raise u.InputError("a.npy: truncated")
    def stopped(): raise KeyboardInterrupt
    def breaks(): raise ValueError("a bug of ours: its traceback is wanted")
    for main, code in ((fails, 2), (stopped, 130), (lambda: 0, 0), (lambda: 130, 130)):
        with pytest.raises(SystemExit) as stop: u.run_script(main)
        assert stop.value.code == code
    assert capsys.readouterr().err == "error: a.npy: truncated\n"
    with pytest.raises(ValueError): u.run_script(breaks)


def test_a_full_gpu_is_one_line_and_one_of_several_processes_ends_at_once(capsys, monkeypatch):
    def too_large(): raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
    ended = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(os, "_exit", ended.append)
    for main in (lambda: 0, too_large): u.run_script(main)
    assert ended == [0, 2]
    assert re.match(r"error: the GPU's memory is full \(CUDA out of .*--micro-batch", capsys.readouterr().err)


# ==========================================================================================================
# Run folders
# ==========================================================================================================
def run(folder, rank=0, facts=None, **changes):
    return u.Run(str(folder), Settings(**changes), facts or {"n": 5}, rank)


def test_run_writes_its_settings_and_can_be_taken_up_again(tmp_path):
    first = run(tmp_path / "deep" / "a")
    config = json.loads((tmp_path / "deep" / "a" / "config.json").read_text())
    assert config["settings"] == dataclasses.asdict(Settings()) and config["facts"]["n"] == 5
    assert config["facts"]["torch"] == torch.__version__ and config["facts"]["threads"] == 1
    first.lock.close()                                                     # as when a process ends
    assert run(tmp_path / "deep" / "a").config == config


def test_second_holder_is_refused(tmp_path):
    first = run(tmp_path)
    with pytest.raises(u.InputError, match="another run is at work"): run(tmp_path)
    first.lock.close()
    run(tmp_path)


@pytest.mark.parametrize("changes, says", [
    ({"width": 9}, "width: 8 there, 9 now"), ({"facts": {"n": 6}}, "n: 5 there, 6 now"),
    ({"norm_pix": True}, "norm_pix: False there, True now"),
    ({"lr": 2e-3, "width": 9}, "width: 8 there, 9 now; lr: 0.001 there, 0.002 now")])
def test_other_settings_are_refused_with_the_difference(tmp_path, changes, says):
    run(tmp_path).lock.close()
    (tmp_path / "log.jsonl").touch()                                       # something was done
    with pytest.raises(u.InputError, match="other settings") as error: run(tmp_path, **changes)
    assert says in str(error.value) and str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_other_settings_begin_anew_where_nothing_is_saved_yet(tmp_path):
    """As after the advice of a full GPU at the first step: another --micro-batch, in the same folder."""
    first = run(tmp_path)
    first.decide("precision", lambda: "float32")
    first.lock.close()
    again = run(tmp_path, width=9)
    assert again.config["settings"]["width"] == 9 and "precision" not in again.config
    assert json.loads((tmp_path / "config.json").read_text()) == again.config


def test_a_checksum_needs_no_memory(tmp_path):
    (tmp_path / "large").write_bytes(bytes(range(256)) * 2 ** 16)
    tracemalloc.start()
    assert u.file_checksum(tmp_path / "large") == f"{zlib.crc32((tmp_path / 'large').read_bytes()):08x}"
    tracemalloc.reset_peak()
    u.file_checksum(tmp_path / "large")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 ** 22                                                  # of 16 MiB


def test_settings_that_do_not_change_the_result_are_free(tmp_path):
    run(tmp_path).lock.close()
    (tmp_path / "log.jsonl").touch()
    run(tmp_path, save_every=99, out="elsewhere")


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("in the way")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(u.InputError, match="cannot hold a run"): run(folder)


def test_other_ranks_write_nothing(tmp_path):
    run(tmp_path).lock.close()
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    other = run(tmp_path, rank=1)
    module, other.config = part(3), {}                                     # rank 0 would have sent its config
    other.save("checkpoint.pt", Settings(), torch.optim.AdamW(module.parameters()), {"encoder": module})
    other.log(step=1), other.decide("precision", lambda: "float32")
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_decision_is_made_once(tmp_path):
    first, calls = run(tmp_path), []
    assert first.decide("precision", lambda: calls.append(1) or "bfloat16") == "bfloat16" and calls == [1]
    first.lock.close()
    again = run(tmp_path)
    assert again.decide("precision", lambda: 1 / 0) == "bfloat16"


def trained(module) -> torch.optim.Optimizer:
    """AdamW after one step, so that it has moments to lose."""
    optimiser = torch.optim.AdamW(module.parameters(), lr=0.1)
    module(torch.randn(4, 3)).sum().backward()
    optimiser.step()
    return optimiser


def test_resume_restores_weights_and_optimiser_and_cuts_the_log(tmp_path):
    """Steps after the checkpoint are done again and logged again; those of another stage stay."""
    first, module, fresh = run(tmp_path), part(3), part(3)
    optimiser, fresh_optimiser = trained(module), torch.optim.AdamW(fresh.parameters(), lr=0.1)
    assert first.resume("checkpoint.pt", fresh_optimiser, {"encoder": fresh})["step"] == 0   # fresh
    first.log(stage="segmentation", step=99, L_seg=1.0)
    for step in (1, 2, 3, 4): first.log(stage="pretraining", step=step, loss=float(step))
    first.save("checkpoint.pt", Settings(), optimiser, {"encoder": module}, stage="pretraining", step=2)
    first.lock.close()
    state = run(tmp_path).resume("checkpoint.pt", fresh_optimiser, {"encoder": fresh})
    assert state["step"] == 2 and state["settings"] == dataclasses.asdict(Settings())
    for a, b in zip(module.parameters(), fresh.parameters()): assert torch.equal(a, b)
    moments = [o.state_dict()["state"][0]["exp_avg"] for o in (optimiser, fresh_optimiser)]
    assert torch.equal(*moments) and moments[0].any()
    logged = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [f"{line['stage']} {line['step']}" for line in logged] == [
        "segmentation 99", "pretraining 1", "pretraining 2"]


@pytest.mark.parametrize("begun, resumed", [(False, True), (True, False)])
def test_resume_on_another_device(tmp_path, begun, resumed):
    """f^S's AdamW is fused on CUDA alone: a resumed one is what this machine wants, and takes its step."""
    first, module, fresh = run(tmp_path), part(3), part(3)
    optimiser, fresh_optimiser = (torch.optim.AdamW(m.parameters(), fused=kind)
                                  for m, kind in ((module, begun), (fresh, resumed)))
    module(torch.randn(4, 3)).sum().backward(), optimiser.step()
    first.save("checkpoint.pt", Settings(), optimiser, {"encoder": module}, stage="a", step=1)
    first.resume("checkpoint.pt", fresh_optimiser, {"encoder": fresh})
    assert {group["fused"] for group in fresh_optimiser.param_groups} == {resumed}
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    guard = u.Guard(fresh_optimiser, scaler, fresh, torch.zeros(1), None, None)
    guard.start()
    loss = fresh(torch.randn(4, 3)).square().sum()
    loss.backward(), guard.step(1, loss)
    assert fresh_optimiser.state_dict()["state"][0]["step"] == 2


def test_another_machine_is_said_and_may_go_on(tmp_path, capsys):
    """Runs from before machines were noted say nothing."""
    run(tmp_path, facts={"machine": "one"}).lock.close()
    run(tmp_path, facts={"machine": "one"}).lock.close()
    assert capsys.readouterr().out == ""
    run(tmp_path, facts={"machine": "other"})
    assert capsys.readouterr().out == "begun on one, goes on on other: not bit for bit the same\n"
    run(tmp_path / "old", facts={"n": 5}).lock.close()
    assert run(tmp_path / "old", facts={"n": 5, "machine": "other"}).config["facts"]["n"] == 5
    assert capsys.readouterr().out == ""
    assert u.machine(torch.device("cpu"))["machine"].startswith(os.uname().machine + " ")


def test_a_gpu_goes_on_with_another_number_of_cpu_threads(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H200")
    def claim(device): run(tmp_path / device, facts=u.machine(torch.device(device))).lock.close()
    for device in ("cpu", "cuda"):
        claim(device)
        (tmp_path / device / "checkpoint.pt").touch()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    claim("cuda")
    with pytest.raises(u.InputError, match="threads: 1 there, 99 now"): claim("cpu")


def test_other_code_is_said_and_may_go_on(tmp_path, monkeypatch, capsys):
    """And is no difference between settings; a run from before code was noted says nothing."""
    now = u.code_checksum()
    assert run(tmp_path).config["facts"]["code"] == now and re.fullmatch("[0-9a-f]{8}", now)
    for name, same in (("udapose.py", False), ("train_finetune.py", False), ("evaluate.py", True)):
        for path in Path(u.__file__).parent.glob("*.py"): shutil.copy(path, tmp_path)
        with open(tmp_path / name, "a") as file: file.write("# edited\n")
        with monkeypatch.context() as patch:
            patch.setattr(u, "__file__", str(tmp_path / "udapose.py"))
            assert (u.code_checksum() == now) == same
    monkeypatch.setattr(u, "code_checksum", lambda: "other")
    run(tmp_path).lock.close()
    assert "begun with other code than this" in capsys.readouterr().out
    config = json.loads((tmp_path / "config.json").read_text())
    del config["facts"]["code"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    run(tmp_path)
    assert capsys.readouterr().out == ""


def test_the_clock_of_a_stage_goes_on(tmp_path, monkeypatch):
    """A second stage of the same run starts at 0, a resumed one where it was."""
    clock, module = [100.0], part(3)
    monkeypatch.setattr(u, "time", types.SimpleNamespace(perf_counter=lambda: clock[0]))
    first, optimiser = run(tmp_path), trained(module)
    first.resume("a.pt", optimiser, {"net": module}, "a")
    clock[0] = 130.0
    first.save("a.pt", Settings(), optimiser, {"net": module}, stage="a", step=1)
    first.resume("b.pt", optimiser, {"net": module}, "b")
    clock[0] = 131.0
    assert first.seconds() == 1
    assert first.resume("a.pt", optimiser, {"net": module}, "a")["seconds"] == 30 == first.seconds()


def test_resume_refuses_another_architecture(tmp_path):
    module, other = part(3), part(4)
    run(tmp_path).save("checkpoint.pt", Settings(), trained(module), {"encoder": module}, stage="a", step=2)
    with pytest.raises(u.InputError, match="checkpoint.pt: encoder.0.weight"):
        run(tmp_path).resume("checkpoint.pt", torch.optim.AdamW(other.parameters()), {"encoder": other})


def test_resume_after_a_line_that_was_cut(tmp_path):
    """A full disk or a kill can leave half a line at the end of the log: it belongs to no finished step."""
    first, module = run(tmp_path), part(3)
    optimiser = trained(module)
    for step in (1, 2): first.log(stage="pretraining", step=step)
    first.save("checkpoint.pt", Settings(), optimiser, {"encoder": module}, stage="pretraining", step=2)
    whole = (tmp_path / "log.jsonl").read_text()
    (tmp_path / "log.jsonl").write_text(whole + '{"stage": "pretr')
    first.resume("checkpoint.pt", optimiser, {"encoder": module})
    assert (tmp_path / "log.jsonl").read_text() == whole


def test_a_log_on_a_full_disk_is_one_line(tmp_path):
    first = run(tmp_path)
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    with pytest.raises(u.InputError, match="log.jsonl.*No space left"): first.log(step=1)


# ==========================================================================================================
# Stopping and progress
# ==========================================================================================================
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_second_stops(number, monkeypatch):
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        stop = u.StopSignal()
        assert not stop.requested() and signal.getsignal(number) == stop.note
        monkeypatch.setattr(u.time, "monotonic", lambda: clock[0])
        clock = [1000.0]
        signal.raise_signal(number)
        assert stop.requested()
        clock[0] += 2.9
        signal.raise_signal(number)                    # the same one, by way of torchrun
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested() and stop.number == number
        clock[0] += 0.2
        with pytest.raises(KeyboardInterrupt): signal.raise_signal(number)
    finally:
        for n, handler in handlers.items(): signal.signal(n, handler)


def test_a_signal_while_processes_agree_is_not_lost(monkeypatch):
    """It comes when this one's answer is already on its way, and counts at the next step."""
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(u, "distributed", lambda: True)
    try:
        stop, come = u.StopSignal(), [lambda: signal.raise_signal(signal.SIGTERM)]
        monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_: come.pop()() if come else None)
        assert not stop.requested() and stop.requested() and stop.status == 143
    finally:
        for n, handler in handlers.items(): signal.signal(n, handler)


def test_progress_line(monkeypatch, capsys):
    clock = [100.0]
    monkeypatch.setattr(u, "time", types.SimpleNamespace(perf_counter=lambda: clock[0]))
    progress, quiet = (u.Progress("MAE", 100, 32, start=10, rank=rank) for rank in (0, 1))
    clock[0] = 105.0
    progress.show(15, {"loss": 1.0})                                       # too early for a line
    clock[0] = 120.0
    progress.show(30, {"loss": 0.25}), quiet.show(30, final=True)
    assert capsys.readouterr().out == "MAE  30/100 | loss 0.25 | 32 images/s | 1:10 left\n"
    progress.show(31, final=True)
    assert "31/100" in capsys.readouterr().out                             # the last line always comes
