"""What the keywords of diveq may be, and which of them are unusual."""

from __future__ import annotations

import warnings

from vqkernels.checks import check_count, check_flag, check_number, refuse


def check_noise_var(op: str, noise_var: float) -> float:
    """A number above 0: what diveq calls a variance and uses as a standard deviation."""
    if check_number(op, "noise_var", noise_var) == 0:
        refuse(ValueError, op, "noise_var", "be above 0", noise_var, f"Use {op}Detach or pass 0.001")
    return float(noise_var)


def check_replacement(op: str, iters: int, threshold: float, eps: float) -> None:
    """Period, threshold and perturbation of a replacement."""
    check_count(op, "replacement_iters", iters, minimum=1)
    check_number(op, "discard_threshold", threshold, up_to=1)
    check_number(op, "perturb_eps", eps)


def check_warm_up(op: str, skip_iters: int, avg_iters: int, replacement_iters: int | None) -> None:
    """Iterations of a warm-up, and the shorter periods inside of it."""
    check_count(op, "skip_iters", skip_iters)
    check_count(op, "avg_iters", avg_iters)
    for name, iters in (("avg_iters", avg_iters), ("replacement_iters", replacement_iters)):
        if iters is not None and iters > skip_iters:
            fix = f"Pass a smaller {name}"
            refuse(ValueError, op, name, f"be at most skip_iters, {skip_iters}", iters, fix)


def check_flags(op: str, **flags: bool) -> None:
    """True or False, each of them."""
    for name, value in flags.items():
        check_flag(op, name, value)


def warn_unusual(
    op: str,
    *,
    noise_var: float | None = None,
    skip_iters: int | None = None,
    avg_iters: int | None = None,
    replacement_iters: int | None = None,
    most_replacement_iters: int = 300,
    discard_threshold: float | None = None,
    perturb_eps: float | None = None,
) -> None:
    """Warn of values outside of what diveq recommends; None for an option that has no part."""
    _outside(op, "noise_var", noise_var, None, 0.01, "rows may end nearer to other codes than their own")
    _outside(op, "skip_iters", skip_iters, 1000, None, "latents still change a lot when the codes start")
    _outside(op, "avg_iters", avg_iters, 50, 100, "the codes start from too few or from old latents")
    what = "codes are replaced too often or too late"
    _outside(op, "replacement_iters", replacement_iters, 50, most_replacement_iters, what)
    _outside(op, "discard_threshold", discard_threshold, None, 0.05, "rare codes are lost that are good")
    _outside(op, "perturb_eps", perturb_eps, None, 1e-6, "replaced codes land far from used ones")


def _outside(
    op: str, name: str, value: float | None, least: float | None, most: float | None, result: str
) -> None:
    if value is None or ((least is None or value >= least) and (most is None or value <= most)):
        return
    usual = f"at least {least}" if most is None else f"at most {most}"
    usual = usual if least is None or most is None else f"{least} to {most}"
    warnings.warn(f"{op}: {name}={value} is unusual ({usual}): {result}.", UserWarning, stacklevel=4)
