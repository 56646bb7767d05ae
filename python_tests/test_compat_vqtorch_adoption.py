"""Stand-ins for live layers of vqtorch hand their tensors over to faces."""

import pytest
import torch
from torch import nn

from vqkernels.compat.face import UnservedOption
from vqkernels.compat.vqtorch.nn import GroupVectorQuant, VectorQuant

D, K = 8, 24


class ReplaceLRU:
    """A stand-in for the hook of a live layer."""

    rho, timeout, policy = 0.02, 6, "input_random"

    def __call__(self, module, inputs, outputs):
        raise AssertionError


def data_dependent_init_forward_hook(module, inputs, outputs):
    raise AssertionError


class LiveLayer(nn.Module):
    """A stand-in with the attributes of a live layer of vqtorch."""

    enabled = True

    def __init__(self, groups=None, share=True):
        super().__init__()
        self.feature_size, self.num_codes, self.beta, self.nu, self.dim, self.topk = D, K, 1.0, 0.5, -1, 1
        self.norm, self.codebook_norm, self.norm_layer = "bn", None, nn.BatchNorm2d(D)
        self.register_buffer("data_initialized", torch.ones(1))
        self.register_forward_hook(data_dependent_init_forward_hook)
        self.codebook = nn.Embedding(K, D)
        self.inplace_codebook_optimizer = torch.optim.SGD(self.codebook.parameters(), lr=1.0)
        if groups is not None:
            self.groups, self.share = groups, share
            self.codebook = nn.Embedding(K, D // groups)
        self.affine_transform = nn.Module()
        self.affine_transform.scale = nn.Parameter(torch.zeros(2, self.codebook.embedding_dim))
        self.affine_transform.bias = nn.Parameter(torch.zeros(2, self.codebook.embedding_dim))
        self.affine_transform.lr_scale, self.affine_transform.num_groups = 4.0, 2
        self.affine_transform.use_running_statistics = False
        self.register_forward_hook(ReplaceLRU())
        self.register_buffer("_counts", torch.full((K,), 5.0))
        self.seen = []
        self.register_forward_hook(lambda module, inputs, outputs: self.seen.append(outputs[1]["q"]))


@pytest.mark.parametrize("groups", [None, 2])
def test_a_live_layer_hands_over_its_tensors(groups):
    live = LiveLayer(groups)
    cls = VectorQuant if groups is None else GroupVectorQuant
    before = torch.get_rng_state()
    face = cls.adopt(live)
    assert torch.equal(torch.get_rng_state(), before)
    ours, theirs = dict(face.named_parameters()), dict(live.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(ours[key] is theirs[key] for key in ours)
    assert face._counts is live._counts
    assert (face.beta, face.nu, face.affine_lr, face.replace_freq, face.replace_rho) == (
        1.0,
        0.5,
        4.0,
        6,
        0.02,
    )
    optimizer = live.inplace_codebook_optimizer
    assert face.inplace_codebook_optimizer is optimizer
    assert optimizer.param_groups[0]["params"][0] is live.codebook.weight
    # the hooks that were the peer's machinery are gone, the user's stays
    live.dim = face.dim = 1
    codes = live.codebook.weight.detach().clone()
    _, found = face(torch.randn(2, D, 3, 3))
    assert torch.equal(live.seen[0], found["q"])
    assert not torch.equal(live.codebook.weight, codes)


def test_a_live_layer_that_was_changed_by_hand_is_refused():
    for change in (
        lambda live: setattr(live, "topk", 2),
        lambda live: setattr(live.affine_transform, "use_running_statistics", True),
        lambda live: setattr(list(live._forward_hooks.values())[1], "policy", "self"),
    ):
        live = LiveLayer()
        change(live)
        with pytest.raises(UnservedOption):
            VectorQuant.adopt(live)
