"""What the cells of a comparison share: the crops they are measured on, and the lock of their folder."""

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vqkernels.train.comparison.cell import held_out_crops
from vqkernels.train.data.images import ImageSet, Picture

ROOT = Path(__file__).resolve().parents[1]


class TestCrops:
    @pytest.mark.parametrize("count", [1, 7, 512, 1300])
    def test_crops_go_round_few_pictures_and_through_many(self, count):
        tall = [np.full((16, 20, 3), 255 * n // count, dtype=np.uint8) for n in range(count)]
        pictures = [Picture(str(n), 16, 20, pixels=pixels) for n, pixels in enumerate(tall)]
        images = ImageSet(pictures[:1], pictures, crop=16, batch_size=1, factor=4, seed=0)
        crops = held_out_crops(images, 16)
        which = [n % count if count <= 512 else n * count // 512 for n in range(512)]
        shown = torch.tensor([float(tall[n][0, 0, 0]) for n in which]) / 127.5 - 1
        assert torch.equal(crops.amin((1, 2, 3)), shown) and torch.equal(crops.amax((1, 2, 3)), shown)


class TestLock:
    def test_windows_waits_by_trying_again(self, tmp_path, monkeypatch):
        tried = []

        def locking(descriptor, mode, count):
            tried.append((mode, count))
            if len(tried) < 3:
                raise PermissionError

        monkeypatch.setitem(sys.modules, "fcntl", None)
        monkeypatch.setitem(sys.modules, "msvcrt", SimpleNamespace(locking=locking, LK_NBLCK=2))
        spec = importlib.util.find_spec("vqkernels.train.checkpoints.lock")
        lock = importlib.util.module_from_spec(spec)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "platform", "win32")
            spec.loader.exec_module(lock)
        lock.PAUSE = 0
        with lock.locked(tmp_path / "lock"):
            assert tried == [(2, 1)] * 3

    def test_no_other_module_needs_what_windows_lacks(self):
        found = [p.name for p in (ROOT / "vqkernels").rglob("*.py") if "import fcntl" in p.read_text()]
        assert found == ["lock.py"]
