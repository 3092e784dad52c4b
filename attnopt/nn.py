"""`torch.nn.MultiheadAttention` with another attention inside, and the same parameters.

    layer = torch.nn.TransformerEncoderLayer(512, 8, batch_first=True)
    encoder = torch.nn.TransformerEncoder(layer, 6)
    attnopt.nn.replace_attention(encoder, attnopt.LastK(window=32, sinks=4))

Letters: B batch, H heads, N tokens, E width of the model, D = E / H.
"""

from __future__ import annotations

import logging
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt.attention import Config, build_mechanism

logger = logging.getLogger(__name__)

_Model = TypeVar("_Model", bound=torch.nn.Module)


class MultiheadAttention(torch.nn.MultiheadAttention):
    """Self-attention of H heads by a mechanism, in the place of `torch.nn.MultiheadAttention`.

    Parameters have the names they have there, so a state dict of the original loads; what the
    mechanism learns is under `mechanism.` and keeps its start where a state dict has none of it.
    PyTorch's fused inference path, which would pass by the mechanism, is never taken.

    Args:
        embed_dim: E, width of queries and outputs.
        num_heads: H, a divisor of E.
        attention: what to attend by, such as `attnopt.LastK(window=32)`.
        causal: whether a token sees itself and earlier ones only. No mask is needed for it.
        dropout: must be 0: fused attention has no dropout on its weights.
        bias: whether the projections have biases.
        kdim: width of the keys' input, E by default.
        vdim: width of the values' input, E by default.
        batch_first: inputs are `[B, N, E]`, not `[N, B, E]`.
        layer_idx: index of the layer in its model, which a config's seed is mixed with.
        device: of the parameters.
        dtype: of the projections.

    Raises:
        ValueError: dropout, or a mechanism that cannot attend in this direction.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        attention: Config,
        *,
        causal: bool = False,
        dropout: float = 0.0,
        bias: bool = True,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        layer_idx: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if dropout:
            raise ValueError(
                f"dropout must be 0: attention has none on its weights here; got {dropout}"
            )
        super().__init__(
            embed_dim, num_heads, bias=bias, kdim=kdim, vdim=vdim, batch_first=batch_first,
            device=device, dtype=dtype,
        )  # fmt: skip
        weight = self.out_proj.weight
        with weight.device:
            self.mechanism = build_mechanism(
                attention,
                num_heads=num_heads,
                num_kv_heads=num_heads,
                head_dim=self.head_dim,
                hidden_size=embed_dim,
                layer_idx=layer_idx,
                causal=causal,
            ).to(weight.dtype)

    @classmethod
    def from_torch(
        cls,
        module: torch.nn.MultiheadAttention,
        attention: Config,
        *,
        causal: bool = False,
        layer_idx: int = 0,
    ) -> MultiheadAttention:
        """Make one that shares the parameters of an existing module; its dropout becomes 0.

        Args:
            module: a `torch.nn.MultiheadAttention`.
            attention: what to attend by.
            causal: whether a token sees itself and earlier ones only.
            layer_idx: as in the constructor.

        Returns:
            The new module, in the mode of the old one.

        Raises:
            ValueError: a module of another class, or one with add_bias_kv or add_zero_attn.
        """
        if type(module) is not torch.nn.MultiheadAttention:
            raise ValueError(f"expected a torch.nn.MultiheadAttention; got {type(module).__name__}")
        if module.bias_k is not None or module.bias_v is not None or module.add_zero_attn:
            raise ValueError(
                "add_bias_kv and add_zero_attn put a key beside the text, which only softmax over "
                "all of it can see; leave them out"
            )
        made = cls(
            module.embed_dim,
            module.num_heads,
            attention,
            causal=causal,
            bias=module.in_proj_bias is not None,
            kdim=module.kdim,
            vdim=module.vdim,
            batch_first=module.batch_first,
            layer_idx=layer_idx,
            device=module.out_proj.weight.device,
            dtype=module.out_proj.weight.dtype,
        )
        for name, parameter in module.named_parameters(recurse=False):
            setattr(made, name, parameter)
        made.out_proj = module.out_proj
        if module.dropout:
            logger.info("dropout on attention weights, %s, is 0 from here on", module.dropout)
        return made.train(module.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """Attend within one text, or one per row of a batch.

        Args:
            query: `[N, B, E]`, with batch_first `[B, N, E]`, or without a batch `[N, E]`.
            key: as `query`, of the width kdim; token i is token i of `query`.
            value: as `query`, of the width vdim.
            key_padding_mask: `[B, N]` or `[N]`, bool and True for padding, or floating point with
                0 for tokens and -inf for padding. What comes out at padding means nothing.
            need_weights: must be False, the default here: the weights are never formed.
            attn_mask: `[N, N]`, the causal mask and no other, where the module is causal.
            average_attn_weights: not used.
            is_causal: True only where the module is causal; needs no `attn_mask`.

        Returns:
            A tensor of the shape of `query`, and None in the place of weights.

        Raises:
            ValueError: attention weights asked for, cross-attention, a mask that says anything
                else than padding or the module's direction, or nested tensors.
        """
        _check_inputs(query, key, value, need_weights)
        rows, keys, values = (self._by_row(x) for x in (query, key, value))  # [B, N, ...]
        self._check_direction(attn_mask, is_causal, rows.shape[1])
        if query is key and key is value and self.in_proj_weight is not None:
            parts = F.linear(rows, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        else:
            parts = self._project(rows, keys, values)
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in parts)
        key_mask = _key_mask(key_padding_mask, query, rows)
        out = self.mechanism(q, k, v, key_mask=key_mask, hidden_states=rows)  # [B, H, N, D]
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        if query.dim() == 2:
            return out.squeeze(0), None
        return out if self.batch_first else out.transpose(0, 1), None

    def _reset_parameters(self) -> None:
        """Initialize the projections as PyTorch does; its constructor ends with this."""
        self._qkv_same_embed_dim = self.in_proj_weight is not None
        super()._reset_parameters()
        # PyTorch's layers ask this before they bypass forward; here it says no more than that.
        self._qkv_same_embed_dim = False

    def _by_row(self, x: Tensor) -> Tensor:
        """An input as `[B, N, ...]`."""
        if x.dim() == 2:
            return x.unsqueeze(0)
        return x if self.batch_first else x.transpose(0, 1)

    def _project(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values `[B, N, E]` from inputs of their own."""
        weights: tuple[Tensor, ...] = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        if self.in_proj_weight is not None:
            weights = self.in_proj_weight.chunk(3)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return tuple(F.linear(*each) for each in zip(inputs, weights, biases, strict=True))

    def _check_direction(self, attn_mask: Tensor | None, is_causal: bool, length: int) -> None:
        """Refuse a mask, or the hint of one, that is not the direction of the module."""
        if not self.mechanism.causal:
            if is_causal or attn_mask is not None:
                raise ValueError(
                    "this module attends in both directions and takes no attn_mask; for a causal "
                    "one build it with causal=True"
                )
            return
        if attn_mask is None:
            return
        if tuple(attn_mask.shape[-2:]) != (length, length):
            raise ValueError(
                f"attn_mask must be the causal mask [{length}, {length}]; got the shape "
                f"{list(attn_mask.shape)}"
            )
        if torch.compiler.is_compiling():
            if is_causal:
                return  # the values cannot be looked at, but the caller vouches for them
            raise ValueError("while compiling leave attn_mask out: the module is causal by itself")
        later = torch.ones(length, length, dtype=torch.bool, device=attn_mask.device).triu(1)
        if not torch.equal(_hidden("attn_mask", attn_mask), later.expand(attn_mask.shape)):
            raise ValueError(
                "attn_mask must be exactly the causal mask, True or -inf above the diagonal and "
                "False or 0 elsewhere; the mechanism decides what else is seen. Leave it out: a "
                "module with causal=True needs none"
            )

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, *args: object
    ) -> None:
        """Load; a state dict of the original leaves the mechanism as it is."""
        inner = f"{prefix}mechanism."
        if not any(name.startswith(inner) for name in state_dict):
            own = self.mechanism.state_dict(prefix=inner)
            state_dict.update(own)
        super()._load_from_state_dict(state_dict, prefix, *args)


def replace_attention(model: _Model, attention: Config, *, causal: bool = False) -> _Model:
    """Replace every `torch.nn.MultiheadAttention` within a model, in place.

    The cross-attention of PyTorch's decoder layers (`multihead_attn`) stays as it is, and so do
    subclasses of the module, parametrized ones among them. Encoders no longer turn padded batches
    into nested tensors. Dropout on attention weights becomes 0.

    Args:
        model: what holds them; base weights stay the same parameters.
        attention: what to attend by.
        causal: whether a token sees itself and earlier ones only, in all of them. An encoder and a
            decoder take a call each.

    Returns:
        The same object.

    Raises:
        ValueError: nothing to replace, or a module that cannot be; the model is then unchanged.
    """
    made: dict[torch.nn.Module, MultiheadAttention] = {}
    places = []
    for path, module in model.named_modules(remove_duplicate=False):
        if type(module) is not torch.nn.MultiheadAttention or not path:
            continue
        parent_path, _, name = path.rpartition(".")
        parent = model.get_submodule(parent_path)
        if isinstance(parent, torch.nn.TransformerDecoderLayer) and name == "multihead_attn":
            continue
        places.append((parent, name, module))
        if module not in made:
            made[module] = MultiheadAttention.from_torch(
                module, attention, causal=causal, layer_idx=len(made)
            )
    if not places:
        raise ValueError(
            "found no torch.nn.MultiheadAttention to replace within "
            f"{type(model).__name__}; MultiheadAttention.from_torch takes one by itself"
        )
    for parent, name, module in places:
        setattr(parent, name, made[module])
    for encoder in model.modules():
        if isinstance(encoder, torch.nn.TransformerEncoder):
            encoder.use_nested_tensor = False
    return model


def _check_inputs(query: Tensor, key: Tensor, value: Tensor, need_weights: bool) -> None:
    """Refuse what has no meaning to a mechanism."""
    if need_weights:
        raise ValueError("need_weights must be False: attention weights are never formed")
    if query.is_nested or key.is_nested or value.is_nested:
        raise ValueError(
            "expected plain tensors; got nested ones. A torch.nn.TransformerEncoder makes them of "
            "padded batches unless its use_nested_tensor is False"
        )
    if query.dim() not in (2, 3):
        raise ValueError(
            f"query must have 2 dimensions, or 3 with a batch; got shape {list(query.shape)}"
        )
    if not query.shape[:-1] == key.shape[:-1] == value.shape[:-1]:
        raise ValueError(
            "only self-attention: query, key and value must hold the same tokens; got the shapes "
            f"{list(query.shape)}, {list(key.shape)} and {list(value.shape)}"
        )


def _key_mask(padding: Tensor | None, query: Tensor, rows: Tensor) -> Tensor | None:
    """The mask of real tokens `[B, N]` from PyTorch's mask of padding."""
    if padding is None:
        return None
    expected = rows.shape[:2] if query.dim() == 3 else rows.shape[1:2]
    if padding.shape != expected:
        raise ValueError(
            f"key_padding_mask must have the shape {list(expected)}; got {list(padding.shape)}"
        )
    return ~_hidden("key_padding_mask", padding).view(rows.shape[:2])


def _hidden(name: str, mask: Tensor) -> Tensor:
    """Where a mask hides: True, or -inf in a floating-point one, which holds nothing else but 0."""
    if mask.dtype == torch.bool:
        return mask
    if not mask.is_floating_point():
        raise ValueError(f"{name} must be bool or floating point; got {mask.dtype}")
    hidden = mask == -torch.inf
    if not torch.compiler.is_compiling() and not bool((hidden | (mask == 0)).all()):
        raise ValueError(
            f"a floating-point {name} must hold 0 and -inf and nothing else: weights of one's own "
            "cannot be added to the scores"
        )
    return hidden
