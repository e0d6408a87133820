"""The frozen LLM in this process: the host serves it, and where `llm.where=client` a client runs it.

Everything is frozen and in eval mode; only the gradient by the input embeddings is ever formed. The head runs at the
answer positions alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fedmm.adapters.inner import Inner
from fedmm.edge.frozen_modules import stop_tokens
from fedmm.losses import Mutual, answer_cross_entropy, branch_losses
from fedmm.types import Embeds, Squares, TokenTerm

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration


class LocalLLM:
    """The decoder and head of a LLaVA, called with embeddings. Inputs may be of another dtype; logits are fp32.

    With `checkpointing` a layer's activations are made again in the backward instead of kept: a third more arithmetic,
    a fraction of the memory, the same bits. `inner` are the adapters inside the layers, where there are any: frozen
    too, until somebody lets them be trained.
    """

    def __init__(
        self, model: LlavaForConditionalGeneration, *, checkpointing: bool = False, inner: Inner | None = None
    ) -> None:
        model.eval().requires_grad_(False)
        for layer in model.model.language_model.layers if checkpointing else ():
            _checkpoint(layer, inner or Inner({}))
        self.decoder = model.model.language_model
        self.head = model.lm_head
        self.dtype = self.head.weight.dtype
        self.device = self.head.weight.device
        self.width: int = self.decoder.config.hidden_size
        self.positions: int = self.decoder.config.max_position_embeddings
        self.vocabulary: int = self.head.weight.shape[0]
        self.stop_tokens = stop_tokens(model)
        self.samples = 0  # that went in, once for each branch; a generated answer once

    def __call__(
        self, embeds: Embeds, mask_BT: Bool[Tensor, "B T"], keep_BA: Int[Tensor, "B A"]
    ) -> Float[Tensor, "B A V"]:
        """Logits at `keep_BA`, differentiable by the embeddings."""
        self.samples += len(keep_BA)
        hidden_BTD = self.decoder(
            inputs_embeds=embeds.dense().to(self.device, self.dtype),
            attention_mask=mask_BT.to(self.device),
            use_cache=False,
        ).last_hidden_state
        rows_B1 = torch.arange(len(keep_BA), device=self.device)[:, None]
        return self.head(hidden_BTD[rows_B1, keep_BA.to(self.device)]).float()

    def losses(
        self,
        branches: Sequence[Embeds],
        mask_BT: Bool[Tensor, "B T"],
        keep_BA: Int[Tensor, "B A"],
        labels_BA: Int[Tensor, "B A"],
        mutual: Mutual | None = None,
        *,
        reduction: str = "mean",
    ) -> tuple[Float[Tensor, ""], ...]:
        """The loss of each branch (`fedmm.losses.branch_losses`), differentiable by its own embeddings."""
        logits = [self(embeds, mask_BT, keep_BA) for embeds in branches]
        return branch_losses(logits, labels_BA.to(self.device), mutual, reduction)

    def squares(
        self,
        embeds: Embeds,
        mask_BT: Bool[Tensor, "B T"],
        keep_BA: Int[Tensor, "B A"],
        labels_BA: Int[Tensor, "B A"],
    ) -> Squares:
        """What a diagonal Fisher of `log p(answer)`, summed over each sample's answer tokens, needs of the LLM."""
        with torch.enable_grad():
            base_BTD = embeds.dense().detach().requires_grad_()
            logits_BAV = self(Embeds.whole(base_BTD), mask_BT, keep_BA)
            loss = answer_cross_entropy(logits_BAV, labels_BA.to(self.device), reduction="sum")
            (grad_BTD,) = torch.autograd.grad(loss, base_BTD)
        return embeds.squares(grad_BTD)

    @torch.no_grad()
    def generate(
        self,
        embeds: Embeds,
        mask_BT: Bool[Tensor, "B T"],
        terms: Sequence[TokenTerm],
        max_tokens: int,
    ) -> Int[Tensor, "B N"]:
        """Greedy answers to right-padded prompts; every new token passes the text adapters, as training's tokens did.

        A row that has stopped is filled with its stop token.
        """
        from transformers import DynamicCache

        self.samples += len(mask_BT)
        mask_BT = mask_BT.to(self.device)
        length_B = mask_BT.sum(1)
        cache = {_cache_name(self.decoder): DynamicCache(config=self.decoder.config)}  # each pass adds to it
        out = self.decoder(
            inputs_embeds=embeds.dense().to(self.device, self.dtype), attention_mask=mask_BT, use_cache=True, **cache
        )
        last_BD = out.last_hidden_state[torch.arange(len(length_B), device=self.device), length_B - 1]
        stops = torch.tensor(self.stop_tokens, device=self.device)
        stopped_B = torch.zeros(len(length_B), dtype=torch.bool, device=self.device)
        tokens: list[Tensor] = []
        for n in range(max_tokens):
            token_B = self.head(last_BD).argmax(-1)
            token_B = torch.where(stopped_B, stops[0], token_B)
            tokens.append(token_B)
            stopped_B = stopped_B | torch.isin(token_B, stops)
            if stopped_B.all() or n + 1 == max_tokens:
                break
            mask_BT = torch.cat([mask_BT, mask_BT.new_ones(len(mask_BT), 1)], dim=1)
            out = self.decoder(
                inputs_embeds=self._embed(token_B, terms, embeds.embed)[:, None],
                attention_mask=mask_BT,
                position_ids=(length_B + n)[:, None],
                use_cache=True,
                **cache,
            )
            last_BD = out.last_hidden_state[:, -1]
        return torch.stack(tokens, dim=1).cpu()

    def _embed(self, token_B: Tensor, terms: Sequence[TokenTerm], embed: Callable[[Tensor], Tensor] | None) -> Tensor:
        x_BD = embed(token_B).to(self.dtype) if embed else self.decoder.embed_tokens(token_B)
        out_BD = x_BD
        for term in terms:
            down_RD, up_DR = term.down_RD.to(x_BD), term.up_DR.to(x_BD)
            out_BD = out_BD + term.scale * ((x_BD @ down_RD.T) @ up_DR.T)
        return out_BD


def _cache_name(decoder: nn.Module) -> str:
    """The parameter of a decoder that takes its cache: transformers 5.24 renamed it."""
    return "cache" if "cache" in inspect.signature(decoder.forward).parameters else "past_key_values"


def _checkpoint(layer: nn.Module, inner: Inner) -> None:
    """Have a layer make its activations again in the backward. transformers' own way does so in training mode only, and
    takes generation's cache away with it."""

    def again(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        use = inner.use

        def forward(*args: Any, **kwargs: Any) -> Any:
            inner.act(use)  # in the backward another branch's may act
            return type(self).forward(self, *args, **kwargs)

        return (
            checkpoint(forward, *args, use_reentrant=False, **kwargs)
            if torch.is_grad_enabled()
            else forward(*args, **kwargs)
        )

    layer.forward = MethodType(again, layer)  # type: ignore[method-assign]  # a method, so that a copy's is the copy's
