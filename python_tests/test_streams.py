"""Streams: tar shards and Hugging Face data sets; their order, their shares, their classes, their refusals."""

import io
import itertools
import json
import sys
import tarfile
import time

import numpy as np
import pytest
import torch
from PIL import Image

from vqkernels.train.config import RunError, TrainConfig
from vqkernels.train.data import images as data_module
from vqkernels.train.data import shard_index
from vqkernels.train.data.images import load_images
from vqkernels.train.data.order import EpochOrder
from vqkernels.train.data.pictures import Picture
from vqkernels.train.data.prefetch import Prefetch

datasets = pytest.importorskip("datasets")
pytest.importorskip("webdataset")

COUNT = 23


def pixels_of(number, size=(20, 18)):
    return np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)


def encoded(pixels, kind="PNG"):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def write_shard(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            header = tarfile.TarInfo(name)
            header.size = len(content)
            archive.addfile(header, io.BytesIO(content))
    return path


def write_shards(folder, shards=1, count=COUNT, label=lambda number: ("cls", str(number % 3))):
    """Shards of `count` samples in all; picture i has the pixels of `pixels_of(i)`."""
    for shard, numbers in enumerate(np.array_split(np.arange(count), shards)):
        members = []
        for number in numbers:
            key = f"some/{number:04d}"
            members.append((f"{key}.png", encoded(pixels_of(number))))
            suffix, text = label(number) or ("txt", "a caption")
            members.append((f"{key}.{suffix}", text.encode()))
        write_shard(folder / f"{shard:03d}.tar", members)
    return folder


def features(names=("ant", "bee", "cow")):
    return datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(names))})


def dataset(numbers=range(COUNT), label=lambda number: int(number) % 3, kind=None, column="image"):
    content = {column: [{"bytes": encoded(pixels_of(n)), "path": None} for n in numbers]}
    if label is not None:
        content["label"] = [label(n) for n in numbers]
    kinds = kind or features() if label is not None else datasets.Features({column: datasets.Image()})
    return datasets.Dataset.from_dict(content, features=kinds)


def saved(folder, content):
    content.save_to_disk(folder)
    return f"hf:{folder}"


def config(data, **fields):
    return TrainConfig(**{"data": str(data), "crop": 16, "batch_size": 4, **fields})


def refusal(data, **fields):
    with pytest.raises(RunError) as caught:
        load_images(config(data, **fields))
    text = str(caught.value)
    assert " must " in text and "; got " in text and text.endswith(".") and "\n" not in text
    return text


@pytest.fixture(params=["tar", "tars", "hf"])
def stream(request, tmp_path):
    if request.param == "hf":
        return saved(tmp_path / "set", dataset())
    return write_shards(tmp_path / "shards", shards=1 if request.param == "tar" else 4)


@pytest.fixture(params=[data_module.KEEP_BYTES, 0])
def keep(request, monkeypatch):
    monkeypatch.setattr(data_module, "KEEP_BYTES", request.param)


@pytest.mark.usefixtures("keep")
def test_processes_share_the_same_batches_out(stream):
    images = load_images(config(stream))
    for step in (0, 3, 4, 5, 40):
        whole = images.batch(step)
        assert whole.shape == (4, 3, 16, 16) and whole.is_contiguous(memory_format=torch.channels_last)
        for world in (2, 4):
            parts = [load_images(config(stream)).batch(step, rank=rank, world=world) for rank in range(world)]
            assert torch.equal(torch.cat(parts), whole)


@pytest.mark.usefixtures("keep")
def test_any_step_resumes_without_a_state(stream):
    through = load_images(config(stream))
    batches = [through.batch(step) for step in range(14)]
    for step in (13, 7, 6):
        assert torch.equal(load_images(config(stream)).batch(step), batches[step])
    assert not torch.equal(load_images(config(stream, seed=1)).batch(0), batches[0])


def test_kept_pictures_change_no_batch(stream, monkeypatch):
    kept = load_images(config(stream))
    assert all(picture.pixels is not None for picture in kept.training)
    monkeypatch.setattr(data_module, "KEEP_BYTES", 0)
    lazy = load_images(config(stream))
    assert all(picture.pixels is None for picture in lazy.training)
    assert torch.equal(lazy.batch(8), kept.batch(8))
    assert [sample.name for sample in lazy.walk("train", 16)] == [
        sample.name for sample in kept.walk("train", 16)
    ]


def shown(images, crops):
    """Which training pictures `crops` crops show, of whole pictures and not augmented."""
    known = {sample.image.numpy().tobytes(): number for number, sample in enumerate(images.walk("train", 20))}
    batches = (images.batch(step) for step in itertools.count())
    rows = itertools.islice(itertools.chain.from_iterable(batches), crops)
    return [known[np.ascontiguousarray(row.numpy()).tobytes()] for row in rows]


def test_every_sample_appears_once_in_an_epoch(tmp_path):
    members = [(f"{number:04d}.png", encoded(pixels_of(number, (20, 20)))) for number in range(COUNT)]
    images = load_images(config(write_shard(tmp_path / "a.tar", members), crop=20, augment=False))
    count = len(images.training)
    assert count == COUNT - 2 and images.epoch_steps == 6
    seen = shown(images, 3 * count)
    epochs = [seen[start : start + count] for start in range(0, 3 * count, count)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


@pytest.mark.parametrize("count", [1, 7, 64, 100])
def test_an_order_of_runs_and_windows(count):
    order = EpochOrder(count, seed=3, run=8, window=32)
    for epoch in range(3):
        assert sorted(order.take(epoch * count, count)) == list(range(count))
    whole = order.take(0, 3 * count)
    for start in range(0, 3 * count, 5):
        assert np.array_equal(order.take(start, 2), whole[start : start + 2]) or start + 2 > 3 * count
    if count > 32:
        # samples of a window come from few runs, so they are read at about the same time
        assert len({int(sample) // 8 for sample in whole[:32]}) <= 5
        assert not np.array_equal(whole[:count], whole[count : 2 * count])
        assert not np.array_equal(whole[:count], EpochOrder(count, 4, 8, 32).take(0, count))


def test_a_process_decodes_its_own_samples_alone(stream, monkeypatch):
    monkeypatch.setattr(data_module, "KEEP_BYTES", 0)
    images = load_images(config(stream))
    read, decoded = Picture.read, []
    monkeypatch.setattr(Picture, "read", lambda self: decoded.append(self.name) or read(self))
    images.batch(100, rank=1, world=2)
    images.batch(100, rank=0, world=2)
    halves = list(decoded)
    images.batch(100)
    assert len(halves) == 4 and sorted(decoded[4:]) == sorted(halves)


def test_a_far_step_is_found_at_once(stream):
    images = load_images(config(stream))
    began = time.perf_counter()
    images.batch(10**5)
    order = EpochOrder(10**7, 0)
    order.take(10**12 + 5, 4)
    # without what came before it: going through 10^5 steps would take minutes
    assert time.perf_counter() - began < 5


def test_prefetching_changes_no_batch(stream):
    images = load_images(config(stream))
    with Prefetch(images, 1, 2) as ahead:
        for step in (0, 1, 2, 9, 10, 3, 3):
            assert torch.equal(ahead.batch(step), images.batch(step, rank=1, world=2))


def test_prefetching_raises_at_the_step_of_a_broken_sample(tmp_path, monkeypatch):
    broken = encoded(pixels_of(0))[:-400]
    path = write_shard(tmp_path / "a.tar", [("0.png", broken), ("1.png", broken), ("2.png", broken)])
    assert "a.tar/0.png" in refusal(path)
    monkeypatch.setattr(data_module, "KEEP_BYTES", 0)
    with Prefetch(load_images(config(path))) as ahead, pytest.raises(RunError, match=r"a\.tar/\d\.png"):
        ahead.batch(0)


def test_shards_are_held_out_by_tens(tmp_path):
    one = load_images(config(write_shards(tmp_path / "one")))
    assert [p.name for p in one.held_out] == ["000.tar/some/0009.png", "000.tar/some/0019.png"]
    few = load_images(config(write_shards(tmp_path / "few", shards=3)))
    assert {p.name.split("/")[0] for p in few.held_out} == {"002.tar"} and len(few.training) == 16
    many = load_images(config(write_shards(tmp_path / "many", shards=11)))
    assert {p.name.split("/")[0] for p in many.held_out} == {"009.tar"}
    assert torch.equal(next(many.validation()).image, next(many.walk("held_out", None)).image)
    assert [p.name for p in many.only(1).held_out] == [many.held_out[1].name]


def test_shards_of_one_name_give_their_samples_different_names(tmp_path):
    for folder in ("a", "b", "c"):
        write_shards(tmp_path / folder)
    names = [one.name for one in load_images(config(f"{tmp_path}/*/*.tar")).walk("train", 16)]
    assert len(set(names)) == len(names)


def test_patterns_name_shards(tmp_path):
    folder = write_shards(tmp_path / "shards", shards=4)
    for pattern in ("{000..003}.tar", "*.tar", "00{0,1,2,3}.tar", "{000..002}.tar::{}/003.tar"):
        images = load_images(config(f"{folder}/{pattern.replace('{}', str(folder))}"))
        assert len(images.training) + len(images.held_out) == COUNT
    assert "004.tar" in refusal(f"{folder}/{{000..004}}.tar")
    assert "no file" in refusal(f"{folder}/none*.tar") and "no file" in refusal(folder / "none.tar")


@pytest.mark.parametrize(
    ("label", "names"),
    [
        (lambda number: ("cls", f" {number % 3}\n"), ("0", "1", "2")),
        (lambda number: ("json", json.dumps({"label": int(number % 3), "width": 3})), ("0", "1", "2")),
        (lambda number: ("cls", "abc"[number % 3]), ("a", "b", "c")),
        (lambda number: ("json", json.dumps({"label": "abc"[number % 3]})), ("a", "b", "c")),
        (lambda number: ("json", json.dumps(["label"])), None),
        (lambda number: None if number == 5 else ("cls", "1"), None),
    ],
)
def test_classes_of_shards(tmp_path, label, names):
    images = load_images(config(write_shards(tmp_path / "shards", shards=2, label=label)))
    assert images.labels == names
    for part in ("train", "held_out"):
        for sample in images.walk(part, 16):
            expected = None if names is None else int(sample.name[-8:-4]) % 3
            assert sample.label == expected


@pytest.mark.usefixtures("keep")
def test_a_walk_shows_every_picture_once_from_the_middle(stream):
    images = load_images(config(stream))
    walked = list(images.walk("train", 16)) + list(images.walk("held_out", 16))
    assert len({sample.name for sample in walked}) == COUNT
    middles = {pixels_of(number)[2:18, 1:17].tobytes(): number for number in range(COUNT)}
    for sample in walked:
        pixels = ((sample.image + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
        assert middles.pop(np.ascontiguousarray(pixels).tobytes()) % 3 == sample.label
    shares = [[s.name for s in images.walk("train", 16, rank=rank, world=3)] for rank in range(3)]
    names = [sample.name for sample in images.walk("train", 16)]
    assert [shares[number % 3][number // 3] for number in range(len(names))] == names
    with pytest.raises(RunError, match="be at least 19 pixels"):
        next(images.walk("train", 19))


def test_an_index_is_kept_on_disk(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(shard_index, "STORE_BYTES", 0)
    folder = write_shards(tmp_path / "shards", shards=2)
    first = load_images(config(folder))
    kept = list((tmp_path / "cache" / "vqkernels" / "shards").iterdir())
    assert len(kept) == 2 and all(path.suffix == ".npz" for path in kept)

    def again():
        shard_index.index_shard.cache_clear()
        images = load_images(config(folder))
        assert torch.equal(images.batch(3), first.batch(3)) and images.labels == first.labels
        assert [p.name for p in images.training] == [p.name for p in first.training]

    read = shard_index._read
    monkeypatch.setattr(shard_index, "_read", lambda path: pytest.fail("the shard was walked through"))
    again()
    monkeypatch.setattr(shard_index, "_read", read)
    for damaged in (b"", b"no index", kept[0].read_bytes()[:-100]):
        kept[0].write_bytes(damaged)
        again()
    again()
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "000.tar"))
    again()
    write_shards(folder, shards=2, count=9, label=lambda number: ("cls", "7"))
    changed = load_images(config(folder))
    assert len(changed.training) == 5 and changed.labels is not None and len(changed.labels) == 8


def test_refusals_of_shards(tmp_path):
    picture = encoded(pixels_of(0))

    def write(name, *members):
        return write_shard(tmp_path / name, members)

    assert "hold one image in every sample; got 0 in a.tar/1" in refusal(write("a.tar", ("1.cls", b"3")))
    text = refusal(write("b.tar", ("1.png", picture), ("1.bmp", encoded(pixels_of(0), "BMP"))))
    assert "2 in b.tar/1 (png, bmp)" in text
    assert "no samples" in refusal(write("c.tar"))
    assert "duplicate" in refusal(write("d.tar", ("1.png", picture), ("1.png", picture)))
    assert "e.tar: 1.png" in refusal(write("e.tar", ("1.png", b"no picture")))
    assert "f.tar/1.json" in refusal(write("f.tar", ("1.png", picture), ("1.json", b"{")))
    assert "0 to train on and 1 held out" in refusal(write("g.tar", ("1.png", picture)))
    small = encoded(pixels_of(0, (12, 30)))
    assert "i.tar/1.png of 12x30" in refusal(write("i.tar", ("0.png", picture), ("1.png", small)))


@pytest.mark.parametrize("cut", ["nothing left", "in a header", "in a picture", "before the end mark"])
def test_damaged_shards(tmp_path, cut):
    path = write_shards(tmp_path / "shards", count=3) / "000.tar"
    with tarfile.open(path) as archive:
        last = archive.getmembers()[-2:]
    places = {
        "nothing left": 0,
        "in a header": last[1].offset + 100,
        "in a picture": last[0].offset_data + 100,
        "before the end mark": last[1].offset_data + 512,
    }
    path.write_bytes(path.read_bytes()[: places[cut]])
    assert "000.tar" in refusal(path)


def test_a_damaged_header_is_no_end(tmp_path):
    path = write_shards(tmp_path / "shards", count=3) / "000.tar"
    content = bytearray(path.read_bytes())
    with tarfile.open(path) as archive:
        header = archive.getmembers()[4].offset
    content[header : header + 4] = b"\xff" * 4
    path.write_bytes(content)
    assert f"no header and no end mark at byte {header}" in refusal(path)


def test_compressed_shards_are_refused(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w:gz"):
        pass
    assert "uncompressed" in refusal(path)


def test_a_folder_of_shards_and_images_is_refused(tmp_path):
    folder = write_shards(tmp_path / "shards")
    (folder / "one.png").write_bytes(encoded(pixels_of(0)))
    assert "1 *.tar and 1 images" in refusal(folder)


@pytest.mark.parametrize("package", ["webdataset", "datasets"])
def test_missing_packages(tmp_path, monkeypatch, package):
    data = write_shards(tmp_path / "shards") if package == "webdataset" else saved(tmp_path / "a", dataset())
    monkeypatch.setitem(sys.modules, package, None)
    assert f"pip install {package}" in refusal(data)
