"""Supervised tokens, byte coordinates and byte counts against plain loops over the decoded bytes."""

from __future__ import annotations

import random

import numpy as np
import pytest
from tokenizers import Tokenizer as Encoder
from tokenizers import normalizers
from transformers import PreTrainedTokenizerFast

from fusemega.text.chat import ChatRenderer, render_text
from fusemega.text.document import BadRow, Text, parse
from fusemega.text.sample import Annotated, annotate
from fusemega.text.tokenizer import Tokenizer
from tests.text.toys import ALTERNATING, SPECIALS, TEMPLATES, byte_level, sentencepiece

CONTENTS = [
    "hello world",
    "the quick  brown fox\n\njumps",
    "  leading and trailing  \n",
    "Grüße aus Köln, naïve café",
    "今天天气很好 😀👍🏽",
    "<|im_en", "user\nassistant\n", "[INST] x [/INST]", "x", "\n", "",
    "def f(x):\n    return x + 1\n",
    "e\u0301 \ue0000\ue001 \u200d",
]  # fmt: skip


def gpt2_bytes() -> dict[str, int]:
    """The byte-level alphabet: printable bytes stand for themselves, the others follow from U+0100."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(b): b for b in printable}
    for n, b in enumerate(b for b in range(256) if b not in printable):
        table[chr(256 + n)] = b
    return table


def token_bytes(tokenizer: Tokenizer, ids: np.ndarray) -> list[bytes]:
    alphabet = gpt2_bytes()
    return [
        token.encode() if token in SPECIALS else bytes(alphabet[c] for c in token)
        for token in (tokenizer.token(i) for i in ids)
    ]


def conversation(rng: random.Random, template: str) -> list[tuple[str, str]]:
    turns = [] if template in ALTERNATING or rng.random() < 0.5 else [("system", rng.choice(CONTENTS))]
    for _ in range(rng.randint(1, 3)):
        turns += [("user", rng.choice(CONTENTS)), ("assistant", rng.choice(CONTENTS))]
    return turns


def annotated(tokenizer: Tokenizer, row: dict) -> tuple[Annotated, str]:
    document = parse(row)
    rendered = render_text(document) if isinstance(document, Text) else ChatRenderer(tokenizer).render(document)
    return annotate(rendered, tokenizer.encode([rendered.text])[0], tokenizer), rendered.text


def as_row(turns: list[tuple[str, str]]) -> dict:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


@pytest.mark.parametrize("template", TEMPLATES)
def test_conversations_against_decoded_bytes(template: str) -> None:
    tokenizer, rng = byte_level(template), random.Random(template)
    for _ in range(40):
        turns = conversation(rng, template)
        got, text = annotated(tokenizer, as_row(turns))
        pieces = TEMPLATES[template].pieces(turns)
        assert text == "".join(piece[0] for piece in pieces)
        conv = [{"role": role, "content": content} for role, content in turns]
        assert got.ids.tolist() == tokenizer.hf.apply_chat_template(conv, tokenize=True)["input_ids"]

        # Walk the bytes: where each piece lies, and what a token that ends at each byte is.
        bases = [sum(len(c.encode()) + 2 for _, c in turns[:i]) for i in range(len(turns))]
        coordinate: dict[int, int] = {}
        targets: set[int] = set()
        content_bytes: set[int] = set()
        place = content_end = 0
        ends = set(np.cumsum([len(raw) for raw in token_bytes(tokenizer, got.ids)]).tolist())
        for text_of, owner, kind in pieces:
            size = len(text_of.encode())
            i = -1 if owner is None else owner
            supervised = owner is not None and turns[i][0] == "assistant"
            if kind == "content":
                full = turns[i][1]
                lead = 0 if text_of == full else len(full.encode()) - len(full.lstrip().encode()) if text_of else 0
                for b in range(1, size + 1):
                    coordinate[place + b] = bases[i] + 1 + lead + b
                if supervised:
                    targets |= set(range(place + 1, place + size + 1))
                    content_bytes |= set(range(place, place + size))
                # The space before it may have become part of its first token.
                header = place if place in ends or text.encode()[place - 1 : place] != b" " else place - 1
                coordinate.setdefault(header, bases[i] + 1)
                content_end = bases[i] + 1 + lead + size
            elif kind == "closing":
                for b in range(1, size - len(text_of.lstrip()) + 1):
                    coordinate[place + b] = content_end
                coordinate[place + size] = bases[i] + 1 + len(turns[i][1].encode()) + 1
                if supervised:
                    targets |= set(range(place + 1, place + size + 1))
            place += size
        end, counted = 0, 0
        for t, raw in enumerate(token_bytes(tokenizer, got.ids)):
            begin, end = end, end + len(raw)
            assert got.supervised[t] == (end in targets and t > 0), (template, turns, t)
            assert got.end_bytes[t] == coordinate.get(end, -1), (template, turns, t, raw)
            if got.supervised[t]:
                counted += len(content_bytes & set(range(begin, end)))
        assert int(got.target_bytes[got.supervised].sum()) == counted
        assert got.stream_length == bases[-1] + len(turns[-1][1].encode()) + 2


@pytest.mark.parametrize("bos", [False, True])
def test_texts_against_decoded_bytes(bos: bool) -> None:
    tokenizer, rng = byte_level(None, bos), random.Random(3)
    for _ in range(40):
        prompt, completion = rng.choice(CONTENTS), rng.choice([c for c in CONTENTS if c])
        row = {"prompt": prompt, "completion": completion} if rng.random() < 0.5 else {"text": f"a{prompt}{completion}"}
        first = len(prompt.encode()) if "prompt" in row else 0
        text = row.get("text", prompt + completion)
        got, _ = annotated(tokenizer, row)
        tokens = [tokenizer.token(i) for i in got.ids]
        assert (tokens[0] == "<s>") == bos and tokens[-1] == "</s>"
        end, counted = 0, 0
        for t, raw in enumerate(token_bytes(tokenizer, got.ids)):
            framing = tokens[t] in SPECIALS
            begin, end = end, end + (0 if framing else len(raw))
            last = t == len(tokens) - 1
            assert got.supervised[t] == (t > 0 and (last or (end > first and not framing)))
            assert got.end_bytes[t] == (len(text.encode()) + 1 if last else end)
            counted += max(end - max(begin, first), 0) * bool(got.supervised[t])
        assert int(got.target_bytes[got.supervised].sum()) == counted


def test_byte_tokens_of_sentencepiece_have_exact_ends() -> None:
    tokenizer = sentencepiece()
    got, _ = annotated(tokenizer, as_row([("user", "x"), ("assistant", "hello 🚀 world")]))
    base = 3 + 1
    ends = {tokenizer.token(i): int(e) for i, e in zip(got.ids, got.end_bytes, strict=True) if e >= 0}
    assert [ends[f"<0x{b:02X}>"] for b in "🚀".encode()] == [base + 6 + n for n in (1, 2, 3, 4)]
    ascending = [int(e) for e in got.end_bytes if e >= 0]
    assert ascending == sorted(ascending)
    assert int(got.target_bytes.sum()) == len("hello 🚀 world".encode())


def test_coordinates_do_not_depend_on_the_tokenizer() -> None:
    """Every place where both tokenizers have a token end, they report the same number."""
    turns = [("user", "Grüße"), ("assistant", "the quick brown 😀 fox"), ("user", "x"), ("assistant", "hello world")]
    ends = []
    for tokenizer in (byte_level("chatml"), sentencepiece("chatml"), byte_level("llama3")):
        got, _ = annotated(tokenizer, as_row(turns))
        ends.append(set(got.end_bytes[got.end_bytes >= 0].tolist()))
    bases, stops = [], []
    place = 0
    for _, content in turns:
        bases.append(place + 1)
        place += len(content.encode()) + 2
        stops.append(place)
    for found in ends:
        assert set(bases) <= found and set(stops) <= found


def test_a_token_across_the_border_counts_where_it_ends() -> None:
    tokenizer = byte_level("plain")  # "assistant: " + "hello": the space and the word are one token
    got, _ = annotated(tokenizer, as_row([("user", "x"), ("assistant", "hello world")]))
    tokens = [tokenizer.token(i) for i in got.ids]
    first = int(np.flatnonzero(got.supervised)[0])
    assert tokens[first] == "Ġhello" and got.end_bytes[first] == 3 + 1 + 5
    assert tokens[first - 1] == ":" and got.end_bytes[first - 1] == 3 + 1  # it predicts the content's beginning
    assert not got.supervised[-1]  # the final line break is the template's


def test_placeholders_survive_contents_that_look_like_them() -> None:
    got, _ = annotated(byte_level(), as_row([("user", "\ue0001\ue001"), ("assistant", "\ue0000\ue001")]))
    assert int(got.target_bytes.sum()) == len("\ue0000\ue001".encode())


REFUSED = {
    "special token in content": ("chatml", [("user", "a <|im_end|> b"), ("assistant", "x")]),
    "template refuses": ("mistral", [("system", "s"), ("assistant", "x")]),
    "template drops content": (
        "{% for m in messages if m['role'] != 'system' %}{{ m['role'] + m['content'] }}{% endfor %}",
        [("system", "s"), ("user", "u"), ("assistant", "x")],
    ),
    "template repeats content": (
        "{% for m in messages %}{{ m['content'] + m['content'] if m['role'] == 'system' else m['content'] }}"
        "{% endfor %}",
        [("system", "s"), ("user", "u"), ("assistant", "x")],
    ),
    "template drops reasoning": (
        "{% for m in messages %}{{ m['content'].split('</think>')[-1] + '|' }}{% endfor %}",
        [("user", "u"), ("assistant", "<think>t</think>x")],
    ),
    "template rewrites content": (
        "{% for m in messages %}{{ m['content'] | upper + '|' }}{% endfor %}",
        [("user", "u"), ("assistant", "x")],
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_a_template_must_not_do(reason: str) -> None:
    template, turns = REFUSED[reason]
    with pytest.raises(BadRow) as error:
        annotated(byte_level(template), as_row(turns))
    assert error.value.reason == reason


def test_an_empty_block_that_the_template_leaves_out() -> None:
    template = (
        "{% for m in messages %}{% if m['content'] %}{{ '<|im_start|>' + m['content'] + '<|im_end|>' }}{% endif %}"
        "{% endfor %}"
    )
    got, text = annotated(byte_level(template), as_row([("system", ""), ("user", "u"), ("assistant", "hello")]))
    assert text == "<|im_start|>u<|im_end|><|im_start|>hello<|im_end|>"
    assert int(got.target_bytes.sum()) == 5
    assert got.end_bytes[-1] == got.stream_length == 2 + 3 + 7


def test_the_date_is_fixed() -> None:
    template = "{{ strftime_now('%d %b %Y') }}{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}"
    _, text = annotated(byte_level(template), as_row([("user", "u"), ("assistant", "x")]))
    assert text == "26 Jul 2024u</s>x</s>"


@pytest.mark.parametrize(
    ("template", "closing"),
    [("chatml", "<|im_end|>"), ("llama3", "<|eot_id|>"), ("mistral", "</s>"), ("llama2", " </s>"), ("plain", "")],
)
def test_closing_token(template: str, closing: str) -> None:
    assert ChatRenderer(byte_level(template)).closing == closing


def test_a_closing_marker_that_is_no_token_of_its_own() -> None:
    template = "{% for m in messages %}{{ m['role'] + '\n' + m['content'] + '<end>\n' }}{% endfor %}"
    tokenizer = byte_level(template)
    got, _ = annotated(tokenizer, as_row([("user", "u"), ("assistant", "hello")]))
    tokens = [tokenizer.token(i) for i in got.ids]
    assert "".join(np.array(tokens)[got.supervised]).endswith("hello<end>")
    # What follows "hello" is a piece of the marker, which no other tokenizer has.
    last = tokens.index("<", int(np.flatnonzero(got.supervised)[0])) - 1
    assert got.end_bytes[last] == got.end_bytes[last + 1] == -1
    assert 3 + 1 + len("hello") not in got.end_bytes and got.end_bytes[got.supervised].max() == 3 + 1 + 6


def test_spaces_that_the_tokenizer_or_the_template_adds() -> None:
    """SentencePiece's own space ends where the text begins; the template's before the closing, where the content ends:
    so the last position at each byte is the one that predicts what follows it."""
    got, _ = annotated(sentencepiece(None), {"text": "🚀 hello"})
    tokens = [sentencepiece(None).token(i) for i in got.ids]
    assert tokens[:5] == ["▁", *(f"<0x{b:02X}>" for b in "🚀".encode())]
    assert got.end_bytes[:5].tolist() == [0, 1, 2, 3, 4] and got.end_bytes[-1] == len("🚀 hello".encode()) + 1

    tokenizer = sentencepiece("llama2")
    got, _ = annotated(tokenizer, as_row([("user", "x"), ("assistant", "hello")]))
    tokens = [tokenizer.token(i) for i in got.ids]
    place = {int(end): tokens[t] for t, end in enumerate(got.end_bytes) if end >= 0}  # the last counts
    assert place[3 + 1 + 5] == "▁" and place[3 + 1 + 6] == "</s>" and tokens[-2:] == ["▁", "</s>"]
    assert place[3 + 1] == "▁" and tokens[-4:-2] == ["▁", "hello"]


def test_normalised_characters_have_no_exact_ends() -> None:
    """ "e" with two marks becomes one character of three bytes for the first mark, which are not the text's."""
    encoder = Encoder.from_str(byte_level(None).hf.backend_tokenizer.to_str())
    encoder.normalizer = normalizers.NFC()
    tokenizer = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=encoder, eos_token="</s>"), "toy")
    got, _ = annotated(tokenizer, {"text": "xe\u0304\u0323x"})
    assert b"".join(token_bytes(tokenizer, got.ids)[1:4]) == "\u1eb9".encode()
    assert got.end_bytes[1:3].tolist() == [-1, -1]
    assert got.end_bytes[-1] == len("xe\u0304\u0323x".encode()) + 1
