"""Malformed bytes by the million: each reader of fusemega/files (and of rows, maps, stores) says no in its own words.

    pip install atheris                                  # into a scratch environment; nothing here depends on it
    python benchmarks/fuzz.py [--seconds 60] [READER...]

One process a reader, coverage-guided (atheris, libFuzzer). An input is a fault when its reader raises anything else
than the error it documents, takes more than 10 s, or needs more than 3 GB. Prints one JSON object; status 1 after a
fault, whose input lies in the folder that is named then.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

Target = Callable[[bytes], object]


def _json(place: Path) -> tuple[Target, list[bytes]]:
    from fusemega.files.json_files import parse_json

    return parse_json, [b'{"a": [1, -2.5e3, "x", null, true], "b": {}}', b"\xef\xbb\xbf[1e400, NaN]", b"[" * 300]


def _lines(place: Path) -> tuple[Target, list[bytes]]:
    from fusemega.training.records import read_rows

    return _file(place / "metrics.jsonl", read_rows), [b'{"iteration": 1, "lm loss": 2.5}\n{"iteration": 2}\n{"it']


def _yaml(place: Path) -> tuple[Target, list[bytes]]:
    from fusemega.config import read_yaml

    seeds = [
        "a: &a [1, *a]\nb: {<<: {c: 1e-5}, d: ${b.c}}\n",
        "- 1\n",
        "x: !!int 5\n? [a]\n: 2020-01-01\n",
        "a: |\n  b\n",
    ]
    return _file(place / "run.yaml", read_yaml), [seed.encode() for seed in seeds]


def _rows(place: Path) -> tuple[Target, list[bytes]]:
    from fusemega.text.data import DataConfig, Source
    from fusemega.text.document import BadRow, parse

    def read(path: Path) -> None:
        for row in Source(DataConfig(path=str(path))).rows():
            with contextlib.suppress(BadRow):
                if not isinstance(row.value, BadRow):
                    parse(row.value)

    def choose(content: bytes) -> None:
        name = ("rows.jsonl", "rows.json", "rows.jsonl.gz")[content[0] % 3 if content else 0]
        _file(place / name, read)(content[1:])

    chat = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n{"text": "c"}\n\n'
    return choose, [b"\x00" + chat, b"\x01[" + chat.split(b"\n")[0] + b"]", b"\x02" + gzip.compress(chat)]


def _safetensors(place: Path) -> tuple[Target, list[bytes]]:
    from safetensors.numpy import save

    from fusemega.files.safetensors_header import read_header

    return _file(place / "model.safetensors", read_header), [save({"a": _array(4), "b": _array(2)}, {"format": "pt"})]


def _map(place: Path) -> tuple[Target, list[bytes]]:
    from fusemega.align.vocabulary_map import VocabularyMap

    table = _array(8)
    VocabularyMap("exact", "x", "y", table, table, table, len(table), 9, False, False).save(place / "seed.npz")
    return _file(place / "map.npz", VocabularyMap.load), [(place / "seed.npz").read_bytes()]


def _parquet(place: Path) -> tuple[Target, list[bytes]]:
    import pyarrow
    import pyarrow.parquet

    from fusemega.files.parquet_files import read_parquet

    for name, table in {"text": {"text": ["a", "b" * 99]}, "list": {"messages": [[{"role": "user", "n": 1}]]}}.items():
        pyarrow.parquet.write_table(pyarrow.table(table), place / name)
    read = _file(place / "rows.parquet", lambda path: list(read_parquet(path)))
    return read, [(place / name).read_bytes() for name in ("text", "list")]


def _index(place: Path) -> tuple[Target, list[bytes]]:
    from fusemega.checkpoint.index_file import read_index
    from fusemega.checkpoint.torch_dist_files import StoredChunk, write_metadata

    write_metadata(place, [StoredChunk("w", (0, 0), (2, 3), "float32", "__0_0.distcp", 0, 9)], {"w": (2, 3)})
    return _file(place / "index", read_index), [(place / ".metadata").read_bytes()]


def _config(place: Path) -> tuple[Target, list[bytes]]:
    from fusemega.files.json_files import read_json
    from fusemega.models.registry import architecture_of

    sizes = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "vocab_size": 9,
    }
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 1e4}
    seeds = [{"model_type": name, **sizes, "rope_scaling": rope} for name in ("llama", "qwen2", "qwen3", "mistral")]
    read = _file(place / "config.json", lambda path: architecture_of(read_json(path)))
    return read, [json.dumps(seed).encode() for seed in seeds]


def _store(place: Path) -> tuple[Target, list[bytes]]:
    """Bytes are a shard's index and rows; every checksum is made right."""
    import numpy as np

    from fusemega.store.coding import encode
    from fusemega.store.manifest import Manifest
    from fusemega.store.row import Row
    from fusemega.store.shard import _CHECKSUM, _HEADER, _MAGIC, INDEX, Shard, index_entry

    who: dict[str, Any] = {"weights": "w", "tokenizer": "t", "template": None, "mask_policy": "m", "truncation": 8}
    who |= {"temperature": 1.0, "vocab_size": 300}
    top_k, sampled = Manifest(**who, top_k=2), Manifest(**who, rows="sampled", num_samples=4, seed=0)

    def read(content: bytes) -> None:
        manifest, rows = (top_k, sampled)[content[0] & 1 if content else 0], 1 + (content[0] >> 1 & 1 if content else 0)
        index = np.frombuffer(content[1 : 1 + rows * INDEX.itemsize].ljust(rows * INDEX.itemsize, b"\0"), INDEX).copy()
        codes = content[1 + rows * INDEX.itemsize :]
        for r, end in enumerate([*index["begin"][1:].tolist(), len(codes)]):
            index["checksum"][r] = zlib.crc32(codes[max(0, int(index["begin"][r])) : max(0, end)])
        header = _HEADER.pack(_MAGIC, manifest.hash, rows, len(codes), zlib.crc32(index.tobytes()))
        path = place / "shard-00000-000000.bin"
        path.write_bytes(header + _CHECKSUM.pack(zlib.crc32(header)) + index.tobytes() + codes)
        shard = Shard(path, manifest)
        for r in range(rows):
            row = shard.row(r)
            assert 0 <= row.ids_PK.max() < 300 and row.end_bytes.min() >= -1 and not np.isnan(row.logp_PK).any()

    half = np.log(np.array([[0.5, 0.25]], dtype=np.float32))
    first = Row(bytes(8), _array(1), np.array([[7, 299]]), half, np.log(np.array([0.25])), -1.0, 3)
    draws = np.array([[-0.2877, -1.3863, -np.inf, -np.inf]], dtype=np.float32)
    second = Row(bytes(8), _array(1), np.array([[7, 9, -1, -1]]), draws, np.array([-np.inf]), -1.0, 3)
    seeds = []
    for kind, (row, manifest) in enumerate(((first, top_k), (second, sampled))):
        codes = encode(row, manifest)
        entry = index_entry(bytes(16), row, codes)
        twice = np.concatenate([entry, entry])
        twice["begin"][1] = len(codes)
        seeds += [bytes([kind]) + entry.tobytes() + codes, bytes([kind + 2]) + twice.tobytes() + codes + codes]
    return read, seeds


def _tokenizer(place: Path) -> tuple[Target, list[bytes]]:
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    from fusemega.text import tokenizer as ours

    ids = {"a": 0, "b": 1, "ab": 2, "\u2581": 3, "<unk>": 4}
    seeds = []
    for model in (models.BPE(ids, [("a", "b")]), models.Unigram([(t, -1.0) for t in ids], 4), models.WordPiece(ids)):
        core = Tokenizer(model)
        core.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(" ", "\u2581")])
        core.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split("b", "isolated"), pre_tokenizers.Metaspace(), pre_tokenizers.Digits()]
        )
        core.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
        core.add_special_tokens([AddedToken("<s>")])
        core.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 5)])
        core.enable_truncation(8)
        seeds.append(core.to_str().encode())
    (place / "config.json").write_text('{"model_type": "llama"}')
    (place / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')

    def read(content: bytes) -> None:
        (place / "tokenizer.json").write_bytes(content)
        ours.Tokenizer.load(place).encode(["ab a", "\u00e9 0b"])

    return read, seeds


READERS = (_config, _index, _json, _lines, _map, _parquet, _rows, _safetensors, _store, _tokenizer, _yaml)
NAMES = {reader.__name__.removeprefix("_"): reader for reader in READERS}
_ODD: list[Any] = [0, -1, 2**31, 2**63, 10**39, 0.0, -0.5, 1e308, True, None, "", "a", "\x1b[2J", "\0", "../x"]
_ODD += [[], {}, [[]]]


def _file(path: Path, read: Callable[[Path], object]) -> Target:
    def run(content: bytes) -> None:
        path.write_bytes(content)
        read(path)

    return run


def _array(length: int) -> Any:
    import numpy as np

    return np.arange(length, dtype=np.int32)


def _mutate(content: bytes, most: int, seed: int) -> bytes:
    """Every other time another value at a place of a JSON text (bytes hardly ever become another valid one)."""
    import atheris

    chance = random.Random(seed)
    try:
        whole: Any = json.loads(content)
        if chance.random() < 0.5 and isinstance(whole, dict | list):
            holders = [whole]
            for holder in holders:
                inner = holder.values() if isinstance(holder, dict) else holder
                holders += [value for value in inner if isinstance(value, dict | list)]
            place = chance.choice([holder for holder in holders if holder] or [{"": 0}])
            key = chance.choice(list(place) if isinstance(place, dict) else range(len(place)))
            place[key] = chance.choice([*_ODD, *holders[:8]])
            return json.dumps(whole).encode()[:most]
    except (ValueError, RecursionError):
        pass
    return atheris.Mutate(content, most)


def fuzz(name: str, place: Path, seconds: int) -> None:
    """One reader, in this process, which ends here."""
    import atheris

    with atheris.instrument_imports(include=["fusemega", "yaml", "zipfile", "gzip"]):
        target, seeds = NAMES[name](place)
    from fusemega.errors import UserError
    from fusemega.files.json_files import MalformedError

    def run(content: bytes) -> None:
        with contextlib.suppress(UserError, MalformedError):
            target(content)

    corpus = place / "corpus"
    corpus.mkdir()
    for i, seed in enumerate(seeds):
        run(seed)
        (corpus / str(i)).write_bytes(seed)
    limits = [f"-max_total_time={seconds}", "-timeout=10", "-rss_limit_mb=3072", "-max_len=8192"]
    arguments = [sys.argv[0], *limits, "-print_final_stats=1", f"-artifact_prefix={place}/fault-", str(corpus)]
    atheris.Setup(arguments, run, custom_mutator=_mutate)
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("readers", nargs="*", metavar="READER", help=f"of {', '.join(NAMES)}; by default all")
    parser.add_argument("--seconds", type=int, default=60, help="for each reader")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        return fuzz(options.readers[0], options.inside, options.seconds)
    counts, faults = {}, {}
    for name in options.readers or NAMES:
        place = Path(tempfile.mkdtemp(prefix=f"fuzz-{name}-"))
        command = [sys.executable, __file__, name, "--seconds", str(options.seconds), "--inside", str(place)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        count = re.search(r"number_of_executed_units: (\d+)", done.stderr)
        counts[name] = int(count[1]) if count else 0
        if done.returncode or not counts[name]:
            faults[name] = f"{place}: {done.stderr[-2000:]}"
        else:
            shutil.rmtree(place)
    print(json.dumps({"benchmark": "fuzz", "seconds": options.seconds, "inputs": counts, "faults": faults}, indent=1))
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
