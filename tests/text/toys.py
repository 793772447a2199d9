"""Small tokenizers trained on the spot, and chat templates, each with the same template written again in Python."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from tokenizers import Tokenizer as Encoder
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from fusemega.text.tokenizer import Tokenizer

CORPUS = [
    "the quick brown fox jumps over the lazy dog; the dog says hello world, hello friend.",
    "Les élèves étaient très fatigués. Ça va, naïve café? Grüße aus Köln.",
    "一二三四 今天天气很好 😀😀 👍🏽 emoji and    spaces\n\n\tand lines\nof text, user system assistant",
    "def f(x):\n    return x + 1\n",
] * 4
SPECIALS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]

# A piece of rendered text: (text, message index or None for template text, "content" | "closing" | "template")
Piece = tuple[str, int | None, str]


@dataclass(frozen=True)
class Template:
    jinja: str
    pieces: Callable[[list[tuple[str, str]]], list[Piece]]


def _chatml(turns: list[tuple[str, str]], default: str = "", bos: str = "") -> list[Piece]:
    pieces: list[Piece] = [(bos, None, "template")]
    if default and turns[0][0] != "system":
        pieces.append((f"<|im_start|>system\n{default}<|im_end|>\n", None, "template"))
    for i, (role, content) in enumerate(turns):
        pieces += [
            (f"<|im_start|>{role}\n", i, "template"),
            (content, i, "content"),
            ("<|im_end|>", i, "closing"),
            ("\n", None, "template"),
        ]
    return pieces


def _llama3(turns: list[tuple[str, str]]) -> list[Piece]:
    pieces: list[Piece] = [("<s>", None, "template")]
    for i, (role, content) in enumerate(turns):
        pieces += [
            (f"<|start_header_id|>{role}<|end_header_id|>\n\n", i, "template"),
            (content.strip(), i, "content"),
            ("<|eot_id|>", i, "closing"),
        ]
    return pieces


def _mistral(turns: list[tuple[str, str]]) -> list[Piece]:
    pieces: list[Piece] = [("<s>", None, "template")]
    for i, (role, content) in enumerate(turns):
        if role == "user":
            pieces += [("[INST] ", i, "template"), (content, i, "content"), (" [/INST]", None, "template")]
        else:
            pieces += [(content, i, "content"), ("</s>", i, "closing")]
    return pieces


def _llama2(turns: list[tuple[str, str]]) -> list[Piece]:
    pieces: list[Piece] = []
    for i, (role, content) in enumerate(turns):
        if role == "user":
            pieces += [("<s>[INST] ", i, "template"), (content.strip(), i, "content"), (" [/INST]", None, "template")]
        else:
            pieces += [(" ", i, "template"), (content.strip(), i, "content"), (" </s>", i, "closing")]
    return pieces


def _plain(turns: list[tuple[str, str]]) -> list[Piece]:
    pieces: list[Piece] = []
    for i, (role, content) in enumerate(turns):
        pieces += [(f"{role}: ", i, "template"), (content, i, "content"), ("\n", None, "template")]
    return pieces


_LOOP = "{% for m in messages %}"
_CHATML = "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
_DEFAULT = "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
TEMPLATES = {
    "chatml": Template(_LOOP + _CHATML, _chatml),
    "default_system": Template(_DEFAULT + _LOOP + _CHATML, lambda turns: _chatml(turns, default="Be kind.")),
    "adds_bos": Template("{{ bos_token }}" + _LOOP + _CHATML, lambda turns: _chatml(turns, bos="<s>")),
    "llama3": Template(
        "{{ bos_token }}"
        + _LOOP
        + "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}"
        + "{% endfor %}",
        _llama3,
    ),
    "mistral": Template(
        "{{ bos_token }}"
        + _LOOP
        + "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}"
        + "{% endif %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
        + "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}",
        _mistral,
    ),
    "llama2": Template(
        _LOOP
        + "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'].strip() + ' [/INST]' }}"
        + "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
        _llama2,
    ),
    "plain": Template(_LOOP + "{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}", _plain),
}
ALTERNATING = ("mistral", "llama2")


@lru_cache
def byte_level(template: str | None = "chatml", bos: bool = False) -> Tokenizer:
    """A byte-level BPE that hides spaces from its offsets, as GPT-2's does; `bos`: texts get <s> before them."""
    encoder = Encoder(models.BPE())
    encoder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True)
    encoder.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    encoder.train_from_iterator(
        CORPUS, BpeTrainer(vocab_size=500, initial_alphabet=alphabet, special_tokens=SPECIALS, show_progress=False)
    )
    trimmed = processors.ByteLevel(trim_offsets=True)
    framed = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)])
    encoder.post_processor = processors.Sequence([trimmed, framed]) if bos else trimmed
    return wrapped(encoder, template)


@lru_cache
def sentencepiece(template: str | None = "chatml") -> Tokenizer:
    """A Llama-2-like BPE: spaces as U+2581, one put before each text, unknown characters as byte tokens."""
    encoder = Encoder(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    encoder.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    encoder.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokens = ["<unk>", *SPECIALS, *(f"<0x{i:02X}>" for i in range(256))]
    trainer = BpeTrainer(vocab_size=480, special_tokens=tokens, show_progress=False, limit_alphabet=80)
    encoder.train_from_iterator(CORPUS, trainer)
    return wrapped(encoder, template)


def wrapped(encoder: Encoder, template: str | None) -> Tokenizer:
    """The tokenizer around an encoder that has `SPECIALS`; `template`: a name of `TEMPLATES`, or jinja."""
    hf = PreTrainedTokenizerFast(tokenizer_object=encoder, bos_token="<s>", eos_token="</s>")
    if template is not None:
        hf.chat_template = TEMPLATES[template].jinja if template in TEMPLATES else template
    return Tokenizer(hf, "toy")
