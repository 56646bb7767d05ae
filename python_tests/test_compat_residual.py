"""The faces of ResidualVQ and GroupedResidualVQ beside the installed vector-quantize-pytorch."""

import pytest
import torch
from face_pairs import assert_near, assert_not_farther, assert_same, pair, run

peers = pytest.importorskip("vector_quantize_pytorch")

from vqkernels.compat.face import UnservedOption  # noqa: E402
from vqkernels.compat.vector_quantize_pytorch import GroupedResidualVQ, ResidualVQ  # noqa: E402

D, K, Q = 6, 16, 3
ROWS = (2, 12, D)
# per stage two reductions over D for rotation and norms each, forward and backward, on top of the stages before;
# losses are means over the rows
ROUNDINGS = 8 * D * Q * Q + 2 * 12
# a moving average adds up at most all rows of a step, in each of three steps
STATE_ROUNDINGS = 3 * (2 * 12 * Q + 4) + ROUNDINGS

CASES = {
    "averages": {},
    "shared": {"shared_codebook": True},
    "learned": {"learnable_codebook": True, "ema_update": False},
    "sizes": {"codebook_size": (7, 5, 9), "num_quantizers": None},
    "projected": {"codebook_dim": 4},
    "cosine": {"use_cosine_sim": True},
    "straight through": {"rotation_trick": False, "quant_grad_frac": 0.5, "commitment_weight": 0.25},
    "dropout": {"quantize_dropout": True, "quantize_dropout_cutoff_index": 1},
    "dropout in pairs": {"quantize_dropout": True, "quantize_dropout_multiple_of": 2},
    "beam": {"beam_size": 2, "rotation_trick": False, "beam_score_quantizer_weights": [1.0, 0.5, 2.0]},
    "shared beam": {"beam_size": 3, "eval_beam_size": 2, "shared_codebook": True, "rotation_trick": False},
}


def named(**options):
    return {"dim": D, "num_quantizers": Q, "codebook_size": K} | options


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_residual_is_its_peer(case, masked):
    """Three steps of training, then evaluation: outputs, gradients, losses and the state that follows."""
    options = named(**CASES[case])
    mask = torch.arange(12) < torch.tensor([[12], [7]]) if masked else None
    face, peer, adopted = pair(ResidualVQ, peers.ResidualVQ, **options)
    for step in range(4):
        if step == 3:
            for module in (face, peer, adopted):
                module.eval()
        x = torch.randn(ROWS)
        call = {"mask": mask, "return_all_codes": True, "rand_quantize_dropout_fixed_seed": step}
        for module in (face, adopted):
            # what the search sees, before the codes move
            module.before = [layer._codebook.embed.detach().clone() for layer in module.layers]
        want = run(peer, x, **call)
        for module in (face, adopted):
            got = run(module, x, **call)
            assert torch.equal(got[0][1], want[0][1])
            if "learned" not in case and masked:
                # the peer weighs masked rows into the loss behind projections and cosine
                assert_near(got[0][0], want[0][0], ROUNDINGS)
            else:
                assert_same(got, want, STATE_ROUNDINGS)
        for key, theirs in peer.state_dict().items():
            for module in (face, adopted):
                assert_near(module.state_dict()[key], theirs, STATE_ROUNDINGS)
    # codes of all stages and their sum are what the peer decodes
    indices = want[0][1]
    assert_near(face.get_codes_from_indices(indices), peer.get_codes_from_indices(indices), STATE_ROUNDINGS)
    assert_near(face.get_output_from_indices(indices), peer.get_output_from_indices(indices), STATE_ROUNDINGS)
