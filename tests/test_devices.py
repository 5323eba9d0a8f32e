"""The scripts on a device that is not the CPU, where there is none: on tensors with shape and device but no
values ("meta"). An operation finds its tensors on one device; a step waits for no value from there."""
import collections
import contextlib
import shutil
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import data
import evaluate
import udapose as u
from test_training import finetune, finetuned, pretrain, pretrained, sets  # noqa: F401

META, CPU = torch.device("meta"), torch.device("cpu")
OURS = Path(__file__).parent, Path(u.__file__).parent


class OneDevice(TorchDispatchMode):
    """Refuses operations on tensors of two devices, copies apart. What the host asks META for is noted by the
    function that asks, and answered: 1 for a copy, 0 for a number alone."""

    def __init__(self):
        super().__init__()
        self.waits = collections.Counter()

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        named, name = named or {}, function.overloadpacket.__name__
        tensors = [t for t in tree_leaves((arguments, named)) if isinstance(t, torch.Tensor)]
        asked = name == "_local_scalar_dense" or name == "_to_copy" and named.get("device") == CPU
        if asked and tensors[0].device == META:
            frame = sys._getframe(1)
            while Path(frame.f_code.co_filename).parent not in OURS: frame = frame.f_back
            self.waits[frame.f_code.co_name] += 1
            dtype = named.get("dtype") or tensors[0].dtype
            if name == "_to_copy": return torch.ones(tensors[0].shape, dtype=dtype)
            return torch.zeros((), dtype=dtype).item()
        devices = {t.device for t in tensors if t.ndim}  # a number may lie on the CPU
        assert len(devices) < 2 or name in ("_to_copy", "copy_"), f"{function} of {devices}"
        return function(*arguments, **named)


@pytest.fixture
def waits(monkeypatch):
    """Everything on META; what META lacks is left out: pinned memory, autocast, fused AdamW, checkpoints."""
    adamw = torch.optim.AdamW
    monkeypatch.setattr(u, "setup_distributed", lambda *_: (0, 1, META))
    monkeypatch.setattr(data, "read_rows", lambda array, rows, device: torch.from_numpy(array[rows]).to(device))
    monkeypatch.setattr(data, "to_device", lambda array, device: torch.from_numpy(array).to(device))
    monkeypatch.setattr(torch, "autocast", lambda *a, **k: contextlib.nullcontext())
    monkeypatch.setattr(torch.optim, "AdamW", lambda *a, fused, **k: adamw(*a, **k))
    monkeypatch.setattr(u.Run, "save", lambda *a, **k: None)
    with OneDevice() as mode: yield mode.waits


def test_operations_on_two_devices_are_refused_and_waits_are_seen(waits):
    a, b = torch.ones(2, 2, device=META), torch.ones(2, 2)
    for mixed in (lambda: a + b, lambda: torch.where(b > 0, a, a), lambda: a.gather(1, b.long())):
        with pytest.raises((AssertionError, RuntimeError)): mixed()
    assert (a * torch.tensor(2.0)).device == META and not waits
    assert a.cpu().tolist() == [[1, 1], [1, 1]] and float(a.sum()) == 0
    assert waits == {"test_operations_on_two_devices_are_refused_and_waits_are_seen": 2}


SLOW = ["--log-every", "99", "--save-every", "99"]


@pytest.mark.parametrize("more", [(), ("--variant", "mae"), ("--variant", "source-only", "--target", ""),
                                  ("--micro-batch", "4", "--checkpointing", "--norm-pix")])
def test_pretraining(waits, sets, tmp_path, more):  # noqa: F811
    """Four steps of f^S and seven of the autoencoder, or four of it: values are asked for at their ends."""
    assert pretrain(sets, tmp_path / "run", *SLOW, *more) == 0
    parts = [name for name, run in (("train_segmentation", not more or more[0] != "--variant"),
                                    ("train_autoencoder", True)) if run]
    assert waits == collections.Counter({"check": len(parts), "predict_masks": len(parts) - 1}) + \
        collections.Counter(parts)


@pytest.mark.parametrize("more", [(), ("--no-expanded", "--micro-batch", "4"), ("--checkpointing",),
                                  ("--variant", "scratch"), ("--variant", "ddc"), ("--variant", "dan"),
                                  ("--variant", "dann")])
def test_finetuning(waits, sets, pretrained, tmp_path, more):  # noqa: F811
    """Six steps; values are asked for at the last one, and for the error on the validation set."""
    init = "" if "--variant" in more else str(pretrained)
    assert finetune(sets, tmp_path / "run", init, *SLOW, "--validate-every", "99", *more) == 0
    assert waits == {"check": 1, "report": 1, "validate": 1}


def test_evaluation_and_its_pictures(waits, sets, pretrained, finetuned, tmp_path):  # noqa: F811
    photo = ["--image", str(tmp_path / "pictures/pck.png"), "--pictures", str(tmp_path)]
    tests = [f"--{name}-test={sets}/{name}_test" for name in ("source", "target")]
    for run in (pretrained, finetuned): shutil.copytree(run, tmp_path / run.name)
    assert evaluate.main([str(tmp_path), *tests]) == 0 and len(list((tmp_path / "pictures").iterdir())) == 5
    assert evaluate.main([str(finetuned), *photo]) == 0 and (tmp_path / "pck_pose.png").exists()
