"""Priors over the tokens of an autoencoder: GPT and MaskGIT, on networks of Hugging Face's transformers."""

import math

import torch
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

from vqkernels.checks import check_count, check_number, refuse
from vqkernels.models.token_prior import Corrupted, TokenPrior, check_sampling, draw_tokens


class GPTPrior(TokenPrior):
    """p(t | c) = product over i of p(t_i | t_<i, c) by a causal transformer (Esser et al. 2021; DiVeQ, A.2).

    The network is GPT-2 with random weights; the class, or a start token, is the token before the first.
    """

    def __init__(
        self,
        num_codes: int,
        length: int,
        *,
        num_classes: int = 0,
        layers: int = 28,
        heads: int = 16,
        width: int = 1024,
        dropout: float = 0.1,
    ) -> None:
        """Build the network with fresh weights from torch's default generator.

        Args:
            num_codes: values a token can take.
            length: tokens in a sequence, n = h w Q.
            num_classes: classes of the images, 0 for none.
            layers: transformer blocks.
            heads: attention heads in a block.
            width: features of a token inside.
            dropout: probability, everywhere GPT-2 has one.

        Raises:
            TypeError: if a size is not an int.
            ValueError: if a value is out of range, or the heads do not divide the width.
        """
        super().__init__(num_codes, length, num_classes, layers, heads, width)
        check_number("GPTPrior", "dropout", dropout, below=1)
        self.network = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=num_codes + max(1, num_classes),
                n_positions=length,
                n_embd=width,
                n_layer=layers,
                n_head=heads,
                resid_pdrop=dropout,
                embd_pdrop=dropout,
                attn_pdrop=dropout,
                bos_token_id=None,
                eos_token_id=None,
            )
        )

    def corrupt(
        self, tokens: Tensor, *, keep: float = 1.0, generator: torch.Generator | None = None
    ) -> Corrupted:
        """Replace every input token by any one with probability 1 - keep; all true tokens are asked for.

        Args:
            tokens: (B, n) int64.
            keep: probability that a shown token is the true one, p_keep of DiVeQ, A.2.
            generator: of the draws, on the device of the tokens.
        """
        check_number("GPTPrior", "keep", keep, up_to=1)
        asked = torch.ones_like(tokens, dtype=torch.bool)
        if keep == 1:
            return Corrupted(tokens, asked)
        kept = torch.rand(tokens.shape, generator=generator, device=tokens.device) < keep
        anything = torch.randint(self.num_codes, tokens.shape, generator=generator, device=tokens.device)
        return Corrupted(torch.where(kept, tokens, anything), asked)

    def corrupt_to_measure(self, tokens: Tensor, *, generator: torch.Generator | None = None) -> Corrupted:
        """Show the true tokens: the mean loss is the code length itself.

        Args:
            tokens: (B, n) int64.
            generator: not used.
        """
        return self.corrupt(tokens)

    def forward(self, inputs: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the logits of token i given those before it.

        Args:
            inputs: (B, n) int64; the last column is not seen.
            labels: (B,) int64 classes, None for a prior without them.

        Returns:
            (B, n, num_codes).

        Raises:
            TypeError: if tokens or labels are not int64.
            ValueError: if shapes do not fit, or labels are given to a prior without classes, or missing.
        """
        self._check_tokens(inputs)
        start = self.beginning(len(inputs), labels)
        seen = torch.cat((start[:, None], inputs[:, :-1]), 1)  # (B, n)
        return self.network(input_ids=seen, use_cache=False).logits[..., : self.num_codes]

    @torch.no_grad()
    def sample(
        self,
        count: int,
        labels: Tensor | None = None,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
        cache: bool = True,
    ) -> Tensor:
        """Draw sequences token by token; the training flag is left as it was.

        Args:
            count: sequences to draw.
            labels: (count,) int64 classes, None for a prior without them.
            temperature: divides the logits.
            top_k: only the k likeliest codes are drawn; None for all, 1 for the likeliest.
            generator: of the draws, on the device of the prior.
            cache: keep keys and values of earlier tokens instead of computing them again.

        Returns:
            (count, n) int64.

        Raises:
            TypeError: if an argument has the wrong type.
            ValueError: if a value is out of range.
        """
        check_sampling("GPTPrior", count, temperature, top_k)
        training = self.training
        self.eval()
        try:
            sequence = self.beginning(count, labels)[:, None]
            past = None
            for _ in range(self.length):
                shown = sequence[:, -1:] if past is not None else sequence
                found = self.network(input_ids=shown, past_key_values=past, use_cache=cache, logits_to_keep=1)
                past = found.past_key_values if cache else None
                logits = found.logits[:, -1, : self.num_codes]
                drawn = draw_tokens(logits, temperature=temperature, top_k=top_k, generator=generator)
                sequence = torch.cat((sequence, drawn[:, None]), 1)
        finally:
            self.train(training)
        return sequence[:, 1:]


class MaskGITPrior(TokenPrior):
    """p(masked tokens | the others, c) by a bidirectional transformer (Chang et al. 2022, section 3).

    The network is BERT with random weights; the class, or a start token, is the token before the first.
    """

    def __init__(
        self,
        num_codes: int,
        length: int,
        *,
        num_classes: int = 0,
        layers: int = 8,
        heads: int = 8,
        width: int = 768,
        dropout: float = 0.1,
    ) -> None:
        """Build the network with fresh weights from torch's default generator.

        Args:
            num_codes: values a token can take.
            length: tokens in a sequence, n = h w Q.
            num_classes: classes of the images, 0 for none.
            layers: transformer blocks.
            heads: attention heads in a block.
            width: features of a token inside.
            dropout: probability, everywhere BERT has one.

        Raises:
            TypeError: if a size is not an int.
            ValueError: if a value is out of range, or the heads do not divide the width.
        """
        super().__init__(num_codes, length, num_classes, layers, heads, width)
        check_number("MaskGITPrior", "dropout", dropout, below=1)
        self.mask_token = num_codes + max(1, num_classes)
        self.network = BertForMaskedLM(
            BertConfig(
                vocab_size=self.mask_token + 1,
                hidden_size=width,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                intermediate_size=4 * width,
                hidden_dropout_prob=dropout,
                attention_probs_dropout_prob=dropout,
                max_position_embeddings=length + 1,
                type_vocab_size=1,
                # code 0 is a code as any other
                pad_token_id=None,
            )
        )

    def corrupt(
        self, tokens: Tensor, *, keep: float = 1.0, generator: torch.Generator | None = None
    ) -> Corrupted:
        """Mask ceil(cos(pi u / 2) n) tokens of each sequence, u uniform in [0, 1); they are asked for.

        Args:
            tokens: (B, n) int64.
            keep: probability that a token left to see is the true one.
            generator: of the draws, on the device of the tokens.
        """
        check_number("MaskGITPrior", "keep", keep, up_to=1)
        u = torch.rand(len(tokens), generator=generator, device=tokens.device, dtype=torch.float64)
        asked = self._choose((torch.cos(u * (math.pi / 2)) * self.length).ceil(), tokens, generator)
        shown = tokens
        if keep < 1:
            kept = torch.rand(tokens.shape, generator=generator, device=tokens.device) < keep
            anything = torch.randint(self.num_codes, tokens.shape, generator=generator, device=tokens.device)
            shown = torch.where(kept, tokens, anything)
        return Corrupted(shown.masked_fill(asked, self.mask_token), asked)

    def corrupt_to_measure(self, tokens: Tensor, *, generator: torch.Generator | None = None) -> Corrupted:
        """Mask 1 to n tokens, all numbers equally likely: the mean over them bounds the code length.

        -log p(t) <= n E_m [mean over m masked tokens of -log p(t_i | the others)], of Hoogeboom et al. 2022,
        equation 4.

        Args:
            tokens: (B, n) int64.
            generator: of the draws, on the device of the tokens.
        """
        shape = (len(tokens),)
        counts = torch.randint(1, self.length + 1, shape, generator=generator, device=tokens.device)
        asked = self._choose(counts, tokens, generator)
        return Corrupted(tokens.masked_fill(asked, self.mask_token), asked)

    def forward(self, inputs: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the logits of every token given all inputs.

        Args:
            inputs: (B, n) int64, `mask_token` where unknown.
            labels: (B,) int64 classes, None for a prior without them.

        Returns:
            (B, n, num_codes).

        Raises:
            TypeError: if tokens or labels are not int64.
            ValueError: if shapes do not fit, or labels are given to a prior without classes, or missing.
        """
        self._check_tokens(inputs)
        seen = torch.cat((self.beginning(len(inputs), labels)[:, None], inputs), 1)  # (B, 1 + n)
        return self.network(input_ids=seen).logits[:, 1:, : self.num_codes]

    @torch.no_grad()
    def sample(
        self,
        count: int,
        labels: Tensor | None = None,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
        iterations: int = 12,
        choice_temperature: float = 4.5,
        known: Tensor | None = None,
    ) -> Tensor:
        """Draw all unknown tokens at once, keep the surest, and again (Chang et al. 2022, section 3.2).

        After iteration t of T, floor(cos(pi t / 2T) m) of m unknown tokens are unknown still, and at least
        one less than before; the surest have the largest log p + choice_temperature (1 - t / T) gumbel. The
        training flag is left as it was.

        Args:
            count: sequences to draw.
            labels: (count,) int64 classes, None for a prior without them.
            temperature: divides the logits of the codes.
            top_k: only the k likeliest codes are drawn; None for all, 1 for the likeliest.
            generator: of the draws, on the device of the prior.
            iterations: T.
            choice_temperature: of the noise in the choice of what to keep, 0 for none.
            known: (count, n) int64 tokens that stay, negative where a token is wanted; None for none.

        Returns:
            (count, n) int64.

        Raises:
            TypeError: if an argument has the wrong type.
            ValueError: if a value is out of range, or `known` has another shape or no such codes.
        """
        check_sampling("MaskGITPrior", count, temperature, top_k)
        check_count("MaskGITPrior", "iterations", iterations, minimum=1)
        check_number("MaskGITPrior", "choice_temperature", choice_temperature)
        tokens = self._unknown(count) if known is None else self._fill(known, count)
        unknown = (tokens == self.mask_token).sum(1)  # (count,)
        wanted = unknown
        training = self.training
        self.eval()
        try:
            for number in range(1, iterations + 1):
                part = number / iterations
                logits = self(tokens, labels)
                masked = tokens == self.mask_token
                drawn = draw_tokens(logits, temperature=temperature, top_k=top_k, generator=generator)
                sure = logits.float().log_softmax(-1).gather(-1, drawn[..., None])[..., 0]
                # -log of an exponential variable is a gumbel one
                noise = torch.empty_like(sure).exponential_(generator=generator).log().neg()
                sure = (sure + choice_temperature * (1 - part) * noise).masked_fill(~masked, math.inf)
                share = math.cos(part * (math.pi / 2)) if number < iterations else 0.0
                unknown = torch.minimum((wanted * share).floor().long(), (unknown - 1).clamp_min(0))
                again = sure.argsort(1).argsort(1) < unknown[:, None]
                tokens = torch.where(masked & ~again, drawn, tokens)
        finally:
            self.train(training)
        return tokens

    def _unknown(self, count: int) -> Tensor:
        shape = (count, self.length)
        return torch.full(shape, self.mask_token, dtype=torch.int64, device=self.device)

    def _fill(self, known: Tensor, count: int) -> Tensor:
        self._check_tokens(known)
        if len(known) != count or int(known.max()) >= self.num_codes:
            requirement = f"be ({count}, {self.length}) codes below {self.num_codes}"
            got = f"shape {tuple(known.shape)} with values up to {int(known.max())}"
            fix = "Pass negative values for tokens to draw"
            refuse(ValueError, "MaskGITPrior", "known", requirement, got, fix)
        return known.masked_fill(known < 0, self.mask_token)

    def _choose(self, counts: Tensor, tokens: Tensor, generator: torch.Generator | None) -> Tensor:
        """Choose a number of places in each row, uniformly."""
        places = torch.rand(tokens.shape, generator=generator, device=tokens.device).argsort(1).argsort(1)
        return places < counts.clamp(1, self.length)[:, None]
