"""Training against a discriminator, as VQGAN does (Esser et al. 2021)."""

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from vqkernels.checks import check_choice, refuse
from vqkernels.models import ImageAutoencoder, PatchDiscriminator
from vqkernels.train.config import RunError, TrainConfig
from vqkernels.train.learners.base import StepResult, make_optimizer, mean_of
from vqkernels.train.learners.joint import JointLearner, parts_of
from vqkernels.train.learners.losses import DISCRIMINATOR_LOSSES, adaptive_weight, generator_loss, pull
from vqkernels.train.learners.procedure import mean_over_ranks


class Adversarial(JointLearner):
    """One step of the autoencoder with its codes, then one of the discriminator, on the same reconstructions.

        L = L_task + adversarial * lambda * L_game + L_quantizer,   L_game = -mean D(reconstruction)
        lambda = |grad L_task| / (|grad L_game| + 1e-4) in the decoder's last layer, at most 1e4     (eqs. 5 to 7)

    L_task is `ImageLoss`; the discriminator minimises the hinge or the vanilla loss. Until the first
    `discriminator_start` of the steps are over nothing of the game is computed. The gradients of L_task and L_game meet at the reconstruction and go through the autoencoder once,
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
        self.start = config.discriminator_first_step
        self.discriminator: PatchDiscriminator | None = None
        if config.adversarial > 0:
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
        optimizer = make_optimizer(config, [{"params": list(discriminator.parameters()), "rate": 1.0}])
        self.pair, self.discriminator_optimizer = accelerator.prepare(_Pair(discriminator), optimizer)
        self.optimizers = [self.optimizer, self.discriminator_optimizer]
        self.discriminator = discriminator

    def step(self, batch: Tensor, number: int) -> StepResult:
        self._playing = self.discriminator if number >= self.start else None
        self._fakes: list[Tensor] = []
        found = super().step(batch, number)
        if self._playing is None:
            return found
        parts = batch.chunk(self.config.accumulate)
        shares = [len(part) / len(batch) for part in parts]
        self.discriminator_optimizer.zero_grad()
        told: list[dict[str, Tensor]] = []
        for part, fake, share in zip(parts, self._fakes, shares, strict=True):
            with self.averaging_gradients(self.pair, part is parts[-1]):
                told.append(self._judge(part, fake, share))
        self.discriminator_optimizer.step()
        return found._replace(extras={**found.extras, **mean_of(told, shares)})

    def descend(self, images: Tensor, share: float) -> tuple[dict[str, Tensor], Tensor]:
        discriminator = self._playing
        if discriminator is None:
            return super().descend(images, share)
        reconstruction, indices, quantizer_loss = self.prepared(images)
        self._fakes.append(reconstruction.detach())
        # not the prepared one: its reducer waits for gradients that this pass has none of
        with self.accelerator.autocast():
            judged = self.image_loss(reconstruction, images)
            game = generator_loss(discriminator(reconstruction).to(reconstruction.dtype))
        weight, slope = self._balance(reconstruction, judged.total, game)
        # has the gradient of the whole loss, without a second way back through the judges
        stand_in = (reconstruction * slope).sum() + quantizer_loss
        self.accelerator.backward(stand_in * share)
        loss = judged.total.detach() + weight * game.detach() + quantizer_loss.detach()
        return {"loss": loss, "gan_weight": weight, **parts_of(judged)}, indices

    def modules(self) -> dict[str, nn.Module]:
        return {} if self.discriminator is None else {"discriminator": self.discriminator}

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


class _Pair(nn.Module):
    """Judges both halves in one forward, after which a wrapper that reduces gradients expects one backward."""

    def __init__(self, discriminator: PatchDiscriminator) -> None:
        super().__init__()
        self.discriminator = discriminator

    def forward(self, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
        # each with its own statistics, as in the released code of VQGAN
        return self.discriminator(real), self.discriminator(fake)
