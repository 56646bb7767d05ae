"""Profiles of training steps: whose time it is, what is written, and that nothing is left of it."""

import copy
import gzip
import json
import os
import random
import types

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity

import vqkernels as vq
from vqkernels.nn import Residual, VectorQuantizer, build
from vqkernels.ops import OPS
from vqkernels.profiling import compare_convert, profile, quantizers_of, ranges
from vqkernels.profiling.attribution import spent
from vqkernels.testing import DEVICE

D, K = 6, 20


class Model(nn.Module):
    """An encoder, a quantizer, a decoder."""

    def __init__(self, quantizer):
        super().__init__()
        self.encode, self.quantizer, self.decode = nn.Linear(D, D), quantizer, nn.Linear(D, D)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x):
        found = self.quantizer(self.dropout(self.encode(x)))
        return self.decode(found[0]), found[2]


def batch():
    return torch.randn(4, 9, D, device=DEVICE)


def model(name="diveq"):
    return Model(build(name, dim=D, num_codes=K)).to(DEVICE)


def events(run):
    """Names of what torch's profiler sees of a call."""
    with torch.profiler.profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
        run()
    return profiler.events()


def test_a_profile_tells_quantizer_and_ops():
    told = profile(model(), batch(), steps=2)
    assert [(each.path, each.kind) for each in told.quantizers] == [("quantizer", "VectorQuantizer")]
    one = told.quantizers[0]
    assert one.forward_ms > 0 and one.backward_ms > 0 and 0 < told.share < 1
    assert told.quantizer_ms == pytest.approx(sum(each.ms for each in told.ops))
    assert told.quantizer_ms == pytest.approx(told.share * told.profiled_ms)
    names = {each.op.split("::")[-1]: each for each in told.ops if each.op.startswith("vqkernels")}
    assert {"nearest_code", "directional", "directional_backward"} <= set(names)
    assert names["nearest_code"].calls == 1 and names["directional_backward"].calls == 1
    for word in ("quantizers take", "VectorQuantizer", "nearest_code", "backward ms", "op inside quantizers"):
        assert word in str(told)
    stored = json.loads(json.dumps(told.to_dict()))
    assert stored["share"] == told.share and stored["quantizers"][0]["path"] == "quantizer"


def test_the_parts_are_the_whole():
    """Time of the quantizer, and of the rest, add up to the step as the profiler saw it."""
    made = model()
    with ranges(made, nvtx=False):
        seen = events(lambda: step(made))
    found = spent(seen, {"vqkernels: quantizer": "quantizer"}, on_device=False)
    roots = [each for each in seen if each.name.startswith("vqkernels step: ")]
    assert sum(each.microseconds for each in found) == pytest.approx(sum(r.cpu_time_total for r in roots))
    # what only the backward of the decoder and of the encoder do is none of the quantizer's
    inside = {each.op for each in found if each.path == "quantizer"}
    assert not inside & {"aten::addmm", "aten::mm"} and {each.phase for each in found} == {
        "forward",
        "backward",
    }
    nodes = {each.op for each in found if each.path == "quantizer" and each.phase == "backward"}
    assert any("directional_backward" in each for each in nodes)


def step(made):
    with torch.autograd.profiler.record_function("vqkernels step: forward"):
        value = made(batch())[0].square().mean()
    with torch.autograd.profiler.record_function("vqkernels step: backward"):
        value.backward()


@pytest.mark.parametrize("name", ["diveq", "ema"])
def test_nothing_is_left_of_a_profile(name):
    made, x = model(name).eval(), batch().requires_grad_()
    optimizer = torch.optim.Adam(made.parameters(), 0.1)
    made.train()
    made(x)[0].square().mean().backward()
    optimizer.step()
    made.quantizer.eval()
    x.grad = None
    grads = [None if p.grad is None else p.grad.clone() for p in made.parameters()]
    state, moments = copy.deepcopy(made.state_dict()), copy.deepcopy(optimizer.state_dict())
    modes = [each.training for each in made.modules()]
    hooks = [len(each._forward_hooks) + len(each._forward_pre_hooks) for each in made.modules()]
    drawn, rolled = torch.get_rng_state(), random.getstate()
    profile(made, x, optimizer=optimizer, steps=1)
    torch.testing.assert_close(made.state_dict(), state, rtol=0, atol=0)
    torch.testing.assert_close(optimizer.state_dict(), moments, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), drawn) and random.getstate() == rolled
    assert [each.training for each in made.modules()] == modes and x.grad is None
    assert [len(each._forward_hooks) + len(each._forward_pre_hooks) for each in made.modules()] == hooks
    assert "commit" not in made.quantizer.__dict__
    for parameter, grad in zip(made.parameters(), grads, strict=True):
        assert (parameter.grad is None) == (grad is None) and (
            grad is None or torch.equal(parameter.grad, grad)
        )


def test_commits_that_follow_the_optimizer_count():
    made = model("ema")
    optimizer = torch.optim.SGD(made.parameters(), 0.1)
    made.quantizer.follow(optimizer)
    assert profile(made, batch(), optimizer=optimizer, steps=1).quantizers[0].optimizer_ms > 0


def test_a_recomputed_forward_counts_as_backward():
    class Saving(Model):
        def forward(self, x):
            run = lambda h: self.quantizer(h)[0]
            h = self.encode(x)
            return self.decode(torch.utils.checkpoint.checkpoint(run, h, use_reentrant=False))

    made = Saving(build("diveq", dim=D, num_codes=K)).to(DEVICE)
    told = profile(made, batch(), steps=1)
    searches = [each for each in told.ops if each.op.endswith("::nearest_code")]
    assert searches[0].calls == 2


def test_a_trace_that_cannot_be_is_refused_before_any_step(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(
        ValueError, match=r"profile: trace must be a file; got .*, a folder\. Pass .*trace\.json\."
    ):
        profile(broken(), batch(), trace=tmp_path)
    with pytest.raises(RuntimeError, match=r"profile: trace must lie in a folder.*Pass another trace=\."):
        profile(broken(), batch(), trace=tmp_path / "file/trace.json")


def test_torchs_profiler_is_quiet(capfd, monkeypatch):
    monkeypatch.delenv("KINETO_LOG_LEVEL", raising=False)
    profile(model().cpu(), batch().cpu(), steps=1)
    assert capfd.readouterr().err == "" and "KINETO_LOG_LEVEL" not in os.environ


def test_a_quantizer_alone_has_a_backward():
    """Its latents get a gradient, where a batch from data has none."""
    told = profile(build("ema", dim=D, num_codes=K).to(DEVICE), batch(), steps=1)
    assert [each.path for each in told.quantizers] == [""] and told.quantizers[0].backward_ms > 0


def test_outputs_are_found_however_they_are_nested():
    class Nested(Model):
        def forward(self, x):
            return {"of": {"parts": [super().forward(x)[0]]}}

    assert profile(Nested(build("ste", dim=D, num_codes=K)).to(DEVICE), batch(), steps=1).share > 0


@pytest.mark.parametrize(
    ("words", "error", "told"),
    [
        ({"optimizer": "adam"}, TypeError, "profile: optimizer must be an Optimizer; got str."),
        (
            {"optimizer": torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1)},
            ValueError,
            "got SGD of 2 others.",
        ),
        ({"loss": "mse"}, TypeError, "profile: loss must be a function; got str."),
    ],
)
def test_what_is_no_optimizer_or_loss_is_refused(words, error, told):
    with pytest.raises(error) as caught:
        profile(broken(), batch(), **words)
    assert told in str(caught.value) and str(caught.value).count("\n") == 0


def test_a_model_without_a_gradient_is_refused_in_a_sentence():
    found = model()
    found.forward = lambda x: None
    with pytest.raises(
        ValueError, match=r"profile: model must return a tensor with a gradient; got NoneType without"
    ):
        profile(found, batch(), steps=1)


def test_a_quantizer_that_did_not_run_is_told():
    found = model()
    found.forward = found.encode.forward
    assert str(profile(found, batch(), steps=1)).endswith("no quantizer ran in these steps")


def broken():
    def fail(x):
        raise AssertionError("a step was made")

    made = model()
    made.forward = fail
    return made


def test_a_trace_is_a_whole_file(tmp_path):
    for name in ("new/trace.json", "new/trace.json.gz"):
        path = tmp_path / name
        profile(model(), batch(), steps=1, trace=path)
        content = path.read_bytes()
        found = json.loads(gzip.decompress(content) if name.endswith("gz") else content)
        names = {str(each.get("name")) for each in found["traceEvents"]}
        assert "vqkernels: quantizer" in names and any(each.endswith("::nearest_code") for each in names)
        assert [each.name for each in path.parent.iterdir()].count(path.name) == 1
    assert not [each for each in (tmp_path / "new").iterdir() if each.name.startswith(".")]


def test_outermost_quantizers_are_found():
    residual = Residual(
        [
            VectorQuantizer(
                build("ste", dim=D, num_codes=K).codebook, build("ste", dim=D, num_codes=K).estimator
            )
            for _ in range(2)
        ]
    )
    made = nn.Sequential(nn.Linear(D, D), residual)
    assert list(quantizers_of(made)) == ["1"] and list(quantizers_of(residual)) == [""]
    told = profile(residual, batch(), steps=1)
    assert "(the model)" in str(told)
    told = profile(nn.Linear(D, D).to(DEVICE), batch(), steps=1)
    assert told.quantizers == () and told.share == 0 and "no quantizer" in str(told)


def test_before_and_after_convert():
    pytest.importorskip("vector_quantize_pytorch")
    from vector_quantize_pytorch import VectorQuantize

    made = Model(VectorQuantize(D, K)).to(DEVICE)
    kind, state = type(made.quantizer), copy.deepcopy(made.state_dict())
    told = compare_convert(made, batch(), steps=1)
    assert type(made.quantizer) is kind
    torch.testing.assert_close(made.state_dict(), state, rtol=0, atol=0)
    assert not any(each.op.startswith("vqkernels") for each in told.before.ops)
    assert any(each.op.startswith("vqkernels") for each in told.after.ops)
    assert told.faster > 0 and "before" in str(told) and json.loads(json.dumps(told.to_dict()))["faster"] > 0


@pytest.mark.parametrize(
    ("made", "loss", "told"),
    [
        (
            nn.Linear(D, D),
            lambda output: output,
            "profile: loss must give a 0-d tensor with a gradient; got shape",
        ),
        (nn.Identity(), torch.Tensor.mean, "got shape () without a gradient"),
        (
            nn.Linear(D, D),
            lambda output: 1.0,
            "profile: loss must give a 0-d tensor with a gradient; got float.",
        ),
    ],
)
def test_what_cannot_be_profiled_is_refused(made, loss, told):
    with pytest.raises(ValueError, match="profile: loss must") as refused:
        profile(made.to(DEVICE), batch(), loss=loss)
    assert told in str(refused.value)


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="profile: steps must be at least 1; got 0"):
        profile(model(), batch(), steps=0)
    made = model()
    made.kept = made.encode(batch())
    with pytest.raises(ValueError, match="profile: model must be one that can be copied"):
        profile(made, batch())


def test_batches_of_any_form():
    class Two(Model):
        def forward(self, x, *, scale):
            return types.SimpleNamespace(loss=super().forward(x * scale)[0].square().mean())

    made = Two(build("diveq", dim=D, num_codes=K)).to(DEVICE)
    assert profile(made, {"x": batch(), "scale": torch.ones((), device=DEVICE)}, steps=1).share > 0
    assert profile(model(), (batch(),), loss=lambda output: output[0].mean(), steps=1).share > 0


def test_ranges_leave_nothing_and_survive_an_error():
    made = model()
    with ranges(made, nvtx=False) as found:
        assert list(found) == ["quantizer"]
        with pytest.raises(ValueError, match="x must"):
            made.quantizer(torch.randn(3, D + 1, device=DEVICE))
        names = [each.name for each in events(lambda: made(batch()))]
        assert names.count("vqkernels: quantizer") == 1
    assert not made.quantizer._forward_hooks and not made.quantizer._forward_pre_hooks
    assert "vqkernels: quantizer" not in [each.name for each in events(lambda: made(batch()))]


def calls():
    """Every op in both directions; of the methods, some draw, some add up codes."""
    for name in ("diveq", "ste", "ema", "gumbel", "stochastic", "lfq"):
        d = 4 if name == "lfq" else D
        made = build(name, dim=d, num_codes=16).to(DEVICE)
        yield (
            lambda made=made, d=d: (
                made(torch.randn(40, d, device=DEVICE, requires_grad=True)).z.sum().backward()
            )
        )
    x, codes = (torch.randn(n, D, device=DEVICE, requires_grad=True) for n in (40, 9))
    yield lambda: vq.sf_diveq(x, codes).z.sum().backward()
    yield lambda: vq.nearest_segment(x.detach(), codes.detach())
    yield lambda: vq.ops.unit_rows(x).sum().backward()
    yield lambda: vq.code_sums(x.detach(), torch.zeros(40, dtype=torch.int64, device=DEVICE), 3)


def test_every_op_has_a_range_in_both_directions(backend):
    """torch names the ops of every backend by itself, forward and backward."""

    def run():
        for call in calls():
            try:
                with vq.use_backend(backend):
                    call()
            except vq.BackendError:
                # one of its ops has no such body
                call()

    names = {each.name for each in events(run)}
    prefix = {"native": "vqkernels", "triton": "vqkernels_triton", "reference": "vqkernels_reference"}[
        backend
    ]
    seen = {each.removeprefix(f"{prefix}::") for each in names if each.startswith(f"{prefix}::")}
    able = {name for name, op in OPS.items() if op.explain_for(DEVICE, (torch.float32,))[backend] is None}
    # noise is a part of the others, for which nobody calls it
    assert able - {"philox"} <= seen
