"""The papers' tables: every row has a recipe that runs and learns, and who collapses is who should."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vqkernels.models import VQVAE
from vqkernels.nn import (
    STE,
    AffineCodebook,
    AffineEMACodebook,
    Codebook,
    Every,
    HyperNetCodebook,
    ImportanceReplacement,
    LatentMeans,
    LeastRecentlyUsed,
    SFDiVeQ,
    VectorQuantizer,
)
from vqkernels.nn.metrics import code_counts, usage
from vqkernels.train.data.images import ImageSet
from vqkernels.train.data.pictures import Picture

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "bench"))

import papers  # noqa: E402
import records  # noqa: E402
from recipes import DIM, RECIPES, TABLES  # noqa: E402

CODES, STEPS = 16, 3


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    # models this small gain nothing from more, and lose much where others use the cores
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def images():
    pixels = np.random.default_rng(0).integers(0, 256, (3, 48, 48, 3), dtype=np.uint8)
    pictures = [Picture(str(i), 48, 48, pixels=one) for i, one in enumerate(pixels)]
    return ImageSet(pictures[:2], pictures[2:], crop=16, batch_size=8, factor=4, seed=0)


def test_every_row_has_a_recipe_and_every_recipe_a_row():
    assert {name for rows in TABLES.values() for _, name in rows} == set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains(name, images):
    recipe = RECIPES[name]
    torch.manual_seed(0)
    model = VQVAE(recipe.quantizer(CODES, DIM, STEPS, images), width=8, latent_dim=DIM, residual_blocks=1)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    step = recipe.stepper(model, STEPS)
    losses = [step(images.batch(number), number) for number in range(STEPS)]
    assert all(math.isfinite(loss) for loss, _ in losses)
    after = dict(model.named_parameters())
    assert all(p.isfinite().all() for p in after.values())
    for part in ("encoder", "decoder"):
        assert any(not torch.equal(before[n], p) for n, p in after.items() if n.startswith(part))
    # only a warm-up has no indices
    assert losses[-1][1].min() >= 0 and losses[-1][1].max() < model.quantizer.num_indices


def test_a_record_and_what_is_made_of_it(images, tmp_path, monkeypatch):
    monkeypatch.setattr(papers, "CODES", CODES)
    monkeypatch.setattr(papers, "WIDTH", 8)
    found = [papers.train(name, RECIPES[name], images, STEPS) for name in ("ste", "fsq")]
    assert all(each["finite"] and 0 < each["usage"] <= 1 for each in found)
    papers.draw(tmp_path / "figure.png", found)
    assert (tmp_path / "figure.png").stat().st_size > 0
    told = papers.markdown(found)
    assert told.count("| none | ") == 1 and f"| FSQ | {found[1]['psnr']:.2f} dB |" in told


def test_what_is_recorded_is_the_papers_picture():
    found = {each["name"]: each for each in records.read(papers.OUT)[0]}
    assert found.keys() == RECIPES.keys()
    assert all(each["finite"] and each["loss_last"] < each["loss_first"] for each in found.values())
    # plain STE from a poor start loses most of its codes
    assert found["ste"]["usage"] < 0.5
    keep = ("affine", "affine ema", "lru", "ste replaced", "diveq replaced", "sf_diveq", "mq", "mq joint")
    assert {name: found[name]["usage"] for name in keep if found[name]["usage"] <= 0.9} == {}


def test_other_seeds_show_it_too():
    found = records.read(ROOT / "bench/results/papers-seeds.jsonl")[0]
    assert {each["seed"] for each in found} == {1, 2}
    used = {(each["name"], each["seed"]): each["usage"] for each in found}
    for seed in (1, 2):
        assert used["ste", seed] < 0.5 < used["affine", seed]
        assert all(used[name, seed] > 0.9 for name in ("affine ema", "mq joint", "sf_diveq"))


def _used(codebook, estimator, upkeep, seed):
    """Share of codes chosen at the end, of latents whose mean is four deviations away from the first codes'."""
    torch.manual_seed(seed)
    quantizer = VectorQuantizer(codebook(), estimator(), upkeep())
    optimizer = torch.optim.Adam(quantizer.parameters(), 1e-2)
    quantizer.follow(optimizer)
    counts = torch.zeros(quantizer.num_indices, dtype=torch.int64)
    for step in range(200):
        x = 4 + torch.randn(2048, DIM)
        z, indices, loss = quantizer(x)
        total = loss if loss.requires_grad else F.mse_loss(z, x)
        optimizer.zero_grad()
        if total.requires_grad:
            total.backward()
        optimizer.step()
        if step >= 160:
            counts += code_counts(indices[..., 0], len(counts))
    return float(usage(counts))


def _codes():
    return Codebook(32, DIM, init="normal")


KEEPERS = {
    "lru": (_codes, STE, lambda: [LeastRecentlyUsed()]),
    "importance": (_codes, STE, lambda: [ImportanceReplacement(Every(20, stop=160))]),
    "affine": (lambda: AffineCodebook(32, DIM, init="normal", lr_scale=30), STE, list),
    "affine_ema": (lambda: AffineEMACodebook(32, DIM, init="normal"), STE, list),
    "sf_diveq": (_codes, SFDiVeQ, lambda: [LatentMeans(20)]),
}


@pytest.mark.parametrize("seed", range(3))
def test_plain_ste_collapses_from_a_poor_start(seed):
    lost = _used(_codes, STE, list, seed)
    assert lost < 0.25
    # a hyper-net alone, at fixed latents, brings back several times as many
    assert _used(lambda: HyperNetCodebook(32, DIM), STE, list, seed) > 2 * lost


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", KEEPERS)
def test_who_keeps_the_codes_from_the_same_start(name, seed):
    assert _used(*KEEPERS[name], seed) > 0.9
