"""Images: batches that depend on nothing but seed and step, splits, and what is refused."""

import pickle
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vqkernels.train.config import RunError, TrainConfig
from vqkernels.train.data import images as data_module
from vqkernels.train.data.images import load_images
from vqkernels.train.data.pictures import PHOTOS_HELD_OUT, PHOTOS_TRAIN, Picture
from vqkernels.train.measures.held_out import crop_batches


def write_images(folder, count=12, size=(24, 20)):
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:03d}.png")
    return folder


def config(folder, **fields):
    return TrainConfig(**{"data": str(folder), "crop": 16, "batch_size": 6, **fields})


def refusal(*arguments, **fields):
    with pytest.raises(RunError) as caught:
        load_images(config(*arguments, **fields))
    text = str(caught.value)
    assert " must " in text and "; got " in text and text.endswith(".")
    return text


def test_a_batch_is_a_function_of_seed_and_step(tmp_path):
    folder = write_images(tmp_path / "images")
    one, other = load_images(config(folder)), load_images(config(folder))
    one.batch(0)
    for step in (5, 3, 5):
        assert torch.equal(one.batch(step), other.batch(step))
    assert not torch.equal(one.batch(3), one.batch(4))
    assert not torch.equal(one.batch(3), load_images(config(folder, seed=1)).batch(3))


def test_a_batch_holds_crops_of_training_pictures(tmp_path):
    images = load_images(config(write_images(tmp_path / "images"), batch_size=40, augment=False))
    batch = images.batch(0)
    assert batch.shape == (40, 3, 16, 16) and batch.dtype == torch.float32
    assert batch.min() >= -1 and batch.max() <= 1
    pixels = ((batch + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    windows = [
        np.lib.stride_tricks.sliding_window_view(p.read(), (16, 16, 3)).reshape(-1, 16 * 16 * 3)
        for p in images.training
    ]
    where = [[(w == crop.reshape(1, -1)).all(1).any() for w in windows] for crop in pixels]
    assert all(sum(found) == 1 for found in where)
    assert len({found.index(True) for found in where}) > len(windows) // 2


def test_processes_share_a_batch_out(tmp_path):
    images = load_images(config(write_images(tmp_path / "images")))
    parts = [images.batch(7, rank=rank, world=3) for rank in range(3)]
    assert torch.equal(torch.cat(parts), images.batch(7))


def test_every_position_of_a_crop_is_possible(tmp_path):
    folder = write_images(tmp_path / "images", count=2, size=(17, 16))
    images = load_images(config(folder, batch_size=64, augment=False))
    pixels = torch.from_numpy(images.training[0].read().astype(np.float32)).permute(2, 0, 1).div(127.5).sub(1)
    crops = images.batch(0)
    assert {int((crop != pixels[:, :16]).any()) for crop in crops} == {0, 1}
    assert all(torch.equal(crop, pixels[:, :16]) or torch.equal(crop, pixels[:, 1:]) for crop in crops)


def test_augmented_crops_are_mirrored_and_exposed_anew(tmp_path):
    """Half of them mirrored; one offset for a crop, within 0.15, and one gain in 0.7..1.2 times 0.75..1.25 for each colour."""
    folder = write_images(tmp_path / "images", count=2, size=(16, 16))
    plain = load_images(config(folder, batch_size=200, augment=False)).batch(5)
    changed = load_images(config(folder, batch_size=200)).batch(5)
    mirrored = 0
    for crop, new in zip(plain, changed, strict=True):
        fits = []
        for candidate in (crop, crop.flip(2)):
            # where nothing was clamped, light is one linear function of light
            inside = (new.abs() < 1).flatten()
            colours = torch.block_diag(*(candidate + 1).flatten(1)[:, :, None])
            light = torch.cat([colours, torch.ones(candidate.numel(), 1)], 1)[inside]
            found = torch.linalg.lstsq(light, new.flatten()[inside, None] + 1).solution
            error = (light @ found - new.flatten()[inside, None] - 1).abs().max()
            fits.append((float(error), found.flatten().tolist()))
        error, (*gains, offset) = min(fits)
        assert error < 1e-5 and abs(offset) <= 0.15 + 1e-6
        assert all(0.7 * 0.75 - 1e-5 <= gain <= 1.2 * 1.25 + 1e-5 for gain in gains)
        assert max(gains) / min(gains) <= 1.25 / 0.75 + 1e-5
        mirrored += fits[1][0] < fits[0][0]
    assert 70 <= mirrored <= 130
    assert changed.min() >= -1 and changed.max() <= 1


def test_photographs_are_split_by_scene():
    scenes = [{name.split("_")[0].split(".")[0] for name in part} for part in (PHOTOS_TRAIN, PHOTOS_HELD_OUT)]
    assert not scenes[0] & scenes[1] and len(scenes[0] | scenes[1]) == 8
    spec = find_spec("skimage")
    assert spec is not None and spec.origin is not None
    assert all(
        (Path(spec.origin).parent / "data" / name).is_file() for name in PHOTOS_TRAIN + PHOTOS_HELD_OUT
    )
    images = load_images(TrainConfig(crop=32, batch_size=4))
    held_out = {image.name: tuple(image.image.shape) for image in images.validation()}
    assert held_out == {"coffee": (3, 400, 600), "rocket": (3, 424, 640)}
    assert images.batch(0).shape == (4, 3, 32, 32)


def test_a_folder_holds_out_every_tenth_picture_at_any_depth(tmp_path):
    folder = write_images(tmp_path / "images", count=19)
    write_images(folder / "deeper", count=2)
    (folder / "notes.txt").write_text("no picture")
    images = load_images(config(folder))
    assert [p.name for p in images.held_out] == ["009.png", "deeper/000.png"]
    assert len(images.training) == 19


def test_few_pictures_hold_out_the_last(tmp_path):
    images = load_images(config(write_images(tmp_path / "images", count=3)))
    assert [p.name for p in images.held_out] == ["002.png"] and len(images.training) == 2


def test_whole_pictures_are_cut_to_the_downsampling(tmp_path):
    folder = write_images(tmp_path / "images", count=2, size=(21, 19))
    (shown,) = load_images(config(folder)).validation()
    assert shown.image.shape == (3, 20, 16)


def test_grey_and_palette_pictures_become_colour(tmp_path):
    folder = write_images(tmp_path / "images", count=1)
    Image.fromarray(np.full((20, 20), 7, dtype=np.uint8)).save(folder / "grey.png")
    Image.fromarray(np.full((20, 20), 7, dtype=np.uint8)).convert("P").save(folder / "palette.png")
    assert all(p.read().shape[2] == 3 for p in load_images(config(folder)).training)


def test_refusals_of_folders(tmp_path):
    assert "which is no folder" in refusal(tmp_path / "nowhere")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert f"none in {empty}" in refusal(empty)
    assert "got only 000.png" in refusal(write_images(tmp_path / "single", count=1))
    text = refusal(write_images(tmp_path / "small", count=3, size=(20, 12)))
    assert "crop = 16" in text and "000.png of 20x12 and 2 more" in text and "--crop 12" in text
    tiny = write_images(tmp_path / "tiny", count=2, size=(8, 8))
    assert "11 pixels each way for SSIM" in refusal(tiny, crop=8)


def test_unreadable_pictures(tmp_path):
    folder = write_images(tmp_path / "text", count=3)
    (folder / "001.png").write_text("not a picture")
    assert "001.png" in refusal(folder)
    folder = write_images(tmp_path / "cut", count=3)
    whole = (folder / "001.png").read_bytes()
    (folder / "001.png").write_bytes(whole[: len(whole) // 2])
    assert "001.png" in refusal(folder)
    folder = write_images(tmp_path / "deep", count=3)
    Image.fromarray(np.zeros((20, 20), dtype=np.uint16)).save(folder / "001.png")
    assert "deeper than 8 bits" in refusal(folder)


def test_folders_are_classes_where_every_picture_lies_in_one(tmp_path):
    for name in ("dog", "cat/young", "bird"):
        write_images(tmp_path / "images" / name, count=4)
    images = load_images(config(tmp_path / "images"))
    assert images.labels == ("bird", "cat", "dog")
    walked = [*images.walk("train", 16), *images.walk("held_out", 16)]
    assert len({sample.name for sample in walked}) == 12
    assert all(sample.name.startswith(images.labels[sample.label]) for sample in walked)
    write_images(tmp_path / "images", count=1)
    images = load_images(config(tmp_path / "images"))
    assert images.labels is None and {sample.label for sample in images.walk("train", None)} == {None}


def test_an_epoch_shows_the_pixels_there_are(tmp_path):
    images = load_images(config(write_images(tmp_path / "images", count=12)))
    assert len(images.training) == 11
    # 11 pictures of 24x20 pixels in batches of 6 crops of 16x16
    assert images.epoch_steps == 4
    assert load_images(config(tmp_path / "images", batch_size=1000)).epoch_steps == 1


def test_measurements_decode_the_pictures_they_need(tmp_path, monkeypatch):
    write_images(tmp_path, count=120)
    monkeypatch.setattr(data_module, "KEEP_BYTES", 0)
    images = load_images(config(tmp_path))
    names = [picture.name for picture in images.held_out]
    assert [one.name for one in images.spread(3).validation()] == [names[0], names[4], names[8]]
    assert images.spread(12) is images and images.spread(99) is images
    assert images.spread(3).training is images.training
    read, opened = [], Picture.read
    monkeypatch.setattr(Picture, "read", lambda picture: read.append(picture.name) or opened(picture))
    assert len(torch.cat(list(crop_batches(images, 3, side=16)))) == 3
    assert len(read) <= 3


def test_a_walk_takes_the_middle_or_the_whole(tmp_path):
    images = load_images(config(write_images(tmp_path / "images", count=3, size=(21, 19))))
    for crop, window in ((16, np.s_[2:18, 1:17]), (None, np.s_[:20, :16])):
        for picture, sample in zip(images.training, images.walk("train", crop), strict=True):
            wanted = torch.from_numpy(picture.read()[window].astype(np.float32)).permute(2, 0, 1)
            assert sample.name == picture.name and torch.equal(sample.image, wanted / 127.5 - 1)
    with pytest.raises(RunError, match=r"be at least 20 pixels each way; got 000\.png of 21x19"):
        next(images.walk("train", 20))


def write_cifar(folder, *, protocol=2, per_file=3):
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    names = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
    images = {}
    for name in names:
        images[name] = rng.integers(0, 256, (per_file, 3072), dtype=np.uint8)
        labels = [number % 10 for number in range(per_file)]
        content = {b"data": images[name], b"labels": labels, b"batch_label": b"some"}
        (folder / name).write_bytes(pickle.dumps(content, protocol=protocol))
    return images


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("inner", ["", "cifar-10-batches-py"])
def test_cifar_is_recognised_and_read(tmp_path, protocol, inner):
    written = write_cifar(tmp_path / "data" / inner, protocol=protocol)
    images = load_images(config(tmp_path / "data"))
    assert len(images.training) == 15 and len(images.held_out) == 3
    planes = written["data_batch_2"][1].reshape(3, 32, 32)
    assert np.array_equal(images.training[4].read(), planes.transpose(1, 2, 0))
    assert np.array_equal(images.held_out[2].read()[..., 0].ravel(), written["test_batch"][2][:1024])


def test_classes_of_cifar(tmp_path):
    write_cifar(tmp_path / "data")
    images = load_images(config(tmp_path / "data"))
    assert images.labels is not None and len(images.labels) == 10 and images.labels[3] == "cat"
    assert [sample.label for sample in images.walk("train", 32)] == [0, 1, 2] * 5
    assert [sample.label for sample in images.walk("held_out", 32)] == [0, 1, 2]
    array = np.zeros((2, 3072), dtype=np.uint8)
    for labels in ([0], [0, 10], [0, "1"], 7):
        content = {b"data": array, b"labels": labels}
        (tmp_path / "data" / "test_batch").write_bytes(pickle.dumps(content))
        assert "no list of 2 class numbers" in refusal(tmp_path / "data")
    (tmp_path / "data" / "test_batch").write_bytes(pickle.dumps({b"data": array}))
    images = load_images(config(tmp_path / "data"))
    assert images.labels is None and images.training[0].label is None


def test_cifar_of_python_2(tmp_path):
    """The published files are protocol 2 of Python 2: byte strings where Python 3 writes text."""
    write_cifar(tmp_path / "data")
    raw = bytes(range(256)) * 12
    stream = (
        b"\x80\x02}U\x04datacnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01K\x01M\x00\x0c\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xff"
        b"J\xff\xff\xff\xffK\x00tb\x89T\x00\x0c\x00\x00" + raw + b"tbs."
    )
    (tmp_path / "data" / "test_batch").write_bytes(stream)
    images = load_images(config(tmp_path / "data"))
    assert np.array_equal(images.held_out[0].read()[..., 1].ravel(), np.frombuffer(raw[1024:2048], np.uint8))


class _Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_cifar_pickles_run_nothing(tmp_path):
    write_cifar(tmp_path / "data")
    trace = tmp_path / "trace"
    for content in (_Evil(trace), {b"data": np.array([_Evil(trace)], dtype=object)}):
        (tmp_path / "data" / "data_batch_3").write_bytes(pickle.dumps(content))
        text = refusal(tmp_path / "data")
        assert "data_batch_3" in text and ("pathlib" in text or "dtype" in text)
        assert not trace.exists()


@pytest.mark.parametrize(
    "stream", [b"", b"\x80", b"\x80\x04N.", b"garbage", pickle.dumps({b"data": b"text"})]
)
def test_damaged_cifar_files(tmp_path, stream):
    write_cifar(tmp_path / "data")
    (tmp_path / "data" / "test_batch").write_bytes(stream)
    assert "test_batch" in refusal(tmp_path / "data")


def test_cifar_arrays_of_another_type_or_shape(tmp_path):
    write_cifar(tmp_path / "data")
    for array in (np.zeros((2, 3072), dtype=np.float32), np.zeros((2, 100), dtype=np.uint8)):
        (tmp_path / "data" / "test_batch").write_bytes(pickle.dumps({b"data": array}))
        assert "test_batch" in refusal(tmp_path / "data")


def test_incomplete_cifar(tmp_path):
    write_cifar(tmp_path / "data")
    (tmp_path / "data" / "data_batch_4").unlink()
    assert "data_batch_4" in refusal(tmp_path / "data") and "no such file" in refusal(tmp_path / "data")
