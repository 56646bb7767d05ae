"""The training loop: thin, restartable, on Accelerate."""

import signal
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from accelerate.tracking import get_available_trackers
from accelerate.utils import recursively_apply
from torch import Tensor
from tqdm import tqdm

from vqkernels.checks import refuse
from vqkernels.models import ImageAutoencoder
from vqkernels.train.checkpoints.badstep import (
    BadStep,
    NotFiniteError,
    all_finite,
    refuse_bad_step,
    save_bad_step,
)
from vqkernels.train.checkpoints.checkpoint import Checkpoint, CheckpointStore, find_checkpoint, store_of
from vqkernels.train.checkpoints.files import only_run, open_folder
from vqkernels.train.checkpoints.generators import restore_rng, rng_states
from vqkernels.train.config import RunError, TrainConfig
from vqkernels.train.data.images import ImageSet, load_images
from vqkernels.train.data.prefetch import batches
from vqkernels.train.learners.joint import make_learner
from vqkernels.train.log import Line, MetricsLog, Window
from vqkernels.train.measures.evaluate import evaluate
from vqkernels.train.model import build_model
from vqkernels.train.processes import joint_statistics, make_accelerator
from vqkernels.train.signals import StopSignals
from vqkernels.train.timing import QuantizerShare

# a measurement during training takes at most this many held-out images
HELD_OUT_IMAGES = 64


@dataclass(frozen=True)
class RunResult:
    """Where a call of `train` ended.

    Attributes:
        step: optimizer steps done, all calls together.
        started_at: step this call began with, 0 for a fresh run.
        signal: name of the signal that stopped the run, None for a finished run.
        model: the trained model.
        images: what it was trained and measured on.
        main: whether this process is the one that writes and prints.
    """

    step: int
    started_at: int
    signal: str | None
    model: ImageAutoencoder
    images: ImageSet
    main: bool


def train(
    config: TrainConfig,
    *,
    resume: bool = False,
    resume_from: Path | None = None,
    progress: bool = False,
    on_line: Callable[[Line], None] | None = None,
) -> RunResult:
    """Train an autoencoder as a configuration says, and leave checkpoints and metrics.jsonl in `config.out`.

    A run that was interrupted or killed and is resumed ends with the weights of an uninterrupted one, bit for bit on a CPU
    with the same number of threads. SIGINT and SIGTERM end the run after the current step, with a checkpoint.

    Args:
        config: of the run.
        resume: go on from the newest checkpoint in `config.out`, or start where there is none.
        resume_from: go on from this checkpoint, or the newest of this folder of a run; later ones, and what the log
            says beyond it, are dropped.
        progress: show a progress bar on standard error.
        on_line: called with every line of the log.

    Returns:
        Where it ended.

    Raises:
        RunError: if the data, the folder or the checkpoint cannot be used, the disk is full, or the loss is not
            finite; the step is kept in nan-step-<step>.pt then.
    """
    out = Path(config.out)
    open_folder(out)
    store = store_of(out, config.keep)
    with StopSignals() as stop, only_run(out):
        checkpoint, path = _starting_point(config, store, resume, resume_from)
        images = load_images(config)
        run = _Run(config, images, store)
        if checkpoint is not None:
            run.restore(checkpoint)
        started_at = run.step
        main = run.accelerator.is_main_process
        # nobody still reads what is dropped now
        run.accelerator.wait_for_everyone()
        if main:
            store.settle(checkpoint, foreign=path is not None and not store.holds(path))
        bad = None
        try:
            with MetricsLog(config.metrics_path(), run.step) if main else nullcontext() as log:
                run.go(log, stop, progress, on_line)
        except NotFiniteError:
            bad = run.step if run.bad_step is None else run.bad_step
        if bad is not None:
            # the device may have no room for two of them, and an exception would hold the first
            del run
            _keep_bad_step(config, images, store, bad)
    stopped_by = stop.name if run.step < config.steps else None
    return RunResult(run.step, started_at, stopped_by, run.model, images, main)


def _starting_point(
    config: TrainConfig, store: CheckpointStore, resume: bool, resume_from: Path | None
) -> tuple[Checkpoint | None, Path | None]:
    path = store.latest() if resume_from is None else find_checkpoint(resume_from)
    if path is None:
        # a run of an older version is named, not overwritten
        store.refuse_older()
        return None, None
    if resume_from is None and not resume:
        fix = "Pass --resume, or another --out"
        refuse(RunError, "train", "out", "hold no earlier run", f"{config.out} with {path.name}", fix)
    checkpoint = store.load(path)
    checkpoint.require(config, path)
    return checkpoint, path


def _keep_bad_step(config: TrainConfig, images: ImageSet, store: CheckpointStore, bad: int) -> NoReturn:
    """Take the steps since the last checkpoint again, for what the bad one started from."""
    run = _Run(config, images, store)
    if store.latest() is not None:
        run.restore(store.load())
    before, loss = run.state(), torch.tensor(float("nan"))
    try:
        while run.step <= bad:
            before = run.state() if run.step == bad else before
            loss = run.train_step()
    except NotFiniteError:
        bad, loss = run.step, torch.tensor(float("nan"))
    found = BadStep(bad, loss, images.batch(bad), before, run.state())
    if not run.accelerator.is_main_process:
        refuse_bad_step(found, "which the first process keeps")
    try:
        path = save_bad_step(config, found)
    except RunError as error:
        refuse_bad_step(found, f"which could not be kept ({str(error).rpartition('. ')[0]})")
    refuse_bad_step(found, f"kept with its batch and the states before and after it in {path}")


class _Run:
    """The state of a run: everything a checkpoint holds, and the means to go on."""

    def __init__(self, config: TrainConfig, images: ImageSet, store: CheckpointStore) -> None:
        self.config, self.images, self.store, self.step = config, images, store, 0
        self.bad_step: int | None = None
        self.accelerator = make_accelerator(config, _tracker(config))
        if config.tracker != "none":
            values = {
                name: value if isinstance(value, (int, float)) else str(value)
                for name, value in vars(config).items()
            }
            self.accelerator.init_trackers("tracker", config=values)
        self.device = self.accelerator.device
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        # one step alone, as when a bad one is taken again, needs nothing ahead
        self.batch: Callable[[int], Tensor] = partial(images.batch, rank=rank, world=world)
        torch.manual_seed(config.seed)
        self.model = joint_statistics(build_model(config), self.accelerator)
        self.learner = make_learner(config, self.accelerator, self.model)
        self.window = Window(self.model.quantizer.num_indices, self.device)
        self.timer = QuantizerShare(self.model.quantizer, self.device)

    def go(
        self,
        log: MetricsLog | None,
        stop: StopSignals,
        progress: bool,
        on_line: Callable[[Line], None] | None,
    ) -> None:
        """Train to the end or to a signal; only the main process has a log."""
        config = self.config
        bar = tqdm(
            total=config.steps,
            initial=self.step,
            desc=config.quantizer,
            unit="step",
            dynamic_ncols=True,
            disable=not progress or log is None,
        )

        def tell(line: Line) -> None:
            numbers = {f"{line['split']}/{k}": v for k, v in line.items() if isinstance(v, float)}
            self.accelerator.log(numbers, step=int(line["step"] or 0))
            if log is not None:
                log.write(line)
                bar.set_postfix_str(_postfix(line), refresh=False)
                if on_line is not None:
                    on_line(line)

        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        with bar, self.timer, batches(self.images, rank, world) as self.batch:
            seconds, since = 0.0, self.step
            while self.step < config.steps:
                began = time.perf_counter()
                self.train_step()
                seconds += time.perf_counter() - began
                bar.update()
                last = self.step == config.steps
                if last or self.step % config.log_every == 0:
                    tell(self.line() | {"seconds_per_step": seconds / (self.step - since)})
                    seconds, since = 0.0, self.step
                if (last or self.step % config.evaluate_every == 0) and self.model.quantizer.initialized:
                    tell(self.held_out_line())
                stopping = self.agreed(stop)
                if last or stopping or self.step % config.checkpoint_every == 0:
                    self.save(log)
                if stopping:
                    break
        self.learner.finish()
        # of shards a whole model is made
        self.model = self.learner.model
        # the group of processes outlives a run, so that another can follow
        for tracker in self.accelerator.trackers:
            tracker.finish()

    def train_step(self) -> Tensor:
        """One optimizer step, and its loss; nothing here waits for the device, save on the steps the timer samples."""
        step = self.step
        self.timer.begin(step, active=self.model.quantizer.initialized)
        batch = self.batch(step).to(self.device, non_blocking=True)
        found = self.learner.learn(batch, step)
        self.window.add(found.loss, found.mse, found.indices, found.extras)
        self.timer.end()
        self.step += 1
        return found.loss

    def line(self) -> Line:
        """The line of the window that ends here; ends the run where the loss is not finite."""
        self.require_finite()
        means = self.window.line(self.sum)
        line: Line = {"step": self.step, "split": "train", "epoch": self.epoch, **means}
        line |= {"lr": self.config.lr_at(self.step - 1), "quantizer_share": self.timer.share()}
        self.window.clear()
        self.timer.clear()
        return line

    @property
    def epoch(self) -> float:
        """Epochs done; one shows as many pixels as there are to train on."""
        return self.step / self.images.epoch_steps

    def held_out_line(self) -> Line:
        with self.learner.averaged():
            found = evaluate(self.model, self.images, ssim=False, limit=HELD_OUT_IMAGES)
        return {
            "step": self.step,
            "split": "held_out",
            "epoch": self.epoch,
            "psnr": found.psnr,
            "perplexity": found.perplexity,
            "usage": found.usage,
        }

    def require_finite(self) -> None:
        """End the run at the first bad step since the last call; all processes see the same."""
        ago = self.window.first_bad(self.sum)
        if ago is not None:
            self.bad_step = self.step - ago
            raise NotFiniteError(f"train: loss must stay finite; got another at step {self.bad_step}.")

    def sum(self, tensor: Tensor) -> Tensor:
        total = self.accelerator.reduce(tensor, reduction="sum")
        # a tensor comes back as a tensor, a dict as a dict
        return cast(Tensor, total)

    def agreed(self, stop: StopSignals) -> bool:
        """Whether to stop; several processes agree on it where they wait for each other anyway."""
        if self.accelerator.num_processes == 1:
            return stop.name is not None
        if self.step % self.config.log_every:
            return False
        own = 0 if stop.name is None else signal.Signals[stop.name]
        found = cast(Tensor, self.accelerator.gather(torch.tensor([own], device=self.device)))
        most = int(found.max())
        # the signal of one process stops them all, and is what each of them reports
        if most and stop.name is None:
            stop.name = signal.Signals(most).name
        return most > 0

    def state(self) -> dict[str, Any]:
        """Model and learner as a checkpoint holds them, copied to the host."""
        now = {"model": self.model.state_dict(), "learner": self.learner.state_dict()}
        return cast(dict[str, Any], recursively_apply(lambda t: t.detach().cpu().clone(), now))

    def save(self, log: MetricsLog | None) -> None:
        # what a bad step has spoilt must not follow good checkpoints
        self.require_finite()
        # every process takes part in all of these, the states where the model is sharded
        model, learner = self.model.state_dict(), self.learner.state_dict()
        if float(self.sum(all_finite(model).logical_not().float().to(self.device))) > 0:
            self.bad_step = self.step - 1
            raise NotFiniteError(f"train: weights must stay finite; got others after step {self.bad_step}.")
        window, rng = self.window.state(self.sum), rng_states(self.accelerator)
        if log is None:
            return
        log.sync()
        self.store.save(Checkpoint(self.config, self.step, model, learner, window, rng))

    def restore(self, checkpoint: Checkpoint) -> None:
        checkpoint.restore_model(self.model, self.store.folder)
        self.learner.load_state_dict(checkpoint.learner)
        self.window.restore(checkpoint.window, main=self.accelerator.is_main_process)
        restore_rng(checkpoint.rng, self.accelerator)
        self.step = checkpoint.step


def _tracker(config: TrainConfig) -> str | None:
    """The tracker's name, if it can run: Accelerate would go on without it and say nothing."""
    if config.tracker == "none":
        return None
    there = [str(tracker) for tracker in get_available_trackers()]
    if config.tracker not in there:
        got = f"{config.tracker!r} (here: {', '.join(there) or 'none'})"
        fix = f"Install it, as in pip install {config.tracker}, or leave --tracker out"
        refuse(RunError, "train", "tracker", "be one of Accelerate whose package is installed", got, fix)
    return config.tracker


def _postfix(line: Line) -> str:
    usage = line.get("usage")
    return f"{line['split']} PSNR {line['psnr']:.2f} dB" + ("" if usage is None else f", usage {usage:.0%}")
