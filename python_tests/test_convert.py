"""convert: what it finds, what it swaps, and what it leaves alone; on a toy peer, whatever is installed."""

import copy
import functools
import io
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import toy_peer
from torch import nn
from toy_peer import Changed, Model, Other, Peer, Renamed, ToyFace

from vqkernels import convert
from vqkernels.compat.conversion import ConversionError, VerificationError


def tensors(model):
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def snapshot(model):
    """All that a conversion must leave alone: objects, values, modes and the random state."""
    held = [(name, tensor, tensor.clone()) for name, tensor in tensors(model).items()]
    modes = [(module, module.training) for module in model.modules()]
    return held, modes, torch.get_rng_state()


def unchanged(model, before, modules=True):
    held, modes, state = before
    now = tensors(model)
    assert [name for name, *_ in held] == list(now)
    for name, tensor, value in held:
        assert now[name] is tensor, name
        assert torch.equal(tensor, value), name
    if modules:
        assert [module for module, _ in modes] == list(model.modules())
        assert all(module.training == mode for module, mode in modes)
    assert torch.equal(state, torch.get_rng_state())


def test_tensors_keep_their_identity():
    model = Model(Peer(8, 32))
    model.quantizer.eval()
    model.quantizer.codebook.requires_grad_(False)
    before = snapshot(model)
    report = convert(model)
    assert report.model is model and isinstance(model.quantizer, ToyFace)
    unchanged(model, before, modules=False)
    assert model.training and not model.quantizer.training
    assert not model.quantizer.codebook.requires_grad
    (row,) = report.rows
    assert (row.paths, row.status, row.reason) == (("quantizer",), "converted", None)
    assert row.options == {"dim": 8, "codes": 32}
    assert not convert(model).rows


def test_a_dry_run_changes_nothing():
    model, x = Model(Peer(8, 32)), torch.randn(16, 8)
    before = snapshot(model)
    report = convert(model, dry_run=True, verify=x)
    unchanged(model, before)
    assert isinstance(model.quantizer, Peer)
    assert report.rows[0].status == "convertible" and report.verified


def test_the_model_itself_may_be_a_quantizer():
    peer = Peer(8, 32)
    report = convert(peer, verify=torch.randn(16, 8))
    assert isinstance(report.model, ToyFace) and report.verified and report.rows[0].paths == ("",)
    assert "(the model)" in str(report)


def test_a_quantizer_in_several_places_becomes_one_face():
    shared, single = Peer(8, 32), Peer(8, 32)
    model = nn.ModuleDict({"a": nn.Sequential(nn.Identity(), shared), "b": shared})
    model.hidden = [single]
    model.again = {"one": single}
    object.__setattr__(model, "alias", shared)
    report = convert(model)
    assert report.rows[0].paths == ("a.1", "b", "alias")
    assert report.rows[1].paths == ("hidden[0]", "again['one']")
    assert model["a"][1] is model["b"] is model.alias and isinstance(model.alias, ToyFace)
    assert model.hidden[0] is model.again["one"] and isinstance(model.hidden[0], ToyFace)


def test_subclasses():
    model = nn.ModuleList([Renamed(8), Changed(8, 32)])
    report = convert(model)
    assert isinstance(model[0], ToyFace) and type(model[1]) is Changed
    assert report.left[0].reason.endswith("Changed changes or adds forward, which a face does not have.")


def weight_normed():
    peer = Peer(8, 32)
    peer.project = nn.Linear(8, 8)
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(peer.project)
    return peer


def parametrized():
    peer = Peer(8, 32)
    nn.utils.parametrize.register_parametrization(peer, "codebook", nn.Identity())
    return peer


def hooked():
    peer = Peer(8, 32)
    peer.norm.register_forward_hook(lambda *_: None)
    return peer


def replaced():
    peer = Peer(8, 32)
    peer.forward = lambda x: Peer.forward(peer, 2 * x)
    return peer


def grown():
    peer = Peer(8, 32)
    peer.extra = nn.Parameter(torch.zeros(3))
    return peer


def reshaped():
    peer = Peer(8, 32)
    peer.usage = torch.zeros(7)
    return peer


def watched():
    peer = Peer(8, 32)
    peer.register_load_state_dict_pre_hook(lambda *_: None)
    return peer


def in_a_tuple():
    holder = nn.Module()
    holder.both = (Peer(8, 32), nn.Identity())
    return holder


def called_by_a_method_of_it():
    holder = nn.Module()
    holder.quantizer = Peer(8, 32)
    holder.encode = functools.partial(holder.quantizer.forward)
    return holder


def compiled():
    peer = Peer(8, 32)
    peer.compile(backend="eager")
    return peer


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (weight_normed, "A hook computes its weights"),
        (parametrized, "remove_parametrizations"),
        (hooked, "inner module norm has hooks"),
        (replaced, "Its method forward was replaced"),
        (grown, "extra on one side only"),
        (reshaped, r"got \(7,\) for \(32,\)"),
        (watched, "hooks of its state dict"),
        (in_a_tuple, r"at odd\.both\[0\] would go on with the peer"),
        (called_by_a_method_of_it, r"at odd\.encode would go on with the peer"),
        (compiled, "compiled by itself"),
        (lambda: torch.compile(Peer(8, 32), backend="eager"), "compiled by itself"),
        (
            lambda: Peer(8, 32, rare=True),
            "ToyFace: rare must be left at what vqkernels serves; got True. Leave it out.",
        ),
    ],
)
def test_left_with_a_reason(make, words):
    model = nn.ModuleDict({"odd": make(), "plain": Peer(8, 32)})
    before = snapshot(model)
    with pytest.raises(ConversionError, match=words):
        convert(model, strict=True)
    unchanged(model, before)
    report = convert(model)
    assert not any(isinstance(module, ToyFace) for module in model["odd"].modules())
    assert isinstance(model["plain"], ToyFace)
    assert len(report.left) == 1


def test_sharded_models_are_refused():
    class FSDPModule(nn.Sequential):
        pass

    model = FSDPModule(Peer(8, 32))
    with pytest.raises(
        ConversionError, match=r"must be whole; got 0 with sharded parameters\. Convert it before"
    ):
        convert(model)
    assert type(model[0]) is Peer


def test_hooks_go_on_and_can_be_removed():
    model, seen = Model(Peer(8, 32)).eval(), []
    handles = [
        model.quantizer.register_forward_hook(lambda *_: seen.append("after")),
        model.quantizer.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append("before"), with_kwargs=True
        ),
        model.quantizer.register_full_backward_hook(lambda *_: seen.append("backward")),
    ]
    convert(model, verify=torch.randn(16, 8))
    assert not seen
    model(torch.randn(16, 8))[0].sum().backward()
    assert seen == ["before", "after", "backward"]
    for handle in handles:
        handle.remove()
    model(torch.randn(16, 8))
    assert len(seen) == 3


def test_verification_counts_the_peers_errors():
    model = Model(Peer(8, 256))
    model.quantizer.codebook.data.mul_(0.1).add_(100)
    model.encoder = nn.Identity()
    x = 100 + 0.1 * torch.randn(2000, 8)
    before = snapshot(model)
    report = convert(model, verify=(x,))
    unchanged(model, before, modules=False)
    (check,) = report.checks
    codes = model.quantizer.codebook.detach()
    right = torch.cdist(x.double(), codes.double(), compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
    assert torch.equal(model.quantizer(x)[1], right)
    wrong = int((Peer.forward(copy.deepcopy(model.quantizer), x)[1] != right).sum())
    assert wrong > 500
    assert (check.rows, check.calls, check.differing, check.peer_farther) == (2000, 1, wrong, wrong)
    assert (check.ties, check.ours_farther, report.verified) == (0, 0, True)
    assert 0 <= check.output_difference <= check.output_bound
    # and at any time after, wherever the model has gone
    assert report.verify({"x": x}).checks == (check,)
    model.double()
    (check,) = report.verify(x.double()).checks
    assert check.calls == 1 and not check.failures and check.output_bound < 1e-10


def test_a_face_that_errs_is_not_put_in():
    model, x = nn.Sequential(Other(8, 32), nn.Identity()), torch.randn(64, 8)
    before = snapshot(model)
    with pytest.raises(
        VerificationError, match=r"Our code is farther than the peer's on 64 rows\."
    ) as caught:
        convert(model, verify=x)
    unchanged(model, before)
    assert caught.value.report.checks[0].ours_farther == 64
    report = convert(model, dry_run=True, verify=x)
    assert report.verified is False and "1 failed" in str(report)


def test_what_is_not_called_is_not_verified():
    model = Model(Peer(8, 32))
    model.spare = Peer(8, 16)
    report = convert(model, verify=torch.randn(4, 8))
    assert report.verified is False and report.checks[1].calls == 0
    assert "1 not called" in str(report)


def test_training_goes_on_with_the_same_optimizer():
    torch.manual_seed(0)
    model = Model(Peer(8, 32))
    model.encoder[2].p = 0.0
    twin = copy.deepcopy(model)
    batches = torch.randn(6, 64, 8)
    histories = []
    for one, at in ((model, 3), (twin, None)):
        optimizer = torch.optim.Adam(one.parameters(), lr=1e-2)
        losses = []
        for step, x in enumerate(batches):
            if step == at:
                moments = optimizer.state[one.quantizer.codebook]["exp_avg"]
                convert(one)
                assert optimizer.state[one.quantizer.codebook]["exp_avg"] is moments
            out, loss = one(x)
            total = (out - x).square().mean() + loss
            total.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(total.item())
        histories.append(losses)
    # the same sums in the same order: the search alone is another
    assert histories[0] == histories[1]
    assert torch.equal(model.quantizer.usage, twin.quantizer.usage)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype):
    model = nn.Sequential(Peer(8, 32).to(dtype))
    report = convert(model, verify=torch.randn(500, 8).to(dtype))
    assert model[0].codebook.dtype == dtype and report.verified, str(report)


def test_meta():
    with torch.device("meta"):
        model = Model(Peer(8, 32))
    with pytest.raises(ValueError, match="have values to verify on; got the meta device"):
        convert(model, verify=torch.randn(4, 8))
    assert convert(model).converted and model.quantizer.codebook.is_meta


def test_a_compiled_model_compiles_anew():
    model = Model(Peer(8, 256)).eval()
    model.quantizer.codebook.data.mul_(0.1).add_(100)
    model.encoder = nn.Identity()
    x = 100 + 0.1 * torch.randn(500, 8)
    fast = torch.compile(model, backend="eager")
    with torch.no_grad():
        old = fast(x)[0]
        report = convert(fast, verify=x)
        new = fast(x)[0]
        assert report.rows[0].paths == ("_orig_mod.quantizer",)
        assert not torch.equal(old, new) and torch.equal(new, model(x)[0])


def test_copies_and_checkpoints():
    model = Model(Peer(8, 32)).eval()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    convert(model)
    assert model.state_dict().keys() == state.keys()
    Model(Peer(8, 32)).load_state_dict(model.state_dict())
    model.load_state_dict(state)
    x = torch.randn(16, 8)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
        assert isinstance(other.quantizer, ToyFace)
        assert torch.equal(other(x)[0], model(x)[0])


def test_the_report_is_plain():
    model = nn.ModuleDict({"a" * 30: nn.Sequential(nn.ModuleDict({"b" * 30: Peer(8, 32, beta=1.0)}))})
    model["rare"] = Peer(8, 32, rare=True)
    text = str(convert(model))
    assert max(map(len, text.splitlines())) <= 100
    assert "Quantizers: 1 converted, 1 left as they are." in text and "beta=1.0" in text
    assert "Peer: what vqkernels does otherwise" in text and "- Codes are counted in training alone." in text
    # what two classes share is said once
    both = str(convert(nn.ModuleList([Peer(8, 32), Other(8, 32)])))
    assert "Peer, Other: what" in both and both.count("- Codes are counted") == 1
    report = convert(Model(Peer(8, 32)), verify=torch.randn(4, 8))
    found = json.loads(json.dumps(report.to_dict()))
    assert found["verified"] is True and found["rows"][0]["options"] == {"dim": 8, "codes": 32}
    assert repr(report) == "ConversionReport(1 converted, 0 left)"
    assert str(convert(nn.Linear(2, 2))) == "No quantizer of a library that vqkernels knows."


def test_wrong_arguments():
    with pytest.raises(TypeError, match=r"convert: model must be a torch.nn.Module; got str\. "):
        convert("model")
    with pytest.raises(TypeError, match="convert: verify must be a tensor, a tuple of arguments or a dict"):
        convert(Model(Peer(8, 32)), verify=3)


def test_nothing_is_imported():
    code = (
        "import sys, torch; from torch import nn; import vqkernels; from vqkernels import convert;"
        "model = nn.Sequential(nn.Linear(2, 2)); assert not convert(model).rows;"
        "names = {'vector_quantize_pytorch', 'diveq', 'vqtorch', 'taming'};"
        "bad = [n for n in sys.modules if n.split('.')[0] in names or n.startswith('vqkernels.compat.')];"
        "own = {'agreement', 'conversion', 'face', 'registry', 'report', 'verification'};"
        "assert {n.split('.')[-1] for n in bad} == own, bad; assert 'torch._dynamo' not in sys.modules"
    )
    root = Path(toy_peer.__file__).parent.parent
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert ran.returncode == 0, ran.stderr
