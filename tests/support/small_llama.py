"""A small Llama with grouped heads for tests."""

import torch
from small_gpt2 import VOCABULARY
from transformers import LlamaConfig, LlamaForCausalLM


def tiny_llama(seed=0, heads=4, kv_heads=2, **options):
    torch.manual_seed(seed)
    settings = {
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 256,
        "hidden_size": 8 * heads,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "initializer_range": 0.3,
        "bos_token_id": 0,
        "eos_token_id": None,
        "pad_token_id": 0,
        **options,
    }
    return LlamaForCausalLM(LlamaConfig(**settings)).eval()
