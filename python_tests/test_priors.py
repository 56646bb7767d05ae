"""Priors over tokens: what they see, how they draw, and schedules."""

import math
from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")

from vqkernels.__main__ import main
from vqkernels.models.priors import GPTPrior, MaskGITPrior
from vqkernels.models.token_prior import draw_tokens
from vqkernels.train.config import RunError
from vqkernels.train.priors.config import PRESETS, PriorConfig

SMALL = {"layers": 2, "heads": 2, "width": 16}


def make(kind, classes=0, codes=7, length=6):
    torch.manual_seed(1)
    return kind(codes, length, num_classes=classes, **SMALL).eval()


@pytest.fixture
def tokens():
    return torch.randint(7, (3, 6), generator=torch.Generator().manual_seed(2))


def test_future_tokens_do_not_change_logits(tokens):
    prior = make(GPTPrior)
    before = prior(tokens)
    for place in range(6):
        changed = tokens.clone()
        changed[:, place] = (changed[:, place] + 1) % 7
        after = prior(changed)
        assert torch.equal(before[:, : place + 1], after[:, : place + 1])
        assert place == 5 or not torch.equal(before[:, place + 1 :], after[:, place + 1 :])


def test_maskgit_sees_both_sides(tokens):
    prior = make(MaskGITPrior)
    changed = tokens.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 7
    assert not torch.equal(prior(tokens)[:, 0], prior(changed)[:, 0])


def test_cached_sampling_is_greedy_and_equals_uncached():
    prior = make(GPTPrior)
    cached = prior.sample(2, top_k=1)
    assert torch.equal(cached, prior.sample(2, top_k=1, cache=False))
    # the likeliest token, found by the teacher-forced forward
    assert torch.equal(prior(cached).argmax(-1), cached)


def test_top_k_draws_only_the_likeliest():
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0]]).repeat(500, 1)
    assert set(draw_tokens(logits, top_k=1).tolist()) == {1}
    assert set(draw_tokens(logits, top_k=2).tolist()) == {1, 3}
    assert set(draw_tokens(logits, temperature=10.0, top_k=9).tolist()) == {0, 1, 2, 3}


@pytest.mark.parametrize("kind", [GPTPrior, MaskGITPrior])
def test_sampling_is_seeded_and_keeps_the_training_flag(kind):
    prior = make(kind).train()
    one, other = (prior.sample(3, generator=torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(one, other) and prior.training
    assert one.shape == (3, 6) and int(one.min()) >= 0 and int(one.max()) < 7


@pytest.mark.parametrize("kind", [GPTPrior, MaskGITPrior])
def test_classes_change_logits(kind, tokens):
    prior = make(kind, classes=2)
    zero, one = (prior(tokens, torch.full((3,), label)) for label in (0, 1))
    assert zero.shape == (3, 6, 7) and not torch.equal(zero, one)
    for labels in (None, torch.tensor([0, 1, 2]), torch.tensor([0, 1])):
        with pytest.raises(ValueError, match="labels must"):
            prior(tokens, labels)
    with pytest.raises(ValueError, match="without classes"):
        make(kind)(tokens, torch.zeros(3, dtype=torch.int64))


def test_gpt_replaces_inputs_as_often_as_p_keep_says():
    prior, count = make(GPTPrior), 4000
    tokens = torch.zeros(count, 6, dtype=torch.int64)
    inputs, asked = prior.corrupt(tokens, keep=0.4, generator=torch.Generator().manual_seed(0))
    changed = 0.6 * 6 / 7
    # five standard deviations of a mean of independent draws
    tolerance = 5 * math.sqrt(changed * (1 - changed) / tokens.numel())
    assert abs((inputs != 0).double().mean() - changed) < tolerance and asked.all()
    assert torch.equal(prior.corrupt(tokens).inputs, tokens)


def test_gpt_measures_the_code_length(tokens):
    prior = make(GPTPrior)
    chosen = prior(tokens).log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    torch.testing.assert_close(prior.nats(tokens), -chosen.mean(1))


def test_maskgit_masks_what_it_asks_for():
    prior = make(MaskGITPrior)
    tokens = torch.zeros(3000, 6, dtype=torch.int64)
    for corrupted, uniform in ((prior.corrupt(tokens), False), (prior.corrupt_to_measure(tokens), True)):
        assert torch.equal(corrupted.inputs == prior.mask_token, corrupted.asked)
        counts = corrupted.asked.sum(1)
        assert set(counts.tolist()) == set(range(1, 7))
        # P(count = 6) is P(cos(pi u / 2) > 5/6), or 1/6
        share = 1 / 6 if uniform else math.acos(5 / 6) * 2 / math.pi
        assert abs((counts == 6).double().mean() - share) < 5 * math.sqrt(share * (1 - share) / 3000)


@pytest.mark.parametrize("iterations", [1, 3, 12])
def test_maskgit_keeps_known_tokens_and_fills_all(iterations, tokens):
    prior, forwards = make(MaskGITPrior), []
    prior.network.register_forward_hook(lambda *_: forwards.append(1))
    known = tokens.clone()
    known[0, :] = -1
    known[1, 2:4] = -1
    drawn = prior.sample(3, known=known, iterations=iterations)
    assert len(forwards) == iterations
    assert torch.equal(drawn[known >= 0], tokens[known >= 0])
    assert int(drawn.min()) >= 0 and int(drawn.max()) < 7


def test_maskgit_learns_from_context():
    """All tokens of a sequence are equal: one that is seen tells the others."""
    torch.manual_seed(0)
    prior = MaskGITPrior(4, 6, layers=2, heads=2, width=32, dropout=0.0)
    optimizer = torch.optim.Adam(prior.parameters(), lr=3e-3)
    for _ in range(150):
        batch = torch.randint(4, (32, 1)).expand(-1, 6)
        optimizer.zero_grad()
        prior.loss(batch).backward()
        optimizer.step()
    batch = torch.arange(4)[:, None].repeat(1, 6)
    one = torch.zeros(4, 6, dtype=torch.bool)
    one[:, 3] = True
    loss = prior.eval().score(prior(batch.masked_fill(one, prior.mask_token)), batch, one)
    # log 4 is all that a prior knows without context
    assert float(loss.detach()) < math.log(4) / 4


def test_schedules():
    config = PriorConfig(steps=101, rise=0.1, lr=1.0)
    assert {PriorConfig(steps=101, model="maskgit").keep_at(step) for step in range(101)} == {1.0}
    assert PriorConfig(steps=101, model="maskgit", keep_start=0.5).keep_at(50) == pytest.approx(0.75)
    assert config.keep_at(0) == 0.5 and config.keep_at(100) == 0.95
    assert config.keep_at(50) == pytest.approx(0.725)
    assert config.lr_at(0) == pytest.approx(0.1) and config.lr_at(10) == pytest.approx(1.0)
    assert config.lr_at(100) == pytest.approx(0.01)
    assert all(config.lr_at(step) > config.lr_at(step + 1) for step in range(10, 100))
    assert PriorConfig.from_json(config.to_json()) == config and "gpt-diveq" in PRESETS


@pytest.mark.parametrize(
    ("field", "value"), [("lr", 0.0), ("keep_end", 1.5), ("heads", 3), ("model", "other"), ("steps", 0)]
)
def test_a_run_that_cannot_be_is_refused(field, value):
    with pytest.raises(RunError, match=r"^prior: "):
        PriorConfig(**{field: value})


@pytest.mark.parametrize("arguments", [{"temperature": 0.0}, {"top_k": 0}, {"temperature": -1.0}])
def test_sampling_refuses_what_it_cannot_do(arguments):
    with pytest.raises(ValueError, match=" must "):
        make(GPTPrior).sample(1, **arguments)


@pytest.mark.parametrize("name", [None, *PRESETS])
def test_a_recipe_gives_the_command_its_defaults(name, monkeypatch):
    asked = []
    monkeypatch.setattr("vqkernels.cli.prior.run", lambda config, resume: asked.append((config, resume)) or 0)
    assert main(["prior", *(["--preset", name] if name else []), "--lr", "0.5", "--resume"]) == 0
    assert asked == [(replace(PRESETS[name or "small"], lr=0.5), True)]


def test_a_recipe_that_is_not_there_is_refused(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["prior", "--preset", "vqgan"])
    assert caught.value.code == 2 and "maskgit-slim" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["tokens", "prior", "sample", "compare", "evaluate"])
def test_several_processes_are_refused(command, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert main([command]) == 2
    assert (
        f"{command}: launcher must start one process; got 2. Use torchrun for train"
        in capsys.readouterr().err
    )
