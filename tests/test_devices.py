"""The scripts on a device that is not the CPU, where there is none: on tensors with a shape but no values.

On that device ("meta"), every operation has to find its tensors on one device. A step must not wait for a
value from there.
"""

import collections
import contextlib
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, finetune, pretrain
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from support import run as runs

META, CPU = torch.device("meta"), torch.device("cpu")
OURS = ROOT, ROOT / "support", ROOT / "tests"


class OneDevice(TorchDispatchMode):
    """Refuse operations on tensors of two devices, except copies.

    What the host asks META for is counted under the function that asks. The answer is 1 for every element of
    a copy, and 0 for a single number.
    """

    def __init__(self):
        super().__init__()
        self.waits = collections.Counter()

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        named, name = named or {}, function.overloadpacket.__name__
        tensors = [t for t in tree_leaves((arguments, named)) if isinstance(t, torch.Tensor)]
        asked = name == "_local_scalar_dense" or (name == "_to_copy" and named.get("device") == CPU)
        if asked and tensors[0].device == META:
            frame = sys._getframe(1)
            while Path(frame.f_code.co_filename).parent not in OURS:
                frame = frame.f_back
            self.waits[frame.f_code.co_name] += 1
            dtype = named.get("dtype") or tensors[0].dtype
            if name == "_to_copy":
                return torch.ones(tensors[0].shape, dtype=dtype)
            return torch.zeros((), dtype=dtype).item()
        devices = {t.device for t in tensors if t.ndim}  # a single number may be on the CPU
        assert len(devices) < 2 or name in ("_to_copy", "copy_"), f"{function} of {devices}"
        return function(*arguments, **named)


@pytest.fixture
def waits(monkeypatch):
    """Run everything on META. What META lacks is left out: autocast, fused AdamW, checkpoints with values."""
    adamw = torch.optim.AdamW
    monkeypatch.setattr(runs, "setup_distributed", lambda device: (0, 1, META))
    monkeypatch.setattr(torch, "autocast", lambda *a, **k: contextlib.nullcontext())
    monkeypatch.setattr(torch.optim, "AdamW", lambda *a, fused, **k: adamw(*a, **k))
    monkeypatch.setattr(runs.Run, "save", lambda *a, **k: None)
    with OneDevice() as mode:
        yield mode.waits


def test_operations_on_two_devices_are_refused_and_waits_are_seen(waits):
    a, b = torch.ones(2, 2, device=META), torch.ones(2, 2)
    for mixed in (lambda: a + b, lambda: torch.where(b > 0, a, a), lambda: a.gather(1, b.long())):
        with pytest.raises((AssertionError, RuntimeError)):
            mixed()
    assert (a * torch.tensor(2.0)).device == META and not waits
    assert a.cpu().tolist() == [[1, 1], [1, 1]] and float(a.sum()) == 0
    assert waits == {"test_operations_on_two_devices_are_refused_and_waits_are_seen": 2}


FEW = ["--log-every", "99", "--save-every", "99", "--seg-steps", "2", "--epochs"]


@pytest.mark.parametrize(
    "more, stages", [("", 2), ("--variant mae --norm-pix --micro-batch 8 --checkpointing", 1)]
)
def test_pretraining(waits, sets, tmp_path, more, stages):
    """Two steps of f^S and two of the autoencoder: values are asked for where the last step is logged."""
    pretrain(sets, tmp_path / "run", *FEW, "0.4", *more.split())
    assert waits == {"mean_losses": 2 * stages} | ({"predict_masks": 1} if stages == 2 else {})


@pytest.mark.parametrize(
    "more",
    ["", "--no-expanded --micro-batch 4 --checkpointing", "--variant ddc", "--variant dan", "--variant dann"],
)
def test_finetuning(waits, sets, pretrained, tmp_path, more):
    """Two steps: values are asked for at the last one, and for the error on the validation set."""
    few = [*FEW[:4], "--validate-every", "99", "--epochs", "0.67"]
    finetune(sets, tmp_path / "run", "" if "variant" in more else pretrained, *few, *more.split())
    assert waits == {"mean_losses": 2, "validate": 1}
