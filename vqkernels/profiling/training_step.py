"""What share of a training step the quantizers of a model take, and which of their ops."""

from __future__ import annotations

import copy
import gzip
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.profiler import record_function
from torch.profiler import ProfilerActivity

from vqkernels.checks import check_count, check_kind, refuse
from vqkernels.nn import Quantizer
from vqkernels.profiling.attribution import PHASE_PREFIX, PHASES, spent
from vqkernels.profiling.generators import kept_generators
from vqkernels.profiling.ranges import quantizers_of, range_name, ranges
from vqkernels.profiling.step_profile import Comparison, StepProfile, profile_of
from vqkernels.profiling.timing import tensors

Batch = Tensor | tuple | list | dict[str, Any]
Loss = Callable[[Any], Tensor]

_LOSS = "Pass loss=lambda output: ... that ends in a mean"
# steps before any is timed: they load, compile, start threads, and make an optimizer's state
_WARMED = 2


def profile(
    model: nn.Module,
    batch: Batch,
    *,
    loss: Loss | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    steps: int = 5,
    trace: str | Path | None = None,
) -> StepProfile:
    """Profile training steps of a copy of a model: forward, backward and optimizer, by quantizer and by op.

    The model, its optimizer, all generators and the batch are afterwards as they were before: a deep copy of model and
    optimizer together makes the steps, without the wrapper of DDP or torch.compile. A model in evaluation mode is
    profiled in training mode, and a quantizer that is no part of a model with a gradient of its latents.

    Args:
        model: to profile, on its device.
        batch: what its forward takes: a tensor, a tuple or list of arguments, or a dict of keywords.
        loss: from what the model returns to a 0-d tensor; when left out, a 0-d output itself, its attribute `loss`, or
            the sum of the mean squares of all outputs that have a gradient.
        optimizer: of the model's parameters; AdamW when left out.
        steps: that are timed, and as many again that are profiled, after two that are neither.
        trace: also write a Chrome trace of the profiled steps, for chrome://tracing or Perfetto; compressed where the
            name ends in .gz.

    Returns:
        A report to print, or to turn into JSON with `to_dict()`.

    Raises:
        ValueError: the model cannot be copied, its loss has no gradient, the optimizer holds nothing of it, or the trace
            is a folder.
        RunError: the folder of the trace cannot be written.
    """
    return _Run(model, batch, loss, optimizer, steps, trace).profile("as it is")


def compare_convert(
    model: nn.Module,
    batch: Batch,
    *,
    loss: Loss | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    steps: int = 5,
) -> Comparison:
    """Profile copies of a model before and after `vqkernels.convert`; the model itself is not converted.

    Args:
        model, batch, loss, optimizer, steps: as `profile` takes them.

    Raises:
        ValueError: as of `profile`.
    """
    before = _Run(model, batch, loss, optimizer, steps, None)
    after = _Run(model, batch, loss, optimizer, steps, None, convert=True)
    return Comparison(before.profile("before convert"), after.profile("after convert"))


class _Run:
    """Steps of a copy."""

    def __init__(
        self,
        model: nn.Module,
        batch: Batch,
        loss: Loss | None,
        optimizer: torch.optim.Optimizer | None,
        steps: int,
        trace: str | Path | None,
        *,
        convert: bool = False,
    ):
        check_kind("profile", "model", model, nn.Module, "Pass the model")
        self.steps = check_count("profile", "steps", steps, minimum=1)
        self.trace = None if trace is None else _writable(Path(trace))
        if loss is not None and not callable(loss):
            refuse(TypeError, "profile", "loss", "be a function", type(loss).__name__, _LOSS)
        self.loss = loss or _squares
        self.inner = bare(model)
        if optimizer is not None:
            _check_optimizer(optimizer, self.inner)
        self.given, self.batch, self.convert = optimizer, batch, convert
        # latents of a quantizer alone get the gradient that an encoder would need
        self.root = "" in quantizers_of(self.inner)
        place = next(iter([*self.inner.parameters(), *self.inner.buffers()]), None)
        self.device = torch.device("cpu") if place is None else place.device

    def profile(self, title: str) -> StepProfile:
        with kept_generators(self.device), _quiet(self.device):
            self._copy()
            step = partial(_step, self.model, self.loss, self.optimizer)
            for _ in range(_WARMED):
                step(self._inputs())
            clock = _Phases(self.device)
            with ranges(self.model, nvtx=False) as found:
                for _ in range(self.steps):
                    step(self._inputs(), clock)
                peak = self._peak(step)
                events = self._profiled(step)
        names = {range_name(path): path for path in found}
        return profile_of(
            title,
            device=str(self.device),
            steps=self.steps,
            phases={phase: statistics.median(clock.seconds[phase]) for phase in PHASES},
            quantizers={path: type(module) for path, module in found.items()},
            found=spent(events, names, on_device=self.device.type == "cuda"),
            peak_bytes=peak,
        )

    def _copy(self) -> None:
        try:
            # together, so that the one's parameters are the other's
            self.model, made = copy.deepcopy((self.inner, self.given))
        except (RuntimeError, TypeError, NotImplementedError) as error:
            words = str(error).strip().splitlines() or [""]
            fix = "Profile a model that copy.deepcopy takes, before it has run"
            refuse(ValueError, "profile", "model", "be one that can be copied", words[0], fix)
        followed = {name for name, each in self.inner.named_modules() if getattr(each, "_followed", False)}
        if self.convert:
            from vqkernels.compat.conversion import convert

            self.model = convert(self.model).model
        wanted = [each for each in self.model.parameters() if each.requires_grad]
        if made is None:
            # without parameters there is nothing to step
            made = torch.optim.AdamW(wanted or [nn.Parameter(torch.zeros((), device=self.device))])
        self.optimizer = made
        self.optimizer.zero_grad(set_to_none=True)
        if not self.model.training:
            self.model.train()
        for name, module in self.model.named_modules():
            # a copy follows nobody until it is told to
            if name in followed and isinstance(module, Quantizer):
                module.follow(made)

    def _inputs(self) -> tuple[tuple, dict[str, Any]]:
        batch = _cloned(self.batch, with_gradient=self.root)
        if isinstance(batch, dict):
            return (), batch
        return (tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)), {}

    def _peak(self, step: Callable[..., None]) -> int | None:
        """Peak memory of a step above what there was before."""
        inputs = self._inputs()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            step(inputs)
            return torch.cuda.max_memory_allocated(self.device) - before
        with torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            step(inputs)
        kept = peak = 0
        results = profiler.profiler.kineto_results if profiler.profiler is not None else None
        seen: list[Any] = [] if results is None else results.events()
        records = [each for each in seen if each.name() == "[memory]"]
        for record in sorted(records, key=lambda each: each.start_ns()):
            kept += record.nbytes()
            peak = max(peak, kept)
        return peak if records else None

    def _profiled(self, step: Callable[..., None]) -> Sequence[Any]:
        activities = [ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
            for _ in range(self.steps):
                step(self._inputs())
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        if self.trace is not None:
            write_trace(profiler, self.trace)
        return profiler.events() or []


@contextmanager
def _quiet(device: torch.device) -> Iterator[None]:
    """Keep torch's profiler from writing to stderr when it starts and stops, where nobody asked for it."""
    name = "KINETO_LOG_LEVEL"
    # it reads this at each start; of a GPU it may have something to say
    if name in os.environ or device.type == "cuda":
        yield
        return
    os.environ[name] = "6"
    try:
        yield
    finally:
        os.environ.pop(name, None)


def bare(model: nn.Module) -> nn.Module:
    """A model without the wrappers of DDP and torch.compile."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if isinstance(model, nn.parallel.DistributedDataParallel):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def write_trace(profiler: torch.profiler.profile, path: Path) -> None:
    """Write what a profiler saw as a Chrome trace: the whole file or none.

    Args:
        profiler: that has ended.
        path: of the file; compressed where it ends in .gz.

    Raises:
        RunError: its folder cannot be written.
    """
    from vqkernels.train.checkpoints.files import replace_file

    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(plain))
        content = plain.read_bytes()
    replace_file(path, gzip.compress(content, 6) if path.suffix == ".gz" else content, "trace", op="profile")


def _check_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    fix = "Pass one that was made of model.parameters(), or leave it out"
    check_kind("profile", "optimizer", optimizer, torch.optim.Optimizer, fix)
    own = {id(each) for each in model.parameters()}
    held = [each for group in optimizer.param_groups for each in group["params"]]
    if own and not any(id(each) in own for each in held):
        got = f"{type(optimizer).__name__} of {len(held)} others"
        refuse(ValueError, "profile", "optimizer", "hold parameters of the model", got, fix)


def _writable(path: Path) -> Path:
    """The path of a trace, before any step is made for it."""
    from vqkernels.train.checkpoints.files import open_folder

    if path.is_dir():
        refuse(
            ValueError, "profile", "trace", "be a file", f"{path}, a folder", f"Pass {path / 'trace.json'}"
        )
    open_folder(path.parent, "trace", op="profile")
    return path


class _Phases:
    """Seconds of each phase, without a profiler."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: dict[str, list[float]] = {phase: [] for phase in PHASES}

    @contextmanager
    def of(self, phase: str) -> Iterator[None]:
        self._wait()
        began = time.perf_counter()
        yield
        self._wait()
        self.seconds[phase].append(time.perf_counter() - began)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _step(
    model: nn.Module,
    loss: Loss,
    optimizer: torch.optim.Optimizer,
    inputs: tuple[tuple, dict[str, Any]],
    clock: _Phases | None = None,
) -> None:
    phase = _ranged if clock is None else clock.of
    arguments, keywords = inputs
    with phase("forward"):
        value = loss(model(*arguments, **keywords))
    if not isinstance(value, Tensor) or value.dim() != 0 or not value.requires_grad:
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        got += " without a gradient" if isinstance(value, Tensor) and not value.requires_grad else ""
        refuse(ValueError, "profile", "loss", "give a 0-d tensor with a gradient", got, _LOSS)
    with phase("backward"):
        value.backward()
    with phase("optimizer"):
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def _ranged(phase: str) -> record_function:
    return record_function(PHASE_PREFIX + phase)


def _squares(output: Any) -> Tensor:
    """A loss for those who have none at hand: the model's own, else one that gives every output a gradient."""
    if isinstance(output, Tensor) and output.dim() == 0:
        return output
    own = getattr(output, "loss", None)
    # of a Quantized, it is one part of the objective
    if isinstance(own, Tensor) and own.dim() == 0 and own.requires_grad and not isinstance(output, tuple):
        return own
    squares = [each.float().square().mean() for each in tensors(output) if each.requires_grad]
    if not squares:
        fix = "Pass loss=lambda output: ... that ends in a mean, or a model with something to train"
        got = f"{type(output).__name__} without one"
        refuse(ValueError, "profile", "model", "return a tensor with a gradient", got, fix)
    return torch.stack(squares).sum()


def _cloned(value: Any, *, with_gradient: bool = False) -> Any:
    """The same batch in tensors of its own, however it is nested."""
    again = partial(_cloned, with_gradient=with_gradient)
    if isinstance(value, Tensor):
        wanted = value.requires_grad or (with_gradient and value.is_floating_point())
        return value.detach().clone().requires_grad_(wanted)
    if isinstance(value, dict):
        return {key: again(part) for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        parts = map(again, value)
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value
