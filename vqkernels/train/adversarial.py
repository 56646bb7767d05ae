"""Training against a discriminator, as VQGAN does (Esser et al. 2021)."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from vqkernels.checks import check_choice, refuse
from vqkernels.models import LPIPS, ImageAutoencoder, PatchDiscriminator
from vqkernels.train.config import RunError, TrainConfig
from vqkernels.train.learner import Learner, StepResult
from vqkernels.train.losses import DISCRIMINATOR_LOSSES, ImageLoss, adaptive_weight, generator_loss, pull
from vqkernels.train.procedure import mean_over_ranks, split_parameters


class Adversarial(Learner):
    """One step of the autoencoder with its codes, then one of the discriminator, on the same reconstructions.

        L = L_task + adversarial * lambda * L_game + L_quantizer,   L_game = -mean D(reconstruction)
        lambda = |grad L_task| / (|grad L_game| + 1e-4) in the decoder's last layer, at most 1e4     (eqs. 5 to 7)

    L_task is `ImageLoss`; the discriminator minimises the hinge or the vanilla loss. Until the first
    `discriminator_start` of the steps are over nothing of the game is computed; with `adversarial` = 0 there is no
    discriminator. The gradients of L_task and L_game meet at the reconstruction and go through the autoencoder once,
    so that none reaches the discriminator's parameters; lambda is one for all processes, from gradients averaged over
    them. A batch is cut into `accumulate` parts whose gradients add up, each with its own lambda. With more than one
    process on GPUs the discriminator normalises over all of them, on CPUs over the images of each.

    Extras: gan_weight (adversarial * lambda), discriminator_loss, logits_real and logits_fake once the game has
    begun, and perceptual where LPIPS is given.
    """

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        model: ImageAutoencoder,
        *,
        loss: str = "hinge",
    ) -> None:
        """Build the discriminator and the optimizers, and prepare them all.

        Args:
            config: of the run.
            accelerator: of the run; one that accumulates no gradients by itself.
            model: to train, not prepared yet.
            loss: of the discriminator, "hinge" or "vanilla".

        Raises:
            RunError: if the weights of LPIPS cannot be read, or the crops are too small.
        """
        super().__init__(config, accelerator, model)
        self.discriminator_loss = DISCRIMINATOR_LOSSES[
            check_choice("Adversarial", "loss", loss, tuple(DISCRIMINATOR_LOSSES))
        ]
        device = accelerator.device
        self.image_loss = ImageLoss(
            config.reconstruction,
            perceptual=_perceptual(config),
            perceptual_weight=config.perceptual_weight,
        ).to(device)
        codes, rest = split_parameters(model)
        optimizer = _optimizer(config, rest, codes)
        model.quantizer.follow(optimizer)
        self.prepared, self.optimizer = accelerator.prepare(model, optimizer)
        self.start = round(config.discriminator_start * config.steps)
        self.discriminator: PatchDiscriminator | None = None
        if config.adversarial > 0 and self.start < config.steps:
            self._build_discriminator()

    def _build_discriminator(self) -> None:
        config, accelerator = self.config, self.accelerator
        width, layers = config.discriminator_width, config.discriminator_layers
        discriminator = PatchDiscriminator(self.model.in_channels, width=width, layers=layers)
        if config.crop < discriminator.min_side:
            requirement = f"be {discriminator.min_side} or more for {layers} layers of the discriminator"
            fix = "Pass fewer --discriminator-layers"
            refuse(RunError, "train", "crop", requirement, config.crop, fix)
        if accelerator.num_processes > 1 and accelerator.device.type == "cuda":
            nn.SyncBatchNorm.convert_sync_batchnorm(discriminator)
        self.discriminator = discriminator
        self.pair, self.discriminator_optimizer = accelerator.prepare(
            _Pair(discriminator), _optimizer(config, list(discriminator.parameters()))
        )

    def step(self, batch: Tensor, number: int) -> StepResult:
        discriminator = self.discriminator if number >= self.start else None
        self._set_rates(number)
        parts = batch.chunk(self.config.accumulate)
        shares = [len(part) / len(batch) for part in parts]
        self.optimizer.zero_grad()
        found: list[StepResult] = []
        fakes: list[Tensor] = []
        for part, share in zip(parts, shares, strict=True):
            with self._averaging_gradients(self.prepared, part is parts[-1]):
                result, fake = self._descend(part, share, discriminator)
            found.append(result)
            fakes.append(fake)
        self.optimizer.step()
        extras = _means([result.extras for result in found], shares)
        if discriminator is not None:
            self.discriminator_optimizer.zero_grad()
            told: list[dict[str, Tensor]] = []
            for part, fake, share in zip(parts, fakes, shares, strict=True):
                with self._averaging_gradients(self.pair, part is parts[-1]):
                    told.append(self._judge(part, fake, share))
            self.discriminator_optimizer.step()
            extras |= _means(told, shares)
        means = _means([{"loss": result.loss, "mse": result.mse} for result in found], shares)
        indices = torch.cat([result.indices for result in found])
        return StepResult(means["loss"], means["mse"], indices, extras)

    def _descend(
        self, images: Tensor, share: float, discriminator: PatchDiscriminator | None
    ) -> tuple[StepResult, Tensor]:
        """Gradients of the autoencoder on a part of the batch, and the reconstruction."""
        reconstruction, indices, quantizer_loss = self.prepared(images)
        with self.accelerator.autocast():
            judged = self.image_loss(reconstruction, images)
        extras = {} if judged.perceptual is None else {"perceptual": judged.perceptual}
        fake = reconstruction.detach()
        if discriminator is None:
            loss = judged.total + quantizer_loss
            self.accelerator.backward(loss * share)
            return StepResult(loss.detach(), judged.mse, indices, extras), fake
        # not the prepared one: its reducer waits for gradients that this pass has none of
        with self.accelerator.autocast():
            game = generator_loss(discriminator(reconstruction).to(reconstruction.dtype))
        weight, slope = self._balance(reconstruction, judged.total, game)
        # has the gradient of the whole loss, without a second way back through the judges
        stand_in = (reconstruction * slope).sum() + quantizer_loss
        self.accelerator.backward(stand_in * share)
        loss = judged.total.detach() + weight * game.detach() + quantizer_loss.detach()
        return StepResult(loss, judged.mse, indices, extras | {"gan_weight": weight}), fake

    def _balance(self, reconstruction: Tensor, task: Tensor, game: Tensor) -> tuple[Tensor, Tensor]:
        """The weight of the game, and the gradient of both losses in the reconstruction."""
        scale = self._scale()
        slopes = [torch.autograd.grad(loss * scale, reconstruction)[0] for loss in (task, game)]
        # the gradient of the last layer is a small thing to reduce before its norm is taken
        last = self.model.last_layer
        pulls = mean_over_ranks([pull(reconstruction, last, slope) / scale for slope in slopes])
        weight = self.config.adversarial * adaptive_weight(*pulls)
        return weight, (slopes[0] + weight * slopes[1]) / scale

    def _scale(self) -> Tensor:
        """What keeps gradients within the range of half precision; 1 in other precisions."""
        one = torch.ones((), device=self.accelerator.device)
        scaler = self.accelerator.scaler
        return one if scaler is None else scaler.scale(one)

    def _judge(self, images: Tensor, fake: Tensor, share: float) -> dict[str, Tensor]:
        """Gradients of the discriminator on a part of the batch."""
        real_logits, fake_logits = self.pair(images, fake)
        loss = self.discriminator_loss(real_logits, fake_logits)
        self.accelerator.backward(loss * share)
        return {
            "discriminator_loss": loss.detach(),
            "logits_real": real_logits.detach().mean(),
            "logits_fake": fake_logits.detach().mean(),
        }

    def _averaging_gradients(self, model: nn.Module, last: bool) -> AbstractContextManager[None]:
        """Processes average gradients with the last part of a batch alone."""
        return nullcontext() if last else self.accelerator.no_sync(model)

    def _set_rates(self, number: int) -> None:
        optimizers = [self.optimizer]
        if self.discriminator is not None:
            optimizers.append(self.discriminator_optimizer)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.config.lr_at(number) * group["rate"]

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"optimizer": self.optimizer.state_dict()}
        if self.accelerator.scaler is not None:
            state["scaler"] = self.accelerator.scaler.state_dict()
        if self.discriminator is not None:
            state["discriminator"] = self.discriminator.state_dict()
            state["discriminator_optimizer"] = self.discriminator_optimizer.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        if self.accelerator.scaler is not None and state.get("scaler"):
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if self.discriminator is not None:
            self.discriminator.load_state_dict(state["discriminator"])
            self.discriminator_optimizer.load_state_dict(state["discriminator_optimizer"])


class _Pair(nn.Module):
    """Judges both halves in one forward, after which a wrapper that reduces gradients expects one backward."""

    def __init__(self, discriminator: PatchDiscriminator) -> None:
        super().__init__()
        self.discriminator = discriminator

    def forward(self, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
        # each with its own statistics, as in the released code of VQGAN
        return self.discriminator(real), self.discriminator(fake)


def _perceptual(config: TrainConfig) -> LPIPS | None:
    if config.perceptual is None or config.perceptual_weight == 0:
        return None
    try:
        return LPIPS.from_files(config.perceptual)
    except (FileNotFoundError, ValueError) as error:
        raise RunError(str(error)) from error


def _optimizer(
    config: TrainConfig, parameters: list[nn.Parameter], codes: list[nn.Parameter] | None = None
) -> torch.optim.Optimizer:
    """The run's optimizer; codes have their own rate and no weight decay."""
    groups: list[dict[str, Any]] = [{"params": parameters, "rate": 1.0}]
    if codes:
        groups.append({"params": codes, "rate": config.codes_rate, "weight_decay": 0.0})
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer]
    betas = (config.beta1, config.beta2)
    return kind(groups, lr=config.lr, betas=betas, weight_decay=config.weight_decay)


def _means(found: list[dict[str, Tensor]], shares: list[float]) -> dict[str, Tensor]:
    weighted = [
        {name: value * share for name, value in values.items()} for values, share in zip(found, shares)
    ]
    return {name: torch.stack([values[name] for values in weighted]).sum() for name in weighted[0]}
