"""Real text and GPT-2's tokenizer, where a machine has them: a folder beside the repository.

`ATTNOPT_TEST_DATA` names it, by default ../shared/data: `gpt2-tokenizer/` with vocab.json and
merges.txt, `wikitext-2/` with valid.txt and test.txt. They are not part of this project.
"""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("ATTNOPT_TEST_DATA", ROOT.parent / "shared" / "data"))
GPT2_TOKENIZER = DATA / "gpt2-tokenizer"
WIKITEXT_VALID = DATA / "wikitext-2" / "valid.txt"
WIKITEXT_TEST = DATA / "wikitext-2" / "test.txt"
needs_real_text = pytest.mark.skipif(
    not (GPT2_TOKENIZER.is_dir() and WIKITEXT_VALID.is_file()),
    reason=f"no real text in {DATA} (ATTNOPT_TEST_DATA)",
)
