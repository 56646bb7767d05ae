"""Reports of a run: self-contained pages, Markdown with pictures, and the command that writes them."""

import base64
import os
import re
from dataclasses import dataclass, field, fields
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from vqkernels.cli.evaluate import evaluate as command
from vqkernels.models import VQVAE
from vqkernels.nn import FSQ, STE, Codebook, Residual, VectorQuantizer
from vqkernels.train.config import RunError, TrainConfig
from vqkernels.train.data.images import ImageSet, Picture
from vqkernels.train.loop import train
from vqkernels.train.measures.evaluate import evaluate
from vqkernels.train.measures.latents import Embedding, study_latents
from vqkernels.train.reports.latent_plots import embedding_figure, error_figure, use_figure
from vqkernels.train.reports.pages import Illustration, Report, Table, to_html, to_markdown, write_report
from vqkernels.train.reports.plots import Row, png, reconstruction_figure
from vqkernels.train.reports.report import make_report

pytest.importorskip("sklearn")

PIXEL = b"\x89PNG\r\n\x1a\n not drawn"
CLOSED_BY_ITSELF = {"meta", "img"}


class Reader(HTMLParser):
    """Checks that tags nest, and collects what a page asks for."""

    def __init__(self, page):
        super().__init__()
        self.open, self.pictures, self.text = [], [], []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        named = dict(attributes)
        assert not {"href", "srcset", "onclick"} & set(named) and tag not in ("script", "link", "iframe")
        if tag == "img":
            self.pictures.append(named["src"])
        if tag not in CLOSED_BY_ITSELF:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def a_report(**parts):
    table = Table("Numbers <&>", ("name", "a|b"), [("x_1", "2"), ("<script>", "3")], "a note")
    picture = Illustration("Two words, one", 'says "so" & more', PIXEL)
    usual = {
        "title": "A *title*",
        "lead": "What was <measured>",
        "tables": [table],
        "illustrations": [picture],
        "configuration": [Table("Group", (), [("steps", "3")])],
        "surroundings": Table("Versions", (), [("torch", "2")]),
    }
    return Report(**usual | parts)


def test_a_page_needs_nothing_but_itself():
    page = to_html(a_report())
    read = Reader(page)
    (picture,) = read.pictures
    kind, data = picture.split(",")
    assert kind == "data:image/png;base64" and base64.b64decode(data) == PIXEL
    assert "http" not in page and "url(" not in page
    text = "".join(read.text)
    assert all(
        words in text for words in ("Numbers <&>", "<script>", 'says "so" & more', "What was <measured>")
    )


def test_markdown_shows_the_files_beside_it(tmp_path):
    path = tmp_path / "new folder" / "a run.md"
    write_report(path, a_report())
    text = path.read_text()
    (target,) = re.findall(r"!\[.*\]\(<(.*)>\)", text)
    assert (path.parent / target).read_bytes() == PIXEL
    lines = text.splitlines()
    assert lines[0] == r"# A \*title\*"
    first = lines.index(r"| name | a\|b |")
    assert lines[first + 1 : first + 4] == ["| :--- | ---: |", r"| x\_1 | 2 |", r"| \<script\> | 3 |"]
    assert sorted(one.name for one in path.parent.iterdir()) == ["a run.md", "a run_pictures"]


def test_a_report_that_cannot_be_written_leaves_the_earlier_one(tmp_path, monkeypatch):
    path = tmp_path / "run.html"
    write_report(path, a_report())
    before = path.read_bytes()

    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(RunError, match="No space left"):
        write_report(path, a_report(title="another"))
    assert path.read_bytes() == before


def test_names_that_no_report_has_are_refused(tmp_path):
    for path in (tmp_path / "run.pdf", tmp_path / "run", tmp_path):
        with pytest.raises(RunError, match=r"evaluate: report must name a \.html or \.md file; got"):
            write_report(path, a_report())
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"report must lie in a folder that can be written"):
        write_report(tmp_path / "file" / "run.html", a_report())


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    shown = [
        Picture(f"{n}", 24, 20, pixels=rng.integers(0, 256, (24, 20, 3), dtype=np.uint8)) for n in range(2)
    ]
    return ImageSet(shown, shown, crop=8, batch_size=2, factor=4, seed=0)


def stage():
    return VectorQuantizer(Codebook(8, 4), STE())


@pytest.mark.parametrize("kind", ["residual", "fsq"])
def test_quantizers_without_one_codebook_are_reported_too(kind, images):
    torch.manual_seed(0)
    quantizer = (
        Residual([stage(), stage()], channel_dim=1)
        if kind == "residual"
        else FSQ((3, 4), dim=4, channel_dim=1)
    )
    model = VQVAE(quantizer, width=6, latent_dim=4, residual_blocks=1)
    found = [evaluate(model, images, crops=6)]
    study = study_latents(model, images, crops=6, points=12)
    report = make_report(model, images, TrainConfig(quantizer=kind), evaluations=found, study=study)
    Reader(to_html(report))
    titles = [one.title for one in report.illustrations]
    assert titles == ["Reconstructions", "Errors", "Codebook use", "Latent space"]
    said = report.illustrations[-1].caption
    assert ("all 8 codes of the first stage" if kind == "residual" else "no table of codes") in said
    for one in report.illustrations:
        with Image.open(BytesIO(one.png)) as picture:
            assert picture.width >= 500 and np.asarray(picture.convert("L")).std() > 5


def test_groups_of_options_hold_every_field(images):
    @dataclass(frozen=True)
    class Groups:
        first: int = 1
        title = "What is first"

    @dataclass(frozen=True)
    class More(Groups):
        second: str = "b"
        third: list = field(default_factory=list)

    from vqkernels.train.reports.report import _configuration

    tables = {table.title: list(table.rows) for table in _configuration(More())}
    assert tables["What is first"][0] == ("first", "1")
    told = [name for table in _configuration(TrainConfig()) for name, _ in table.rows]
    assert sorted(told) == sorted(each.name for each in fields(TrainConfig))


def test_pictures_of_codes_say_how_many_are_dead():
    rng = np.random.default_rng(0)
    latents, codes = rng.normal(size=(50, 2)), rng.normal(size=(6, 2))
    embedding = Embedding(latents, codes, np.array([5, 0, 3, 0, 0, 1]), 6)
    figure = embedding_figure(embedding)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["50 latents", "3 codes in use, area by use", "3 dead codes"]
    sizes = figure.axes[0].collections[1].get_sizes()
    # the area above the least grows in proportion to the use
    assert (sizes[1] - sizes[2]) / (sizes[0] - sizes[2]) == pytest.approx(2 / 4)
    assert len(figure.axes[0].collections[2].get_offsets()) == 3
    without = embedding_figure(Embedding(latents, None, None, 0))
    assert [text.get_text() for text in without.legends[0].get_texts()] == ["50 latents"]
    drawn = use_figure([np.array([4, 0, 12, 0])])
    labels = [text.get_text() for text in drawn.legends[0].get_texts()]
    assert labels == ["2 of 4 codes in use", "all used alike", "2 dead"]
    assert drawn.axes[0].patches[0].get_data().values.tolist() == [0.75, 0.25]
    assert png(use_figure([np.array([0, 0])])) and png(use_figure([np.array([3])] * 4))


def test_error_maps_are_the_root_of_the_mean_squared_error_over_channels():
    original = np.zeros((4, 5, 3), np.uint8)
    wrong = original.copy()
    wrong[1, 2] = (3, 4, 12)
    figure = error_figure({"one": original}, [wrong])
    shown = figure.axes[0].images[0].get_array()
    # 13^2 = 3^2 + 4^2 + 12^2, in float32
    assert shown[1, 2] == pytest.approx(13 / 3**0.5, rel=1e-6) and shown.sum() == shown[1, 2]
    assert figure.axes[0].get_xlabel() == f"root mean square {(169 / 60) ** 0.5:.1f}"


class Distance(nn.Module):
    """In place of LPIPS."""

    @classmethod
    def from_files(cls, vgg_path, linear_path=None):
        assert (Path(vgg_path).name, Path(linear_path).name) == ("vgg.pt", "linear.pt")
        return cls()

    def forward(self, a, b):
        return (a - b).square().mean((1, 2, 3))


def test_the_command_measures_and_reports(tmp_path, capsys, monkeypatch):
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for number in range(11):
        coarse = rng.integers(0, 256, (3, 4, 3), dtype=np.uint8)
        whole = Image.fromarray(coarse).resize((26, 22), Image.Resampling.BICUBIC)
        whole.save(tmp_path / "images" / f"{number:02d}.png")
    config = TrainConfig(
        data=str(tmp_path / "images"),
        out=str(tmp_path / "run"),
        num_codes=8,
        latent_dim=4,
        width=8,
        residual_blocks=1,
        crop=16,
        batch_size=4,
        steps=6,
        log_every=2,
        evaluate_every=3,
        warmup=0.3,
    )
    train(config)
    monkeypatch.setattr("vqkernels.train.learners.losses.LPIPS", Distance)

    class Means(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.float().mean((2, 3))

    torch.jit.script(Means()).save(str(tmp_path / "net.pt"))
    checkpoint, report = config.checkpoint_path(), tmp_path / "out" / "run.html"
    options = {"lpips": f"{tmp_path / 'vgg.pt'},{tmp_path / 'linear.pt'}", "inception": tmp_path / "net.pt"}
    picture = tmp_path / "picture.png"
    assert command(checkpoint, report=report, picture=picture, crops=9, **options) == 0
    printed = capsys.readouterr().out
    assert "1 whole held-out image of" in printed and "9 crops" in printed and "rFID" in printed
    read = Reader(report.read_text())
    text = " ".join(read.text)
    assert len(read.pictures) == 5 and picture.stat().st_size > 1000
    for words in (
        "codeword",
        "curve",
        "segment",
        "LPIPS",
        "rFID",
        "gradient gap",
        "after 6 of 6",
        "num_codes",
    ):
        assert words in text
    (tmp_path / "run" / "metrics.jsonl").unlink()
    assert command(checkpoint, report=tmp_path / "out" / "run.md", crops=9) == 0
    printed = capsys.readouterr().out
    assert "no training curves" in printed and "LPIPS" not in printed
    assert len(list((tmp_path / "out" / "run_pictures").glob("*.png"))) == 4
    with pytest.raises(RunError, match=r"evaluate: crops must be at least 1; got 0"):
        command(checkpoint, crops=0)
    with pytest.raises(RunError, match=r"report must name a \.html or \.md file"):
        command(checkpoint, report=tmp_path / "run.txt")


def test_markdown_without_pictures_makes_no_folder(tmp_path):
    write_report(tmp_path / "run.md", a_report(illustrations=[]))
    assert [one.name for one in tmp_path.iterdir()] == ["run.md"]
    assert to_markdown(a_report(illustrations=[]), "none").count("![") == 0


def test_names_with_dollar_signs_and_without_end_are_titles():
    pixels = np.zeros((4, 5, 3), np.uint8)
    names = ["cost $_$.png", "a/" * 40 + "$^$.png"]
    originals = dict.fromkeys(names, pixels)
    for figure in (
        reconstruction_figure(originals, [Row("ste", [pixels] * 2, ["", ""])]),
        error_figure(originals, [pixels] * 2),
    ):
        assert png(figure)
        titles = [axes.get_title() for axes in figure.axes[:2]]
        assert titles[0].startswith(names[0]) and "$^$.png" in titles[1] and len(titles[1]) < 50
