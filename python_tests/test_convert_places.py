"""convert: quantizers that no submodule table holds."""

import torch
from torch import nn
from toy_peer import Model, Peer, ToyFace

from vqkernels import convert


def test_nested_lists_and_scripted_neighbours():
    model = Model(Peer(8, 32))
    model.others = [[Peer(8, 32)], {"a": [model.quantizer]}]
    # a table that holds itself has an end
    model.others.append(model.others)
    model.scripted = torch.jit.script(nn.BatchNorm1d(8))
    report = convert(model, verify=torch.randn(4, 8))
    assert {type(model.quantizer), type(model.others[0][0])} == {ToyFace} and not report.left
    assert model.others[1]["a"][0] is model.quantizer and "others[1]['a'][0]" in report.rows[0].path
    assert model.scripted.training


class Aside(nn.Module):
    """A module that only a list holds."""

    def __init__(self):
        super().__init__()
        self.blocks = [nn.Sequential(nn.BatchNorm1d(8), Peer(8, 32))]

    def forward(self, x):
        return self.blocks[0](x)


def test_verification_leaves_what_a_list_holds():
    model = Aside()
    norm = model.blocks[0][0]
    assert convert(model, verify=torch.randn(9, 8)).verified
    assert norm.training and norm.num_batches_tracked == 0


def test_what_a_plain_attribute_holds():
    whole = nn.ModuleDict({"model": Model(Peer(8, 32)), "other": Peer(8, 32)})
    model = whole["model"]
    model.blocks = [nn.Sequential(Peer(8, 32))]
    # a way up: what hangs there was not asked for
    object.__setattr__(model, "whole", whole)
    object.__setattr__(model.decoder, "above", model)
    report = convert(model, strict=True)
    assert [row.path for row in report.rows] == ["quantizer", "blocks[0].0"]
    assert type(model.blocks[0][0]) is ToyFace and type(whole["other"]) is Peer
