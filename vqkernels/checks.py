"""The only place that words an input error.

Grammar: `<op>: <argument> must <requirement>; got <value>. <fix>.`
"""

from __future__ import annotations

import math
from typing import NoReturn

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def refuse(
    error: type[Exception], op: str, argument: str, requirement: str, got: object, fix: str
) -> NoReturn:
    """Raise `error` with the one message grammar of the package."""
    raise error(f"{op}: {argument} must {requirement}; got {got}. {fix}.")


def check_floating(op: str, name: str, tensor: object) -> None:
    """A tensor of one of the four floating-point dtypes."""
    if not isinstance(tensor, Tensor):
        refuse(TypeError, op, name, "be a tensor", type(tensor).__name__, f"Pass torch.as_tensor({name})")
    if tensor.dtype not in FLOATS:
        fix = f"Call {name}.float()"
        refuse(TypeError, op, name, "be float16, bfloat16, float32 or float64", tensor.dtype, fix)


def check_dtype(op: str, name: str, dtype: object) -> None:
    """One of the four floating-point dtypes."""
    if dtype not in FLOATS:
        fix = f"Pass {name}=torch.float32"
        refuse(TypeError, op, name, "be float16, bfloat16, float32 or float64", dtype, fix)


def check_codebook(op: str, codebook: Tensor, *, min_codes: int = 1, groups: bool = False) -> None:
    """A `(K, D)` floating-point codebook with enough codes; or `(G, K, D)`, where an op takes groups."""
    check_floating(op, "codebook", codebook)
    if codebook.dim() != 2 and not (groups and codebook.dim() == 3):
        wanted = "be (K, D) or (G, K, D)" if groups else "be (K, D)"
        one_by_one = codebook.dim() == 3
        fix = "Pass the codebook of one group at a time" if one_by_one else "Reshape it to one row per code"
        refuse(ValueError, op, "codebook", wanted, f"shape {tuple(codebook.shape)}", fix)
    if codebook.dim() == 3 and codebook.shape[0] < 1:
        refuse(ValueError, op, "codebook", "have at least one group", 0, "Pass a codebook per group of x")
    if codebook.shape[-2] < min_codes:
        plural = "code" if min_codes == 1 else "codes"
        fix = f"Pass a codebook of {min_codes} or more rows"
        refuse(ValueError, op, "codebook", f"have at least {min_codes} {plural}", codebook.shape[-2], fix)
    if codebook.shape[-1] < 1:
        refuse(
            ValueError,
            op,
            "codebook",
            "have at least one feature",
            0,
            "Pass a codebook of one or more columns",
        )


def check_rows(op: str, x: Tensor) -> None:
    """Latents `(..., D)` with at least one feature."""
    check_floating(op, "x", x)
    if x.dim() < 1:
        refuse(ValueError, op, "x", "be (..., D)", "a 0-d tensor", "Call x.unsqueeze(0)")
    if x.shape[-1] < 1:
        refuse(ValueError, op, "x", "have at least one feature", 0, "Pass x with one or more columns")


def check_pair(op: str, x: Tensor, codebook: Tensor, *, min_codes: int = 1, groups: bool = False) -> None:
    """Latents `(..., D)` and a codebook `(K, D)` on one device; or `(G, ..., D)` and `(G, K, D)`."""
    check_codebook(op, codebook, min_codes=min_codes, groups=groups)
    check_rows(op, x)
    grouped = codebook.dim() == 3
    if x.shape[-1] != codebook.shape[-1]:
        d, shape = x.shape[-1], tuple(codebook.shape)
        transposed = "codebook.mT" if grouped else "codebook.t()"
        fix = (
            f"Pass {transposed}"
            if codebook.shape[-2] == d
            else f"Move the {shape[-1]} features of x to its last dimension"
        )
        wanted = f"be ({'G, ' if grouped else ''}K, {d}) to match x of shape {tuple(x.shape)}"
        refuse(ValueError, op, "codebook", wanted, shape, fix)
    if grouped and (x.dim() < 2 or x.shape[0] != codebook.shape[0]):
        wanted = f"be ({codebook.shape[0]}, ..., {x.shape[-1]}) to match the groups of the codebook"
        fix = "Move the groups of x to its first dimension, or pass a codebook (K, D)"
        refuse(ValueError, op, "x", wanted, tuple(x.shape), fix)
    if x.device != codebook.device:
        refuse(
            ValueError,
            op,
            "codebook",
            f"be on {x.device} as x is",
            codebook.device,
            "Call codebook.to(x.device)",
        )


def check_indices(op: str, indices: object, shape: torch.Size, device: torch.device) -> None:
    """An int64 index per row."""
    if not isinstance(indices, Tensor) or indices.dtype != torch.int64:
        got = indices.dtype if isinstance(indices, Tensor) else type(indices).__name__
        refuse(TypeError, op, "indices", "be an int64 tensor", got, "Call indices.long()")
    if indices.shape != shape:
        fix = "Pass one index per row of x"
        refuse(ValueError, op, "indices", f"be {tuple(shape)} to match x", tuple(indices.shape), fix)
    if indices.device != device:
        refuse(
            ValueError, op, "indices", f"be on {device} as x is", indices.device, "Call indices.to(x.device)"
        )


def check_below(op: str, name: str, indices: Tensor, limit: int) -> None:
    """No index of `limit` or more; looked at on the CPU alone, for elsewhere the host would wait."""
    if indices.device.type != "cpu" or torch.compiler.is_compiling() or not indices.numel():
        return
    most = int(indices.max())
    if most >= limit:
        fix = "Pass the indices that a forward of this quantizer returned"
        refuse(ValueError, op, name, f"be below {limit}", most, fix)


def check_kind(op: str, name: str, value: object, kind: type, fix: str) -> None:
    """An instance of a class."""
    if not isinstance(value, kind):
        article = "an" if kind.__name__[0] in "AEIOU" else "a"
        got = f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
        refuse(TypeError, op, name, f"be {article} {kind.__name__}", got, fix)


def check_mask(op: str, mask: object, shape: torch.Size, device: torch.device) -> None:
    """A bool per row."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        refuse(TypeError, op, "mask", "be a bool tensor", got, "Call mask.bool()")
    if mask.shape != shape:
        fix = "Pass one value per latent, True where it counts"
        refuse(ValueError, op, "mask", f"be {tuple(shape)} to match x", tuple(mask.shape), fix)
    if mask.device != device:
        refuse(ValueError, op, "mask", f"be on {device} as x is", mask.device, "Call mask.to(x.device)")


def check_position(op: str, position: Tensor, shape: torch.Size, device: torch.device) -> None:
    """A floating-point position in [0, 1] per row."""
    check_floating(op, "position", position)
    if position.shape != shape:
        fix = "Pass one position per row of x"
        refuse(ValueError, op, "position", f"be {tuple(shape)} to match x", tuple(position.shape), fix)
    if position.device != device:
        refuse(
            ValueError,
            op,
            "position",
            f"be on {device} as x is",
            position.device,
            "Call position.to(x.device)",
        )


def check_noise_std(op: str, noise_std: object) -> float:
    """A finite standard deviation >= 0."""
    if isinstance(noise_std, bool) or not isinstance(noise_std, (int, float)):
        fix = "Pass a Python float"
        refuse(TypeError, op, "noise_std", "be a number", type(noise_std).__name__, fix)
    # a comparison traces where math.isfinite does not; nan fails it too
    if not 0 <= noise_std <= 3e38:
        fix = "Pass a standard deviation in units of x, or 0 for none"
        refuse(ValueError, op, "noise_std", "be finite and not negative", noise_std, fix)
    return float(noise_std)


def check_temperature(op: str, temperature: object, device: torch.device, *, zero: bool = False) -> Tensor:
    """A 0-d temperature on `device`: a number > 0, or >= 0 where `zero` is one; of a tensor only the form is looked at."""
    if isinstance(temperature, Tensor):
        check_floating(op, "temperature", temperature)
        if temperature.dim() != 0:
            shape = f"shape {tuple(temperature.shape)}"
            refuse(ValueError, op, "temperature", "be a number or 0-d", shape, "Pass one for the whole batch")
        if temperature.device != device:
            fix = "Call temperature.to(x.device)"
            refuse(ValueError, op, "temperature", f"be on {device} as x is", temperature.device, fix)
        return temperature.detach()
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)):
        fix = "Pass a Python float or a 0-d tensor"
        refuse(TypeError, op, "temperature", "be a number", type(temperature).__name__, fix)
    # a comparison traces where math.isfinite does not; nan fails it too
    if not 0 <= temperature <= 3e38 or (temperature == 0 and not zero):
        requirement = "be finite and not negative" if zero else "be finite and above 0"
        refuse(ValueError, op, "temperature", requirement, temperature, "Pass one in units of x squared")
    # a fill, as for a seed
    return torch.full((), float(temperature), dtype=torch.float64, device=device)


def check_seed(op: str, seed: Tensor | int | None, device: torch.device) -> Tensor:
    """A 0-d int64 seed on `device`; None draws one from the device's default generator, without a host sync."""
    if seed is None:
        return torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device=device)
    if isinstance(seed, int) and not isinstance(seed, bool):
        if not -(2**63) <= seed < 2**63:
            refuse(ValueError, op, "seed", "fit in 64 bits", seed, "Pass seed % 2**63")
        # a fill, and no copy from the host: that would wait for it, and no graph can hold it
        return torch.full((), seed, dtype=torch.int64, device=device)
    if not isinstance(seed, Tensor) or seed.dtype != torch.int64:
        got = seed.dtype if isinstance(seed, Tensor) else type(seed).__name__
        refuse(TypeError, op, "seed", "be an int or an int64 tensor", got, "Call seed.long()")
    if seed.dim() != 0:
        fix = "Pass one seed for the whole batch"
        refuse(ValueError, op, "seed", "be a 0-d tensor", f"shape {tuple(seed.shape)}", fix)
    if seed.device != device:
        refuse(ValueError, op, "seed", f"be on {device} as x is", seed.device, "Call seed.to(x.device)")
    return seed


def check_number(
    op: str, name: str, value: float, *, below: float = math.inf, up_to: float | None = None
) -> float:
    """A number in [0, below), or in [0, up_to]."""
    top = "not negative and finite" if below == math.inf else f"in [0, {below})"
    top = top if up_to is None else f"in [0, {up_to}]"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        refuse(TypeError, op, name, f"be a number, {top}", type(value).__name__, "Pass a Python float")
    if not (0 <= value < below if up_to is None else 0 <= value <= up_to):
        refuse(ValueError, op, name, f"be {top}", value, "Pass a number in that range")
    return float(value)


def check_flag(op: str, name: str, value: bool) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        refuse(TypeError, op, name, "be True or False", repr(value), "Pass one of the two")
    return value


def check_count(op: str, name: str, value: int, *, minimum: int = 0, maximum: int = 2**62) -> int:
    """An integer of at least `minimum` and at most `maximum`."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        refuse(TypeError, op, name, "be an int", type(value).__name__, f"Pass int({name})")
    if value < minimum:
        refuse(ValueError, op, name, f"be at least {minimum}", value, f"Pass {minimum} or more")
    if value > maximum:
        refuse(ValueError, op, name, f"be at most {maximum}", value, "Pass a smaller number")
    return value


def check_choice(op: str, name: str, value: str, choices: tuple[str, ...]) -> str:
    """One of a few names."""
    if value not in choices:
        allowed = ", ".join(map(repr, choices))
        refuse(ValueError, op, name, f"be one of {allowed}", repr(value), "Pass one of these names")
    return value
