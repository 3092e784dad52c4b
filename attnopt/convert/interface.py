"""What transformers calls during the forward pass of a converted model.

`attention` and `key_mask` are registered under one name, so that every layer reaches `attention`
with the whole 2-D mask of real tokens. `check_inputs` runs before the backbone and refuses what the
mechanisms cannot honor; `pass_context` runs before each converted layer and hands over what the
attention function would not see: the layer's input and its part of the cache.

Packed documents are rows without mask and cache whose `position_ids` restart with each document.
`check_inputs` finds where, once per forward pass, and hands that down as `cu_seq_lens_q` and
`max_length_q`, the keyword arguments that transformers has for it: so gradient checkpointing's
recomputation sees them, too.

Letters: B batch, H query heads, Hkv key/value heads, Nq queries, Nk keys, D head dimension,
S documents.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from attnopt.attention.base import AttentionMechanism
from attnopt.attention.cache import MechanismCache, MechanismLayer
from attnopt.convert.families import NAME, family_of

# What some models pass to their attention function and neither mechanisms nor `_softmax` have.
_FOREIGN = ("sliding_window", "softcap", "s_aux")


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
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend by the layer's mechanism, or by softmax in a layer that has none.

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
        cu_seq_lens_q: where documents begin among all B*Nq tokens, and B*Nq: `[S + 1]`.
        max_length_q: tokens of the longest document.
        **kwargs: what else the model passes on; it does not concern attention.

    Returns:
        `[B, Nq, H, D]` and None in place of the attention weights.

    Raises:
        ValueError: attention dropout on a layer with a mechanism, or a window, softcapping or sinks
            of the model's own.
    """
    for name in _FOREIGN:
        if (option := kwargs.get(name)) is not None:
            raise ValueError(f"converted models have no {name} of their own; got {option}")
    real = None if attention_mask is None else attention_mask[:, -key.shape[2] :]
    mechanism = getattr(module, NAME, None)
    if mechanism is None:
        documents = None if cu_seq_lens_q is None else _documents(query, cu_seq_lens_q)
        return _softmax(module, query, key, value, real, documents, dropout, scaling)
    if dropout:
        raise ValueError(
            f"layer {mechanism.layer_idx}: converted attention has no dropout on its weights; "
            f"leave it at 0 (convert sets that); got {dropout}"
        )
    options: dict[str, Any] = {"scale": scaling, "hidden_states": attnopt_hidden_states}
    if isinstance(attnopt_cache_layer, MechanismLayer):
        out = attnopt_cache_layer.attend(mechanism, query, key, value, **options)
    elif cu_seq_lens_q is not None:
        # rows as long as the longest would be mostly padding: only where lengths cannot be read
        longest = max_length_q if torch.compiler.is_compiling() else None
        options |= {"cu_seqlens": cu_seq_lens_q, "max_seqlen": longest}
        out = _attend_packed(mechanism, query, key, value, **options)
    else:
        out = mechanism(query, key, value, key_mask=real, **options)
    return out.transpose(1, 2), None


def _attend_packed(
    mechanism: AttentionMechanism,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    hidden_states: Tensor | None,
    **options: Any,
) -> Tensor:
    """Attend within the documents of all rows, which the mechanism takes as one long row."""
    batch = query.shape[0]
    query, key, value = (x.transpose(0, 1).flatten(1, 2)[None] for x in (query, key, value))
    if hidden_states is not None:
        hidden_states = hidden_states.flatten(0, 1)[None]
    out = mechanism(query, key, value, hidden_states=hidden_states, **options)
    return out[0].unflatten(1, (batch, -1)).transpose(0, 1)


def _documents(query: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The number of each token's document, `[B, Nq]`."""
    batch, _, tokens, _ = query.shape
    position = torch.arange(batch * tokens, device=query.device)
    return torch.bucketize(position, cu_seqlens[1:].long(), right=True).unflatten(0, (batch, -1))


def _softmax(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    real: Tensor | None,
    documents: Tensor | None,
    dropout: float,
    scaling: float | None,
) -> tuple[Tensor, None]:
    """Plain softmax through transformers' own sdpa, for layers that stay as they were."""
    num_queries, num_keys = query.shape[2], key.shape[2]
    mask = None  # sdpa is causal by itself where the module is, and sees all from a single query
    if getattr(module, "is_causal", True) and (
        real is not None or documents is not None or num_queries not in (1, num_keys)
    ):
        position = torch.arange(num_keys, device=key.device)
        mask = (position <= position[num_keys - num_queries :, None])[None, None]
    for seen in (
        None if real is None else real[:, None, None],
        None if documents is None else (documents[:, None] == documents[..., None])[:, None],
    ):
        if seen is not None:
            mask = seen if mask is None else mask & seen
    if mask is not None:
        mask = mask.expand(key.shape[0], 1, num_queries, num_keys)
    sdpa = AttentionInterface()["sdpa"]
    return sdpa(module, query, key, value, mask, dropout=dropout, scaling=scaling)


def key_mask(
    *,
    config: PreTrainedConfig,
    attention_mask: Tensor | None = None,
    mask_function: Any = causal_mask_function,
    **sizes: Any,
) -> Tensor | None:
    """The 2-D mask of real tokens, which transformers has made bool; None where all are real.

    Args:
        config: of the model.
        attention_mask: bool `[B, all tokens so far]`.
        mask_function: who may see whom; must be that of the model's family.
        **sizes: lengths, offsets and device of the 4-D mask that is not needed here.

    Returns:
        `attention_mask` as it is.

    Raises:
        ValueError: any other pattern.
    """
    causal = family_of(config).causal
    expected = causal_mask_function if causal else bidirectional_mask_function
    # Transformers passes another for packed documents, which check_inputs has found, and always
    # does while compiling, for then it cannot know.
    packed = torch.compiler.is_compiling() or (
        attention_mask is None and mask_function.__qualname__.startswith("and_masks.")
    )
    if mask_function is not expected and not packed:
        direction = "causal" if causal else "in both directions"
        raise ValueError(
            f"converted attention of this model is {direction}; got the mask pattern "
            f"{mask_function.__qualname__}"
        )
    return attention_mask


def check_inputs(
    model: PreTrainedModel, args: tuple, kwargs: dict[str, Any]
) -> tuple[tuple, dict[str, Any]] | None:
    """Before the backbone runs: refuse what it would silently get wrong, and find documents.

    Args:
        model: the backbone.
        args: its positional arguments.
        kwargs: its keyword arguments.

    Returns:
        Where documents are packed the arguments without use_cache, and with `cu_seq_lens_q` and
        `max_length_q`, which dense attention does not need; else None, for no change.

    Raises:
        ValueError: attention weights asked for, a 4-D mask, a mask of the wrong length, packed
            documents where they cannot be told apart, a cache with fixed or dropped keys, an input
            for cross-attention, or the cache of a converted model while it runs dense.
    """
    family = family_of(model.config)
    if len(args) > 1:
        names = inspect.signature(model.forward).parameters
        args, kwargs = (), {**dict(zip(names, args, strict=False)), **kwargs}
    cache = _find_cache(args, kwargs)
    tokens = kwargs.get("input_ids", args[0] if args else None)
    shape = (kwargs["inputs_embeds"] if tokens is None else tokens).shape[:2]
    mask = kwargs.get("attention_mask")
    if model.config._attn_implementation != NAME:
        if isinstance(cache, MechanismCache):
            raise ValueError(
                "the cache of a converted model does not serve dense attention; "
                "start anew with a transformers DynamicCache"
            )
        if torch.compiler.is_compiling() and family.dense_packs:
            return None
        if _find_documents(shape, mask, cache, kwargs) is None:
            return None
        if not family.dense_packs:
            raise ValueError(
                f"transformers' own attention of {family.model_type} does not keep packed "
                "documents apart, so the dense model cannot run on them; pad them instead"
            )
        return args, {**kwargs, "use_cache": False}  # with a new cache it would not, either
    if kwargs.get("output_attentions", model.config.output_attentions):
        raise ValueError(
            "output_attentions=True is not possible: converted attention never forms the weights; "
            "see mask_matrix of attnopt.mechanisms(model)[layer] for masks, or load the original "
            "model with attn_implementation='eager'"
        )
    if kwargs.get("encoder_hidden_states") is not None:
        raise ValueError("converted models have no cross-attention; got encoder_hidden_states")
    _check_cache(cache, causal=family.causal)
    if mask is not None:
        _check_mask(mask, 0 if cache is None else cache.get_seq_length(), shape[1])
    found = _find_documents(shape, mask, cache, kwargs)
    if found is None:
        return None
    if not family.packs:
        raise ValueError(
            f"packed documents are not possible with {family.model_type}: its layers do not pass "
            "on where they begin; pad them instead"
        )
    if family.causal:
        kwargs = {**kwargs, "use_cache": False}  # no text could go on from it
    return args, {**kwargs, "cu_seq_lens_q": found[0], "max_length_q": found[1]}


def _check_cache(cache: Cache | None, *, causal: bool) -> None:
    if cache is None or isinstance(cache, MechanismCache):
        return
    if not causal:
        raise ValueError("this model attends in both directions; it takes no past_key_values")
    for layer in cache.layers:
        if not isinstance(layer, DynamicLayer) or layer.is_sliding:
            raise ValueError(
                "past_key_values must be model.make_cache() or a transformers DynamicCache; "
                f"got {type(cache).__name__} with {type(layer).__name__}"
            )


def _find_documents(
    shape: torch.Size, mask: Tensor | None, cache: Cache | None, kwargs: dict[str, Any]
) -> tuple[Tensor, int] | None:
    """Where the documents of B rows of T tokens begin, `[S + 1]`, and how long the longest is.

    None where each row is one. Rows begin documents of their own.
    """
    positions, given = kwargs.get("position_ids"), kwargs.get("cu_seq_lens_q")
    longest = kwargs.get("max_length_q")
    if positions is None:
        if given is not None:
            raise ValueError(
                "packed documents need position_ids that restart with each; got cu_seq_lens_q alone"
            )
        return None
    if shape[1] == 1 and given is None:
        return None  # while decoding nothing is read from the device
    positions = positions.expand(shape[0], -1)
    restarts = positions.diff(dim=-1) != 1  # [B, T - 1]
    if mask is not None:  # positions may jump where there is padding
        real = mask[:, -shape[1] :].bool()
        restarts = restarts & real[:, 1:] & real[:, :-1]
    if torch.compiler.is_compiling():
        # Nothing can be read here: documents must be given, or there are none.
        if given is not None and longest is not None and mask is None and cache is None:
            return given, longest
        torch._assert_async(
            ~restarts.any(),
            "position_ids restart: compiled, packed documents need cu_seq_lens_q and max_length_q "
            "too, and neither attention_mask nor a cache",
        )
        return None
    if not restarts.any() and given is None:
        return None
    if mask is not None or cache is not None:
        raise ValueError(
            "position_ids must count up by 1 where there is an attention_mask or a cache: packed "
            "documents come without"
        )
    begins = F.pad(restarts, (1, 0), value=True).flatten().nonzero().flatten()
    ends = F.pad(begins[1:], (0, 1), value=shape.numel())
    found = F.pad(ends, (1, 0)).int()
    if given is not None and not torch.equal(given.to(found), found):
        raise ValueError(
            f"cu_seq_lens_q must be where position_ids restart, {found.tolist()}; got "
            f"{given.tolist()}"
        )
    return found, int((ends - begins).max())


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
