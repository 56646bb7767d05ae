"""What options of a `ResidualVQ` say together, and which ones are refused."""

from __future__ import annotations

from vqkernels.checks import refuse
from vqkernels.compat.face import unserved


def codebook_sizes(num_quantizers: int | None, codebook_size: int | tuple[int, ...]) -> tuple[int, ...]:
    """K of each stage.

    Raises:
        ValueError: the number of stages is not known, or is another one than that of sizes.
    """
    if isinstance(codebook_size, tuple):
        if num_quantizers not in (None, len(codebook_size)):
            fix = f"Pass {len(codebook_size)}, or leave it out"
            refuse(ValueError, "ResidualVQ", "num_quantizers", "be that of sizes", num_quantizers, fix)
        return codebook_size
    if num_quantizers is None:
        fix = "Pass the number of stages"
        refuse(ValueError, "ResidualVQ", "num_quantizers", "be given with one codebook_size", None, fix)
    return (codebook_size,) * num_quantizers


def no_neural_codebook() -> None:
    """Refuse neural codebooks."""
    fix = "Leave it out, or keep the peer's module: it forms N x K codes of D features"
    unserved("ResidualVQ", "implicit_neural_codebook", True, fix)


def check_residual(
    heads: int,
    neural: bool,
    beam: int | None,
    eval_beam: int | None,
    cutoff: int,
    vq_kwargs: dict[str, object],
) -> None:
    """Refuse options that are not served, or that contradict each other."""
    name = "ResidualVQ"
    if heads != 1:
        refuse(ValueError, name, "heads", "be 1", heads, "Use GroupedResidualVQ for parts of the features")
    if neural:
        no_neural_codebook()
    if eval_beam is not None and beam is None:
        refuse(ValueError, name, "eval_beam_size", "come with beam_size", eval_beam, "Pass beam_size too")
    if cutoff < 0:
        refuse(ValueError, name, "quantize_dropout_cutoff_index", "not be negative", cutoff, "Pass 0")
    if not vq_kwargs.get("channel_last", True):
        unserved(name, "channel_last", False, "Move the features of x to the end")
    if vq_kwargs.get("accept_3d_fmap", False):
        unserved(name, "accept_3d_fmap", True, "Flatten the volume to (B, N, D)")
