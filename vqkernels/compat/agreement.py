"""Two results of the same call: the same indices, except where float64 says that the peer is wrong."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vqkernels.compat.face import Face


class Check(NamedTuple):
    """What was found for one quantizer, over all of its calls.

    Attributes:
        path: where it is.
        calls: how often the forward of the model called it; 0 says that nothing was verified.
        rows: latents that were quantized.
        differing: rows whose indices differ.
        peer_farther: of these, rows for which the peer's code is farther in float64: the peer errs.
        ties: of these, rows for which neither is farther than the rounding errors of what is searched, or of which this
            cannot be told.
        ours_farther: of these, rows for which our code is farther; a single one is a failure.
        output_difference: the largest |peer - ours| over rows with equal indices.
        output_bound: what it must not exceed: (D + 2) eps max(|x|, |output|), eps of the output's dtype.
        failures: a sentence for each thing that is not as it must be.
        notes: a sentence for each thing that could not be compared.
    """

    path: str
    calls: int = 0
    rows: int = 0
    differing: int = 0
    peer_farther: int = 0
    ties: int = 0
    ours_farther: int = 0
    output_difference: float = 0.0
    output_bound: float = 0.0
    failures: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def plus(self, other: Check) -> Check:
        """The two together."""
        return Check(
            self.path,
            self.calls + other.calls,
            self.rows + other.rows,
            self.differing + other.differing,
            self.peer_farther + other.peer_farther,
            self.ties + other.ties,
            self.ours_farther + other.ours_farther,
            max(self.output_difference, other.output_difference),
            max(self.output_bound, other.output_bound),
            tuple(dict.fromkeys(self.failures + other.failures)),
            tuple(dict.fromkeys(self.notes + other.notes)),
        )


class _Reading(NamedTuple):
    """Rows of an output and of indices; groups and stages are trailing axes of the indices."""

    difference: Tensor  # (R,) float64, the largest of a row
    theirs: Tensor  # (R, G, Q)
    ours: Tensor  # (R, G, Q)
    arrange: Callable[[Tensor], Tensor]


def compare(path: str, face: Face, x: Any, theirs: Any, ours: Any, again: Callable[[], Any]) -> Check:
    """Compare what a peer and its face returned for x.

    Args:
        path: where they stand.
        face: measures distances; in the state in which it was called.
        x: an input.
        theirs: what the peer returned.
        ours: what the face returned.
        again: calls the peer once more: what then differs is drawn at random, and cannot be compared.
    """
    shapes = tuple(_unlike(theirs, ours, "the result"))
    if shapes:
        return Check(path, 1, failures=shapes)
    check = _measured(path, face, x, theirs, ours)
    if not check.failures:
        return check
    (output, indices), (second, redrawn) = face.outcome(theirs), face.outcome(again())
    if not _same(indices, redrawn):
        note = "The peer draws its indices at random: nothing was compared."
        return Check(path, 1, check.rows, notes=(note,))
    if not _same(output, second):
        return _without_outputs(check, "The peer draws its outputs at random: indices alone were compared.")
    return _nearer(check, face, x, theirs, ours) if face.nearer is not None else check


def _without_outputs(check: Check, note: str) -> Check:
    kept = tuple(sentence for sentence in check.failures if not sentence.startswith("Outputs"))
    return check._replace(output_difference=0.0, output_bound=0.0, failures=kept, notes=(*check.notes, note))


def _nearer(check: Check, face: Face, x: Tensor, theirs: Any, ours: Any) -> Check:
    """Outputs that differ on purpose must not be farther from the input, row by row."""
    (their_output, _), (output, indices) = face.outcome(theirs), face.outcome(ours)
    their, our = ((x.double() - each.double()).square().sum(-1) for each in (their_output, output))  # (N,)
    note = f"{face.nearer} Mean squared distances to the input: {their.mean():.4g} of the peer, {our.mean():.4g} of ours."
    check = _without_outputs(check, note)
    distances = face.sq_dist_of(x, indices)
    if distances is None or bool(distances.isnan().any()):
        # each stage leaves another rest to the next one: of single rows, the sum may be farther
        return check
    drift = math.sqrt(x.shape[-1]) * torch.finfo(output.dtype).eps * max(_largest(x), _largest(output))
    within = (our <= their + 2 * their.sqrt() * drift + drift**2) | their.isnan()
    farther = int((~within).sum())
    failures = (f"Outputs are farther from the input than the peer's on {farther} rows.",) if farther else ()
    return check._replace(failures=(*check.failures, *failures))


def _measured(path: str, face: Face, x: Tensor, theirs: Any, ours: Any) -> Check:
    (their_output, their_indices), (output, indices) = face.outcome(theirs), face.outcome(ours)
    if their_output.dtype != output.dtype:
        forms = f"{their_output.dtype} of the peer and {output.dtype} of ours"
        return Check(path, 1, failures=(f"The output has the dtype {forms}.",))
    magnitude = max(_largest(x), _largest(their_output))
    searched = isinstance(indices, Tensor) and not indices.is_floating_point() and indices.dim() > 0
    if not searched:
        their_indices = indices = torch.zeros(output.shape[:-1], dtype=torch.int64, device=output.device)
    readings = list(_readings(x, their_output, output, their_indices, indices))
    if not readings:
        shapes = f"{tuple(indices.shape)} for outputs of shape {tuple(output.shape)}"
        return Check(path, 1, failures=(f"Indices have the shape {shapes}, which names no rows.",))
    # of two ways to see rows, as in a square, the right one finds nothing
    difference, reading = min(((_over_equal(one), one) for one in readings), key=lambda one: one[0])
    rows = reading.difference.numel()
    width = output.numel() // max(rows, 1)
    eps = torch.finfo(output.dtype).eps
    bound = (width + 2) * eps * magnitude
    failures = []
    if not difference <= bound:
        failures.append(
            f"Outputs differ by {difference:.3g} over rows with equal indices; {bound:.3g} is allowed."
        )
    check = Check(path, 1, rows, output_difference=difference, output_bound=bound)
    differing = int(_differing(reading).sum())
    if differing:
        errors = _judged(face, x, their_indices, indices, reading, width, eps, magnitude)
        if errors is None:
            failures.append(
                f"Indices differ on {differing} rows, and come from no search that could say who is right."
            )
            return check._replace(differing=differing, failures=tuple(failures))
        check = check._replace(
            differing=differing, peer_farther=errors[0], ties=errors[1], ours_farther=errors[2]
        )
        if errors[2]:
            failures.append(f"Our code is farther than the peer's on {errors[2]} rows.")
    return check._replace(failures=tuple(failures))


def _judged(
    face: Face,
    x: Tensor,
    their_indices: Tensor,
    indices: Tensor,
    reading: _Reading,
    width: int,
    eps: float,
    magnitude: float,
) -> tuple[int, int, int] | None:
    """Rows for which the peer's code is farther, neither is, ours is, at the first stage that differs."""
    their_distances = face.sq_dist_of(x, their_indices.clamp_min(0))
    distances = face.sq_dist_of(x, indices.clamp_min(0))
    if their_distances is None or distances is None:
        return None
    differs = reading.theirs != reading.ours  # (R, G, Q)
    first = differs.int().argmax(-1, keepdim=True)  # (R, G, 1)
    their, our = (
        reading.arrange(each).gather(-1, first).squeeze(-1) for each in (their_distances, distances)
    )  # (R, G)
    farthest = torch.maximum(their, our)
    # what a later stage searches is a sum of rounded terms, one for each stage before it
    drift = first.squeeze(-1) * (math.sqrt(width) * eps * magnitude)
    exact = (width + 2) * torch.finfo(torch.float64).eps * farthest
    bound = exact + 2 * farthest.sqrt() * drift + drift.square()
    some = differs.any(-1)
    left_out = ((reading.theirs < 0) != (reading.ours < 0)).any(-1)
    no_number = their.isnan() & our.isnan()
    ours = (some & ~((our <= their + bound) | no_number) | left_out).any(-1)
    peers = (some & (their > our + bound)).any(-1) & ~ours
    return int(peers.sum()), int((some.any(-1) & ~ours & ~peers).sum()), int(ours.sum())


def _readings(
    x: Tensor, theirs: Tensor, ours: Tensor, their_indices: Tensor, indices: Tensor
) -> Iterator[_Reading]:
    """Every way to see rows in an output: features last or second; groups of indices behind the rows or before."""
    difference = (theirs.double() - ours.double()).abs()
    difference = torch.where((theirs == ours) | (theirs.isnan() & ours.isnan()), 0.0, difference)
    difference = torch.where(difference.isnan(), math.inf, difference)
    # nothing is near a row that is not finite
    void = ~x.isfinite() if x.shape == theirs.shape else torch.zeros_like(difference, dtype=torch.bool)
    dims = (-1,) if difference.dim() <= 2 else (-1, 1)
    for dim in dims:
        spread = difference.movedim(dim, -1)
        rows = spread.shape[:-1]
        for groups in (None, -2, -1):
            if groups is not None and indices.dim() < -groups + 1:
                continue
            arrange = _arrangement(rows, groups)
            if arrange(indices) is None:
                continue
            left_out = void.movedim(dim, -1).flatten(0, -2).any(-1)  # (R,)
            their_rows, our_rows = arrange(their_indices), arrange(indices)
            their_rows = torch.where(left_out[:, None, None], our_rows, their_rows)
            yield _Reading(
                spread.flatten(0, -2).amax(-1).masked_fill(left_out, 0.0), their_rows, our_rows, arrange
            )


def _arrangement(rows: torch.Size, groups: int | None) -> Callable[[Tensor], Any]:
    """How a tensor of the shape of the indices becomes (R, G, Q); None where it has no such rows."""

    def arrange(indices: Tensor) -> Tensor | None:
        moved = indices if groups is None else indices.movedim(0, groups)
        if moved.shape[: len(rows)] == rows:
            rest = moved.shape[len(rows) :]
        elif groups is None and indices.dim() <= 2 and indices.shape[0] == rows.numel():
            rest = indices.shape[1:]
        else:
            return None
        if len(rest) > 2:
            return None
        sizes = (1,) * (2 - len(rest)) + tuple(rest)
        return moved.reshape(rows.numel(), *sizes)

    return arrange


def _differing(reading: _Reading) -> Tensor:
    return (reading.theirs != reading.ours).flatten(1).any(1)


def _over_equal(reading: _Reading) -> float:
    kept = reading.difference[~_differing(reading)]
    return float(kept.max()) if kept.numel() else 0.0


def _largest(tensor: Tensor) -> float:
    found = tensor.detach().abs().double().nan_to_num(0.0, 0.0, 0.0)
    return float(found.max()) if found.numel() else 0.0


def _same(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return True
    return torch.allclose(a.double(), b.double(), rtol=0.0, atol=0.0, equal_nan=True)


def _unlike(theirs: Any, ours: Any, where: str) -> Iterator[str]:
    """A sentence for every part of two results that has not the same form."""
    if isinstance(theirs, Tensor) and isinstance(ours, Tensor):
        if theirs.shape != ours.shape:
            yield f"{where} has the shape {tuple(theirs.shape)} of the peer and {tuple(ours.shape)} of ours."
    elif isinstance(theirs, Mapping) and isinstance(ours, Mapping):
        if theirs.keys() != ours.keys():
            yield f"{where} has the keys {sorted(theirs)} of the peer and {sorted(ours)} of ours."
        for key in theirs.keys() & ours.keys():
            yield from _unlike(theirs[key], ours[key], f"{where}[{key!r}]")
    elif isinstance(theirs, (tuple, list)) and isinstance(ours, (tuple, list)):
        if len(theirs) != len(ours):
            yield f"{where} has {len(theirs)} parts of the peer and {len(ours)} of ours."
        for index, (its, mine) in enumerate(zip(theirs, ours)):
            yield from _unlike(its, mine, f"{where}[{index}]")
