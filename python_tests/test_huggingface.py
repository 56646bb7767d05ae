"""Hugging Face data sets: splits, forms on disk, classes, refusals."""

import numpy as np
import pytest
from PIL import Image
from test_streams import COUNT, config, dataset, pixels_of, refusal, saved

from vqkernels.train.data.images import load_images

datasets = pytest.importorskip("datasets")


def test_splits_of_a_data_set(tmp_path):
    parts = {"train": dataset(range(12)), "test": dataset(range(20, 23)), "other": dataset(range(11))}
    data = saved(tmp_path / "set", datasets.DatasetDict(parts))
    images = load_images(config(data))
    assert len(images.training) == 12 and images.held_out[0].name == "set/test 0"
    assert len(load_images(config(f"{data}:other")).training) == 11
    itself = load_images(config(f"{data}:test"))
    assert len(itself.training) == 2 and len(itself.held_out) == 1
    assert "nothing, not among train, test, other" in refusal(f"{data}:nothing")
    data = saved(tmp_path / "two", datasets.DatasetDict({"a": parts["train"], "b": parts["test"]}))
    assert "a, b in" in refusal(data) and ":SPLIT" in refusal(data)


@pytest.mark.parametrize("form", ["file", "folder", "images"])
def test_data_sets_that_were_not_saved(tmp_path, monkeypatch, form):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    folder = tmp_path / "set"
    folder.mkdir()
    if form == "images":
        for number in range(COUNT):
            (folder / "abc"[number % 3]).mkdir(exist_ok=True)
            Image.fromarray(pixels_of(number)).save(folder / "abc"[number % 3] / f"{number}.png")
    else:
        dataset().to_parquet(folder / "train.parquet")
    images = load_images(config(f"hf:{folder}{'/train.parquet' if form == 'file' else ''}"))
    assert len(images.training) == COUNT - 2
    assert images.labels == (("a", "b", "c") if form == "images" else ("ant", "bee", "cow"))


@pytest.mark.parametrize(
    ("label", "kind", "names"),
    [
        (lambda number: "xyz"[number % 3], datasets.Value("string"), ("x", "y", "z")),
        (lambda number: number % 3, datasets.Value("int64"), ("0", "1", "2")),
        (lambda number: number % 3 - 1, datasets.Value("int64"), None),
        (lambda number: 0.5, datasets.Value("float32"), None),
        (None, None, None),
    ],
)
def test_classes_of_data_sets(tmp_path, label, kind, names):
    kinds = label and datasets.Features({"image": datasets.Image(), "label": kind})
    images = load_images(config(saved(tmp_path / "set", dataset(label=label, kind=kinds))))
    assert images.labels == names
    assert [s.label for s in images.walk("train", None)][:3] == ([0, 1, 2] if names else [None] * 3)


def test_rows_that_were_selected_and_formatted_before(tmp_path):
    chosen = dataset().select([5, 3, 11, 8]).with_format("numpy")
    images = load_images(config(saved(tmp_path / "set", chosen)))
    assert [s.label for s in images.walk("train", 16)] == [2, 0, 2]
    assert np.array_equal(images.training[1].read(), pixels_of(3))


def test_refusals_of_data_sets(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for nowhere in (tmp_path / "nowhere", "./nowhere:train", "some/where/else", ""):
        assert "no such folder" in refusal(f"hf:{nowhere}")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert str(empty) in refusal(f"hf:{empty}")
    (empty / "train.parquet").write_bytes(b"PAR1 no more")
    assert str(empty) in refusal(f"hf:{empty}")
    columns = datasets.Dataset.from_dict({"number": [1, 2]})
    assert "none among number" in refusal(saved(tmp_path / "columns", columns))
    column = dataset(label=None, column="other")
    assert len(load_images(config(saved(tmp_path / "column", column))).training) == COUNT - 2
    gap = datasets.Dataset.from_dict(
        {"image": [None, None]}, features=datasets.Features({"image": datasets.Image()})
    )
    assert "none in gap/train 0" in refusal(saved(tmp_path / "gap", gap))
    bad = datasets.Dataset.from_dict(
        {"image": [{"bytes": b"no picture", "path": None}] * 2},
        features=datasets.Features({"image": datasets.Image()}),
    )
    assert "bad/train 0" in refusal(saved(tmp_path / "bad", bad))
    data = saved(tmp_path / "plain", dataset())
    assert data in refusal(data.removeprefix("hf:"))
