"""Choosing, forcing, asking and refusing backends."""

import os
import subprocess
import sys

import pytest
import torch

import vqkernels as vq
from vqkernels import BackendError, dispatch, native
from vqkernels.ops import OPS

X, C = torch.randn(6, 4), torch.randn(5, 4)


def test_default_order():
    op = OPS["nearest_code"]
    assert op.select(X, C).name == ("reference" if native.MISSING else "native")
    reasons = op.explain(X, C)
    assert list(reasons) == ["native", "reference", "triton"]
    assert reasons["reference"] is None and reasons["native"] == native.MISSING
    assert list(op.explain_for(torch.device("cuda"))) == ["triton", "native", "reference"]


def test_argument_over_block_over_environment(monkeypatch):
    op = OPS["nearest_code"]
    monkeypatch.setattr(dispatch, "_forced", "reference")
    assert op.select(X, C).name == "reference"
    with vq.use_backend("triton"):
        assert op.select(X, C, backend="reference").name == "reference"
        if os.environ.get("TRITON_INTERPRET") != "1":
            with pytest.raises(BackendError, match="backend 'triton' cannot run these inputs"):
                op.select(X, C)
    assert op.select(X, C).name == "reference"


def test_block_is_undone_by_an_exception():
    before = dispatch._forced
    with pytest.raises(BackendError), vq.use_backend("reference"):
        vq.nearest_code(X, C, backend="nobody")
    assert dispatch._forced == before


def test_environment():
    code = "import torch, vqkernels as vq; print(vq.ops.OPS['nearest_code'].select(torch.ones(1, 1), torch.ones(1, 1)).name)"
    env = os.environ | {"VQKERNELS_BACKEND": "reference"}
    ran = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert ran.stdout.strip() == "reference", ran.stderr
    ran = subprocess.run(
        [sys.executable, "-c", code], env=env | {"VQKERNELS_BACKEND": "cuda"}, capture_output=True, text=True
    )
    assert "backend must be one of 'native', 'triton', 'reference'; got 'cuda'" in ran.stderr


def test_schemas_agree():
    """One schema per op, whatever the backend; csrc must say the same as ops."""
    for name, op in OPS.items():
        schemas = {
            str(b.run._schema).split("::")[1] for b in op.backends.values() if hasattr(b.run, "_schema")
        }
        assert len(schemas) == 1, (name, schemas)


def test_every_backend_of_every_op_is_explained():
    for op in OPS.values():
        for device in ("cpu", "cuda", "mps"):
            reasons = op.explain_for(torch.device(device))
            assert set(reasons) == set(dispatch.BACKENDS)
            assert all(reason is None or reason.strip() for reason in reasons.values())
