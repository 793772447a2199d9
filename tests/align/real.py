"""Real tokenizers and texts, which several tests of this folder take."""

from __future__ import annotations

from functools import lru_cache

import pytest

from fusemega.align.vocabulary import Vocabulary
from fusemega.fixtures.packages import AssetMissing
from fusemega.fixtures.tokenizers import TOKENIZERS, tokenizer
from fusemega.text.chat import ChatRenderer, render_text
from fusemega.text.document import Text, parse
from fusemega.text.sample import Annotated, annotate
from fusemega.text.tokenizer import Tokenizer

CONTENTS = [
    "Hello, world!  Two  spaces,\n\n\tand a tab.",
    " leading and trailing ",
    "今天天气很好 😀👍🏽 🚀x",
    "naïve café, Grüße \u200d ﷽",
    "def f(x):\n        return x + 1  # 12345\n",
    "\n\nnew lines\r\n",
    "नमस्ते दुनिया ꙮ𓀀",
]


@lru_cache
def real_tokenizers(*names: str) -> dict[str, tuple[Tokenizer, Vocabulary]]:
    """By name, all of them by default; skips, naming the asset, where one cannot be had."""
    found = {}
    for name in names or TOKENIZERS:
        try:
            loaded = Tokenizer.load(tokenizer(name))
        except AssetMissing as error:
            pytest.skip(str(error))
        found[name] = loaded, Vocabulary.of(loaded)
    return found


def chat(*contents: str) -> dict:
    """Turns of user and assistant."""
    return {"messages": [{"role": ("user", "assistant")[n % 2], "content": c} for n, c in enumerate(contents)]}


def annotated(tokenizer: Tokenizer, row: dict) -> Annotated:
    document = parse(row)
    rendered = render_text(document) if isinstance(document, Text) else ChatRenderer(tokenizer).render(document)
    return annotate(rendered, tokenizer.encode([rendered.text])[0], tokenizer)
