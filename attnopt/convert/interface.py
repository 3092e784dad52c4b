"""What transformers calls during the forward pass of a converted model.

`attention` and `key_mask` are registered under one name, so that every layer reaches `attention`
with the whole 2-D mask of real tokens. `check_inputs` runs before the backbone and refuses what the
mechanisms cannot honour; `pass_context` runs before each converted layer and hands over what the
attention function would not see: the layer's input and its part of the cache.

Letters: B batch, H query heads, Hkv key/value heads, Nq queries, Nk keys, D head dimension.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer
from transformers.masking_utils import causal_mask_function

from attnopt.attention.cache import MechanismCache, MechanismLayer

NAME = "attnopt"


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    attnopt_hidden_states: Tensor | None = None,
    attnopt_cache_layer: CacheLayerMixin | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend by the layer's mechanism, or by causal softmax in a layer that has none.

    Args:
        module: the attention module.
        query: `[B, H, Nq, D]`, the last Nq tokens.
        key: `[B, Hkv, Nk, D]`, from the cache.
        value: `[B, Hkv, Nk, D]`.
        attention_mask: bool `[B, all tokens so far]` from `key_mask`, or None.
        scaling: factor of the scores.
        dropout: of the attention weights; a layer with a mechanism has none.
        attnopt_hidden_states: from `pass_context`.
        attnopt_cache_layer: from `pass_context`.
        **kwargs: what else the model passes on; it does not concern attention.

    Returns:
        `[B, Nq, H, D]` and None in place of the attention weights.

    Raises:
        ValueError: attention dropout on a layer with a mechanism.
    """
    real = None if attention_mask is None else attention_mask[:, -key.shape[2] :]
    mechanism = getattr(module, NAME, None)
    if mechanism is None:
        return _softmax(module, query, key, value, real, dropout, scaling)
    if dropout:
        raise ValueError(
            f"layer {mechanism.layer_idx}: converted attention has no dropout on its weights; "
            f"leave it at 0 (convert sets that); got {dropout}"
        )
    options = {"scale": scaling, "hidden_states": attnopt_hidden_states}
    if isinstance(attnopt_cache_layer, MechanismLayer):
        out = attnopt_cache_layer.attend(mechanism, query, key, value, **options)
    else:
        out = mechanism(query, key, value, key_mask=real, **options)
    return out.transpose(1, 2), None


def _softmax(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    real: Tensor | None,
    dropout: float,
    scaling: float | None,
) -> tuple[Tensor, None]:
    """Plain causal softmax through transformers' own sdpa, for layers that stay as they were."""
    num_queries, num_keys = query.shape[2], key.shape[2]
    mask = None  # sdpa is causal by itself, and sees all from a single query
    if real is not None or num_queries not in (1, num_keys):
        position = torch.arange(num_keys, device=key.device)
        mask = position <= position[num_keys - num_queries :, None]  # [Nq, Nk]
        mask = mask if real is None else mask & real[:, None, None]  # [B, 1, Nq, Nk]
        mask = mask.expand(key.shape[0], 1, -1, -1)
    sdpa = AttentionInterface()["sdpa"]
    return sdpa(module, query, key, value, mask, dropout=dropout, scaling=scaling)


def key_mask(
    *, attention_mask: Tensor | None = None, mask_function: Any = causal_mask_function, **sizes: Any
) -> Tensor | None:
    """The 2-D mask of real tokens, which transformers has made bool; None where all are real.

    Args:
        attention_mask: bool `[B, all tokens so far]`.
        mask_function: who may see whom; must be causal.
        **sizes: lengths, offsets and device of the 4-D mask that is not needed here.

    Returns:
        `attention_mask` as it is.

    Raises:
        ValueError: any other pattern.
    """
    # While compiling, transformers always passes the function for packed sequences: it cannot know.
    if mask_function is not causal_mask_function and not torch.compiler.is_compiling():
        raise ValueError(
            f"converted attention is causal; got the mask pattern {mask_function.__qualname__}"
        )
    return attention_mask


def check_inputs(model: PreTrainedModel, args: tuple, kwargs: dict[str, Any]) -> None:
    """Before the backbone runs: refuse what the mechanisms would silently get wrong.

    Args:
        model: the backbone.
        args: its positional arguments.
        kwargs: its keyword arguments.

    Raises:
        ValueError: attention weights asked for, a 4-D mask, a mask of the wrong length, packed
            sequences, a cache with fixed or dropped keys, or the cache of a converted model while
            it runs dense.
    """
    cache = _find_cache(args, kwargs)
    if model.config._attn_implementation != NAME:
        if isinstance(cache, MechanismCache):
            raise ValueError(
                "the cache of a converted model does not serve dense attention; "
                "start anew with a transformers DynamicCache"
            )
        return
    if kwargs.get("output_attentions", model.config.output_attentions):
        raise ValueError(
            "output_attentions=True is not possible: converted attention never forms the weights; "
            "see mask_matrix of attnopt.mechanisms(model)[layer] for masks, or load the original "
            "model with attn_implementation='eager'"
        )
    if cache is not None and not isinstance(cache, MechanismCache):
        for layer in cache.layers:
            if not isinstance(layer, DynamicLayer) or layer.is_sliding:
                raise ValueError(
                    "past_key_values must be model.make_cache() or a transformers DynamicCache; "
                    f"got {type(cache).__name__} with {type(layer).__name__}"
                )
    tokens = kwargs.get("input_ids", args[0] if args else None)
    new = (kwargs["inputs_embeds"] if tokens is None else tokens).shape[1]
    past = 0 if cache is None else cache.get_seq_length()
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    if mask is not None:
        _check_mask(mask, past, new)
    elif positions is not None and not torch.compiler.is_compiling():
        if (positions.diff(dim=-1) != 1).any():
            raise ValueError(
                "position_ids must count up by 1: packed sequences are not supported (for padded "
                "ones give attention_mask too)"
            )


def _check_mask(mask: Tensor, past: int, new: int) -> None:
    if mask.ndim != 2:
        raise ValueError(
            "attention_mask must be [batch, tokens], 1 for real tokens and 0 for padding; got the "
            f"shape {tuple(mask.shape)}"
        )
    if mask.shape[1] != past + new:
        raise ValueError(
            f"attention_mask must cover all tokens so far, {past} in the cache and {new} new; "
            f"got the shape {tuple(mask.shape)}"
        )


def pass_context(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
    """Before a converted layer runs: hand its input and its cache layer to `attention`.

    Args:
        module: the attention module.
        args: its positional arguments.
        kwargs: its keyword arguments.

    Returns:
        The arguments with the additions, or None (no change) where the layer runs dense.
    """
    if module.config._attn_implementation != NAME:
        return None
    hidden_states = args[0] if args else kwargs["hidden_states"]
    context = {"attnopt_hidden_states": hidden_states}
    cache = _find_cache(args, kwargs)
    if isinstance(cache, MechanismCache):
        layer = cache.layers[getattr(module, NAME).layer_idx]
        context["attnopt_cache_layer"] = layer
        if isinstance(layer, MechanismLayer):
            layer.observe(kwargs.get("attention_mask"))
    return args, {**kwargs, **context}


def _find_cache(args: tuple, kwargs: dict[str, Any]) -> Cache | None:
    """The cache among the arguments: models give it different names."""
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, key_mask)
