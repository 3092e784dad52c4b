"""Padded prompts, and decoding by `generate` with the logits that chose each token."""

import torch
from small_gpt2 import VOCABULARY

PROMPT, NEW = 12, 16  # tokens of a prompt, and of what is generated
STARTS = [5, 0, 1, 10]  # first real token of each left-padded row


def prompts(starts=STARTS, length=PROMPT):
    """Random ids, one row per start, 0 where there is padding."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, VOCABULARY, (len(starts), length), generator=generator)
    mask = torch.arange(length) >= torch.tensor(starts)[:, None]
    return {"input_ids": ids * mask, "attention_mask": mask.long()}


def decode(model, inputs, **options):
    """New tokens [B, S] and the logits that chose them [B, S, V]."""
    settings = {"max_new_tokens": NEW, "do_sample": False, **options}
    out = model.generate(**inputs, return_dict_in_generate=True, output_logits=True, **settings)
    return out.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(out.logits, 1)


def assert_equal(ours, theirs, tolerance=1e-4):
    """Equal tokens, and logits that are equal within rounding."""
    torch.testing.assert_close(ours[1], theirs[1], atol=tolerance, rtol=tolerance)
    assert torch.equal(ours[0], theirs[0])
