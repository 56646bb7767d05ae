"""The training loop of priors: as restartable as that of autoencoders."""

import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, cast

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from vqkernels.checks import refuse
from vqkernels.models.priors import GPTPrior, MaskGITPrior
from vqkernels.models.token_prior import TokenPrior
from vqkernels.train.checkpoints.badstep import all_finite
from vqkernels.train.checkpoints.files import open_folder
from vqkernels.train.config import RunError
from vqkernels.train.log import Line, MetricsLog
from vqkernels.train.priors.config import PriorConfig
from vqkernels.train.priors.state import (
    fill,
    load_state,
    previous_of,
    restore_rng,
    rng_state,
    save_state,
    seed_of,
)
from vqkernels.train.priors.tokens import TokenSet, open_tokens
from vqkernels.train.signals import StopSignals

# a measurement takes at most this many held-out sequences, spread over all of them
HELD_OUT_SEQUENCES = 512

# what a draw of a step is for; each has a stream of random numbers of its own
_BATCH, _NOISE, _MEASURE = range(3)


@dataclass(frozen=True)
class PriorResult:
    """Where a call of `train_prior` ended.

    Attributes:
        step: optimizer steps done, all calls together.
        started_at: step this call began with, 0 for a fresh run.
        signal: name of the signal that stopped the run, None for a finished run.
        prior: the trained prior.
        main: whether this process is the one that writes and prints.
    """

    step: int
    started_at: int
    signal: str | None
    prior: TokenPrior
    main: bool


@dataclass(frozen=True)
class LoadedPrior:
    """A trained prior, and what its tokens are.

    Attributes:
        prior: in evaluation mode, on the CPU.
        config: of its training.
        grid: (h, w, Q).
        checkpoint_digest: SHA-256 of the checkpoint of the autoencoder.
        step: optimizer steps done.
    """

    prior: TokenPrior
    config: PriorConfig
    grid: tuple[int, int, int]
    checkpoint_digest: str
    step: int


def build_prior(config: PriorConfig, num_codes: int, length: int, num_classes: int) -> TokenPrior:
    """Build the prior of a run with fresh weights from torch's default generator.

    Args:
        config: of the run.
        num_codes: values a token can take.
        length: tokens in a sequence.
        num_classes: classes of the images, 0 for none.
    """
    kind = GPTPrior if config.model == "gpt" else MaskGITPrior
    return kind(
        num_codes,
        length,
        num_classes=num_classes,
        layers=config.layers,
        heads=config.heads,
        width=config.width,
        dropout=config.dropout,
    )


def train_prior(
    config: PriorConfig,
    *,
    resume: bool = False,
    progress: bool = False,
    on_line: Callable[[Line], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> PriorResult:
    """Train a prior and leave prior.pt, the checkpoint before it and metrics.jsonl in `config.out`.

    A run that was interrupted or killed and is resumed ends with the weights of an uninterrupted one, bit for
    bit on a CPU with the same number of threads. SIGINT and SIGTERM end the run after the current step, with a
    checkpoint.

    Args:
        config: of the run.
        resume: go on from the checkpoint in `config.out`, or start where there is none.
        progress: show a progress bar on standard error.
        on_line: called with every line of the log.
        say: called with a sentence when tokens are encoded.

    Returns:
        Where it ended.

    Raises:
        RunError: if the tokens, the folder or the checkpoint cannot be used, or the loss is not finite.
    """
    path = config.checkpoint_path()
    open_folder(path.parent)
    # the checkpoint may be lost and the one before it still there
    saved = load_state(path) if path.exists() or previous_of(path).exists() else None
    if saved is not None and not resume:
        got = f"{path.parent} with a checkpoint at step {saved['step']}"
        refuse(RunError, "prior", "out", "hold no earlier run", got, "Pass --resume, or another --out")
    run = _Run(config, say)
    if saved is not None:
        run.restore(saved, path)
    started_at, main = run.step, run.accelerator.is_main_process
    with (
        MetricsLog(config.metrics_path(), run.step) if main else nullcontext() as log,
        StopSignals() as stop,
    ):
        run.go(log, stop, progress, on_line)
    stopped_by = stop.name if run.step < config.steps else None
    return PriorResult(run.step, started_at, stopped_by, run.prior, main)


def load_prior(path: Path) -> LoadedPrior:
    """Read a trained prior; nothing in the file is executed.

    Args:
        path: of prior.pt.

    Returns:
        The prior and what its tokens are.

    Raises:
        RunError: if there is no such file, or it is damaged or no prior.
    """
    saved = load_state(path)
    config = PriorConfig.from_json(saved["config"])
    height, width, codes = saved["grid"]
    length = height * width * codes
    prior = build_prior(config, saved["num_codes"], length, saved["num_classes"]).eval()
    fill(prior, saved, path)
    return LoadedPrior(prior, config, (height, width, codes), saved["checkpoint_digest"], saved["step"])


class _Run:
    """The state of a run: everything a checkpoint holds, and the means to go on."""

    def __init__(self, config: PriorConfig, say: Callable[[str], None] | None) -> None:
        self.config, self.step = config, 0
        try:
            self.accelerator = Accelerator(mixed_precision=config.precision)
        except ValueError as error:
            got = f"{config.precision!r} ({str(error).rstrip('.')})"
            refuse(RunError, "prior", "precision", "be one that this device has", got, "Pass --precision no")
        if config.precision == "fp16" and self.accelerator.device.type == "cpu":
            # accelerate would train in float32 without a word
            fix = "Pass --precision bf16 or no"
            refuse(RunError, "prior", "precision", "be one that this device has", "'fp16' on cpu", fix)
        self.device, world = self.accelerator.device, self.accelerator.num_processes
        if config.batch_size % world:
            fix = "Pass such a --batch-size"
            refuse(
                RunError, "prior", "batch_size", f"be a multiple of {world} processes", config.batch_size, fix
            )
        with self.accelerator.main_process_first():
            self.tokens: TokenSet = open_tokens(
                Path(config.checkpoint),
                Path(config.cache),
                data=config.data,
                crop=config.crop,
                stride=config.stride,
                say=say if self.accelerator.is_main_process else None,
            )
        self.num_classes = self.tokens.num_classes if config.conditional else 0
        if config.conditional and not self.num_classes:
            fix = "Leave --conditional out, or pass --data with classes"
            refuse(RunError, "prior", "conditional", "be off for images without classes", True, fix)
        torch.manual_seed(config.seed)
        self.prior = build_prior(config, self.tokens.num_codes, self.tokens.length, self.num_classes)
        self.prepared, self.optimizer = self.accelerator.prepare(self.prior, _optimizer(self.prior, config))
        self.sums = torch.zeros(2, dtype=torch.float64, device=self.device)

    def go(
        self,
        log: MetricsLog | None,
        stop: StopSignals,
        progress: bool,
        on_line: Callable[[Line], None] | None,
    ) -> None:
        """Train to the end or to a signal; only the main process has a log."""
        config = self.config

        def tell(line: Line) -> None:
            if log is not None:
                log.write(line)
                if on_line is not None:
                    on_line(line)

        with tqdm(
            total=config.steps,
            initial=self.step,
            desc=config.model,
            unit="step",
            dynamic_ncols=True,
            disable=not progress or log is None,
        ) as bar:
            began, since = time.perf_counter(), self.step
            while self.step < config.steps:
                self.train_step()
                bar.update()
                last = self.step == config.steps
                if last or self.step % config.log_every == 0:
                    seconds = (time.perf_counter() - began) / (self.step - since)
                    tell(self.line() | {"seconds_per_step": seconds})
                    began, since = time.perf_counter(), self.step
                if last or self.step % config.evaluate_every == 0:
                    tell(self.held_out_line())
                stopping = self.agreed(stop)
                if last or stopping or self.step % config.checkpoint_every == 0:
                    self.save(log)
                if stopping:
                    break
        self.accelerator.unwrap_model(self.prepared, keep_fp32_wrapper=False)

    def train_step(self) -> None:
        """One optimizer step; nothing here waits for the device."""
        config, step = self.config, self.step
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr_at(step)
        self.prepared.train()
        tokens, labels = self.batch(step)
        # on the cpu, so that every device sees the same
        seed = seed_of(config.seed, _NOISE, step, self.accelerator.process_index)
        generator = torch.Generator().manual_seed(seed)
        inputs, asked = self.prior.corrupt(tokens, keep=config.keep_at(step), generator=generator)
        logits = self.prepared(inputs.to(self.device), labels)
        loss = self.prior.score(
            logits, tokens.to(self.device), asked.to(self.device), label_smoothing=config.label_smoothing
        )
        self.optimizer.zero_grad()
        self.accelerator.backward(loss)
        if config.clip:
            self.accelerator.clip_grad_norm_(self.prepared.parameters(), config.clip)
        self.optimizer.step()
        self.sums += torch.stack((loss.detach(), torch.ones_like(loss))).double()
        self.step += 1

    def batch(self, step: int) -> tuple[Tensor, Tensor | None]:
        """Tokens (B / world, n) on the CPU and their classes on the device, a function of seed and step alone."""
        rng = np.random.default_rng((self.config.seed, _BATCH, step))
        rows = rng.integers(len(self.tokens.train), size=self.config.batch_size)
        share = len(rows) // self.accelerator.num_processes
        own = rows[self.accelerator.process_index * share :][:share]
        return self.of(self.tokens.train, self.tokens.train_labels, own)

    def of(self, tokens: Any, labels: Any, rows: Any) -> tuple[Tensor, Tensor | None]:
        taken = torch.from_numpy(tokens[rows].astype(np.int64))
        if not self.num_classes:
            return taken, None
        return taken, torch.from_numpy(labels[rows].astype(np.int64)).to(self.device)

    def line(self) -> Line:
        """The line of the window that ends here; ends the run where the loss is not finite."""
        total, steps = self.sum(self.sums).tolist()
        self.sums.zero_()
        self.require_finite(total)
        lr, keep = self.config.lr_at(self.step - 1), self.config.keep_at(self.step - 1)
        return {"step": self.step, "split": "train", "loss": total / steps, "lr": lr, "p_keep": keep}

    @torch.no_grad()
    def held_out_line(self) -> Line:
        """The code length of held-out images, of MaskGIT a bound on it."""
        self.prior.eval()
        count = min(len(self.tokens.held_out), HELD_OUT_SEQUENCES)
        rows = np.linspace(0, len(self.tokens.held_out) - 1, count).round().astype(np.int64)
        generator = torch.Generator(self.device).manual_seed(seed_of(self.config.seed, _MEASURE))
        nats = 0.0
        for part in np.array_split(rows, math.ceil(count / self.config.batch_size)):
            tokens, labels = self.of(self.tokens.held_out, self.tokens.held_out_labels, part)
            nats += float(self.prior.nats(tokens.to(self.device), labels, generator=generator).double().sum())
        loss = nats / count
        return {"step": self.step, "split": "held_out", "loss": loss, "bits_per_token": loss / math.log(2)}

    def require_finite(self, loss: float) -> None:
        if not math.isfinite(loss):
            self.refuse_not_finite("loss", f"{loss} at step {self.step}")

    def refuse_not_finite(self, what: str, got: str) -> NoReturn:
        fix = "Start again in another --out with a lower --lr or --precision no"
        refuse(RunError, "prior", what, "stay finite", got, fix)

    def sum(self, tensor: Tensor) -> Tensor:
        return cast(Tensor, self.accelerator.reduce(tensor, reduction="sum"))

    def agreed(self, stop: StopSignals) -> bool:
        """Whether to stop; several processes agree on it where they wait for each other anyway."""
        if self.accelerator.num_processes == 1:
            return stop.name is not None
        if self.step % self.config.log_every:
            return False
        return bool(self.sum(torch.tensor(float(stop.name is not None), device=self.device)) > 0)

    def save(self, log: MetricsLog | None) -> None:
        sums = self.sum(self.sums).cpu()
        # weights that a bad step has spoilt must not replace good ones; its own loss may have been finite
        self.require_finite(float(sums.sum()))
        if not bool(all_finite(self.prior.state_dict())):
            self.refuse_not_finite("weights", f"others after step {self.step}")
        if log is None:
            return
        log.sync()
        scaler = self.accelerator.scaler
        content = {
            "config": self.config.to_json(),
            "step": self.step,
            "tokens": self.tokens.key,
            "checkpoint_digest": self.tokens.checkpoint_digest,
            "grid": list(self.tokens.grid),
            "num_codes": self.tokens.num_codes,
            "num_classes": self.num_classes,
            "model": self.prior.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else {},
            "sums": sums,
            "rng": rng_state(self.device),
        }
        save_state(self.config.checkpoint_path(), content)

    def restore(self, saved: Mapping[str, Any], path: Path) -> None:
        found = PriorConfig.from_json(saved["config"]).differences(self.config)
        if saved["tokens"] != self.tokens.key:
            found.append(f"tokens ({saved['tokens']}, {self.tokens.key})")
        if found:
            got = f"(checkpoint, asked for) {', '.join(found)} in {path}"
            fix = "Pass the checkpoint's values, or another --out to start afresh"
            refuse(RunError, "prior", "checkpoint", "be of the same configuration", got, fix)
        fill(self.prior, saved, path)
        self.optimizer.load_state_dict(saved["optimizer"])
        if self.accelerator.scaler is not None and saved["scaler"]:
            self.accelerator.scaler.load_state_dict(saved["scaler"])
        if self.accelerator.is_main_process:
            self.sums.copy_(saved["sums"])
        restore_rng(saved["rng"], self.device)
        self.step = saved["step"]


def _optimizer(prior: TokenPrior, config: PriorConfig) -> torch.optim.AdamW:
    groups = [
        {"params": [p for p in prior.parameters() if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in prior.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2))
