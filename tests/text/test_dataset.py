"""Where rows come from, the cache, windows and keys."""

from __future__ import annotations

import gzip
import json
import pickle
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from fusemega.errors import UserError
from fusemega.fixtures.data import ChatData
from fusemega.text.data import DataConfig, Source
from fusemega.text.dataset import TokenizedDataset, prepare
from fusemega.text.document import SCALARS
from fusemega.text.sample import Sample
from fusemega.text.tokenizer import Tokenizer
from tests.text.toys import byte_level, sentencepiece

ROWS = [
    {"messages": [{"role": "user", "content": f"question {n}"}, {"role": "assistant", "content": "hello " * (n + 1)}]}
    for n in range(20)
]


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def keys(dataset: TokenizedDataset) -> list[bytes]:
    return [sample.key for sample in dataset]


def test_every_kind_of_source_gives_the_same_samples(tmp_path: Path) -> None:
    import datasets
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    write(tmp_path / "rows.jsonl", ROWS)
    (tmp_path / "rows.json").write_text(json.dumps(ROWS, indent=1))
    (tmp_path / "zipped.jsonl.gz").write_bytes(gzip.compress((tmp_path / "rows.jsonl").read_bytes()))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "folder").mkdir()
    write(tmp_path / "folder" / "a.jsonl", ROWS[:7])
    write(tmp_path / "folder" / "b.jsonl", ROWS[7:])
    parts = [str(tmp_path / "folder" / name) for name in ("a.jsonl", "b.jsonl")]
    paths = [
        *(str(tmp_path / name) for name in ("rows.jsonl", "rows.json", "zipped.jsonl.gz", "rows.parquet", "saved")),
        str(tmp_path / "folder"),
        str(tmp_path / "folder" / "*.jsonl"),
        parts,
    ]
    expected: list[bytes] = []
    for path in paths:
        dataset = prepare(DataConfig(path=path), byte_level(), tmp_path / "cache")
        expected = expected or keys(dataset)
        assert keys(dataset) == expected and len(expected) == len(ROWS)
    assert dataset[7].source == f"{parts[1]}:1"
    limited = prepare(DataConfig(path=parts, limit=9), byte_level(), tmp_path / "cache")
    assert keys(limited) == expected[:9]


def test_text_files_and_csv(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello\nworld\n")
    (tmp_path / "a.csv").write_text("prompt,completion\nhello, world\n")
    for name, ids in (("a.txt", ["hello</s>", "world</s>"]), ("a.csv", ["helloĠworld</s>"])):
        tokenizer = byte_level(None)
        dataset = prepare(DataConfig(path=str(tmp_path / name)), tokenizer, tmp_path / "cache")
        assert ["".join(tokenizer.token(i) for i in sample.ids) for sample in dataset] == ids


def test_sources_that_are_not_there(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", ROWS[:1])
    (tmp_path / "empty").mkdir()
    (tmp_path / "weights.bin").touch()
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "cut.json").write_text("[{},")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b"{}\n" * 500)[:-9])
    for name, words in (
        ("tain.jsonl", "no such data file .did you mean 'train.jsonl'"),
        ("empty", "holds no data file"),
        ("weights.bin", "unknown kind of data file"),
        ("cut.parquet", "cut.parquet: not a whole parquet file"),
        ("cut.json", "cut.json:1: malformed JSON"),
        ("cut.jsonl.gz", "cut.jsonl.gz: cannot read"),
    ):
        with pytest.raises(UserError, match=words):
            list(Source(DataConfig(path=str(tmp_path / name))).rows())


def test_the_cache_is_used_and_rebuilt_when_anything_changes(tmp_path: Path) -> None:
    file, cache = write(tmp_path / "rows.jsonl", ROWS), tmp_path / "cache"
    config = DataConfig(path=str(file), seq_length=64)
    first = prepare(config, byte_level(), cache)
    stamp = (first.folder / "ids.bin").stat().st_mtime_ns
    again = prepare(config, byte_level(), cache)
    assert again.folder == first.folder and (again.folder / "ids.bin").stat().st_mtime_ns == stamp
    folders = {first.folder}
    for changed, tokenizer in (
        (config.model_copy(update={"seq_length": 32}), byte_level()),
        (config.model_copy(update={"limit": 3}), byte_level()),
        (config, byte_level("llama3")),
        (config, sentencepiece()),
    ):
        folders.add(prepare(changed, tokenizer, cache).folder)
    write(file, ROWS[:-1])
    folders.add(prepare(config, byte_level(), cache).folder)
    assert len(folders) == 6
    assert set(cache.iterdir()) == folders  # nothing partial is left


def test_the_cache_goes_by_contents_and_messages_by_the_names_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, cache = write(tmp_path / "rows.jsonl", ROWS), tmp_path / "cache"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "train-copy.jsonl").write_bytes(file.read_bytes())
    (tmp_path / "link.jsonl").symlink_to(file)
    spellings = [str(file), "rows.jsonl", "./elsewhere/../rows.jsonl", "link.jsonl", "elsewhere/train-copy.jsonl"]
    configs = [DataConfig(path=path) for path in spellings]
    configs += [DataConfig(path=spellings[-1], split="train"), DataConfig(path="elsewhere")]
    made = [prepare(config, byte_level(), cache) for config in configs]
    assert {dataset.folder for dataset in made} == set(cache.iterdir()) and len(set(cache.iterdir())) == 1
    named = [str(Path(path)) for path in spellings] + 2 * ["elsewhere/train-copy.jsonl"]
    assert [dataset[3].source for dataset in made] == [f"{name}:4" for name in named]
    assert pickle.loads(pickle.dumps(made[1]))[3].source == "rows.jsonl:4"
    # The same bytes are other rows as another kind of file, or as two files.
    Path("rows.txt").write_bytes(file.read_bytes())
    for path in ("rows.txt", [str(file), "link.jsonl"]):
        prepare(DataConfig(path=path), byte_level(None if path == "rows.txt" else "chatml"), cache)
    assert len(list(cache.iterdir())) == 3


def test_a_saved_data_set_goes_by_its_contents(tmp_path: Path) -> None:
    """Not by what it says of itself."""
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    datasets.Dataset.from_list(ROWS[:-1]).save_to_disk(str(tmp_path / "other"))
    first = prepare(DataConfig(path=str(tmp_path / "saved")), byte_level(), tmp_path / "cache")
    shutil.copytree(tmp_path / "saved", tmp_path / "copy")
    copied = prepare(DataConfig(path=str(tmp_path / "copy")), byte_level(), tmp_path / "cache")
    assert copied.folder == first.folder and copied[0].source == f"{tmp_path / 'copy'}:1"
    name = next((tmp_path / "copy").glob("*.arrow")).name
    shutil.copy(next((tmp_path / "other").glob("*.arrow")), tmp_path / "copy" / name)
    assert len(prepare(DataConfig(path=str(tmp_path / "copy")), byte_level(), tmp_path / "cache")) == len(ROWS) - 1


def test_a_damaged_cache_is_named(tmp_path: Path) -> None:
    config = DataConfig(path=str(write(tmp_path / "rows.jsonl", ROWS)))
    folder = prepare(config, byte_level(), tmp_path / "cache").folder
    with (folder / "ids.bin").open("r+b") as file:
        file.truncate(8)
    with pytest.raises(UserError, match=r"ids.bin: damaged data cache \(\d+ bytes expected\)"):
        prepare(config, byte_level(), tmp_path / "cache")


def test_totals_and_types(tmp_path: Path) -> None:
    dataset = prepare(DataConfig(path=str(write(tmp_path / "r.jsonl", ROWS))), byte_level(), tmp_path / "c")
    assert dataset.lengths.tolist() == [len(sample.ids) for sample in dataset]
    assert dataset.num_supervised == sum(len(sample.positions) for sample in dataset)
    sample = dataset[3]
    assert (sample.ids.dtype, sample.end_bytes.dtype, sample.supervised.dtype) == (np.int32, np.int32, np.bool_)
    assert sample.num_bytes == len("hello " * 4)
    assert len(sample.key) == 16 and len(sample.ids_hash) == 8
    with pytest.raises(IndexError):
        dataset[len(dataset)]


def targets(samples: list[Sample]) -> list[int]:
    return [int(i) for sample in samples for i in sample.ids[1:][sample.supervised[1:]]]


@pytest.mark.parametrize("seq_length", [2, 3, 7, 16, 33])
def test_windows_hold_every_target_once(seq_length: int, tmp_path: Path) -> None:
    rows: list[dict] = [{"text": "the quick brown 😀 fox " * 6}, *ROWS[10:12]]
    file = write(tmp_path / "rows.jsonl", rows)
    whole = list(prepare(DataConfig(path=str(file)), byte_level(bos=True), tmp_path / "cache"))
    cut = prepare(DataConfig(path=str(file), seq_length=seq_length), byte_level(bos=True), tmp_path / "cache")
    assert int(cut.lengths.max()) <= seq_length
    assert targets(list(cut)) == targets(whole)
    assert sum(sample.num_bytes for sample in cut) == sum(sample.num_bytes for sample in whole)
    assert not any(sample.supervised[0] for sample in cut)
    assert all(sample.supervised.any() for sample in cut)
    assert cut.skipped.get("window without supervised tokens", 0) > 0  # the user's turn fills some
    ends = [int(e) for s in cut if s.source.endswith(":1") for e in s.end_bytes[s.positions + 1] if e >= 0]
    assert ends == sorted(ends)
    if seq_length > 4:  # shorter windows can lie inside one character, and so cover the same bytes as the next
        assert len(set(keys(cut))) == len(cut)


def test_keys_know_the_text_and_the_turns_but_no_tokenizer_or_template(tmp_path: Path) -> None:
    messages = ROWS[2]["messages"]
    as_prompt: dict = {"prompt": messages[:1], "completion": messages[1:]}
    context = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    several: dict = {"messages": context + messages}
    last_only = {"prompt": context + messages[:1], "completion": messages[1:]}
    strings: list[dict] = [{"prompt": "a", "completion": "bc"}, {"prompt": "ab", "completion": "c"}, {"text": "abc"}]
    file = write(tmp_path / "r.jsonl", [ROWS[2], as_prompt, several, last_only, *strings])
    found = [
        keys(prepare(DataConfig(path=str(file)), tokenizer, tmp_path / "cache"))
        for tokenizer in (byte_level("chatml", bos=True), byte_level("llama3"), sentencepiece("llama3"))
    ]
    assert found[0] == found[1] == found[2]
    assert found[0][0] == found[0][1]
    assert len(set(found[0])) == len(found[0]) - 1


def test_a_real_tokenizer_and_chat_text(smollm2_folder: Path, chat_files: ChatData, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(smollm2_folder)
    config = DataConfig(path=str(chat_files.held_out), seq_length=512, limit=50)
    dataset = prepare(config, tokenizer, tmp_path, vocab_size=49152)
    assert dataset.skipped.keys() <= {"window without supervised tokens"}
    rows = [json.loads(line) for line in Path(chat_files.held_out).read_text(encoding="utf-8").splitlines()[:50]]
    windows = Counter(sample.source for sample in dataset)
    for sample in dataset:
        row = rows[int(sample.source.rsplit(":", 1)[1]) - 1]
        if windows[sample.source] > 1:
            continue
        answers = "".join(m["content"] + "<|im_end|>" for m in row["messages"] if m["role"] == "assistant")
        assert tokenizer.hf.decode(sample.ids[sample.supervised], clean_up_tokenization_spaces=False) == answers
        assert sample.num_bytes == len(answers.replace("<|im_end|>", "").encode())
        assert sample.ids.tolist() == tokenizer.hf.apply_chat_template(row["messages"])["input_ids"]


def test_a_folder_of_splits(tmp_path: Path) -> None:
    for name in ("train-00000-of-00001.jsonl", "test.jsonl", "dev/a.jsonl", ".ipynb_checkpoints/train.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"text": "a"}')

    def names(split: str) -> list[str]:
        return [
            str(Path(name).relative_to(tmp_path)) for name in Source(DataConfig(path=str(tmp_path), split=split)).names
        ]

    assert names("train") == ["train-00000-of-00001.jsonl"] and names("test") == ["test.jsonl"]
    assert names("validation") == ["dev/a.jsonl"]
    (tmp_path / "dataset_info.json").write_text("{}")
    assert names("test") == ["test.jsonl"], "what is about the rows is none of them"
    for name in ("train_sft", "train_gen"):
        (tmp_path / f"{name}-00000-of-00001.jsonl").write_text('{"text": "a"}')
    assert names("train") == ["train-00000-of-00001.jsonl"], "a split of another name is another split"
    assert names("train_gen") == ["train_gen-00000-of-00001.jsonl"]
    with pytest.raises(UserError, match="data.split"):
        names("extra")
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}')
    others = "test, train, train_gen, train_sft, validation"
    with pytest.raises(UserError, match=f"rows.jsonl: its name says no split, others in .* do .{others}"):
        names("train")


def test_files_that_are_named_are_of_no_other_split(tmp_path: Path) -> None:
    tmp_path = tmp_path / "data"
    tmp_path.mkdir()
    for name in ("rows.jsonl", "test.jsonl", "train.jsonl", "train_sft-00000-of-00001.jsonl"):
        write(tmp_path / name, ROWS)

    def names(path: str | list[str], split: str | None = None) -> list[str]:
        paths = [str(tmp_path / part) for part in ([path] if isinstance(path, str) else path)]
        return [Path(name).name for name in Source(DataConfig(path=paths, split=split)).names]

    # Read whole, whatever their names say: they have been named.
    assert names("test.jsonl") == ["test.jsonl"]
    assert names(["test.jsonl", "train.jsonl"]) == ["test.jsonl", "train.jsonl"]
    # A split beside them is what their names say, or the one that a file without splits has.
    assert names("test.jsonl", "test") == names("test.jsonl", "eval") == ["test.jsonl"]
    assert names("rows.jsonl", "train") == ["rows.jsonl"]
    assert names("train_sft-00000-of-00001.jsonl", "train_sft") == ["train_sft-00000-of-00001.jsonl"]
    for file, split in (
        ("test.jsonl", "train"),
        ("rows.jsonl", "test"),
        ("rows.jsonl", "typo"),
        ("train_sft-00000-of-00001.jsonl", "train"),
    ):
        with pytest.raises(UserError, match=f"{file}: a file that is named in data.path is read whole.* {split};"):
            names(file, split)
    with pytest.raises(UserError, match=r"test.jsonl: a file that is named"):
        names(["train.jsonl", "test.jsonl"], "train")
    # A glob names no file: of those of several splits it has to be said which are meant.
    assert names("te*.jsonl") == ["test.jsonl"] and names("r*.jsonl") == ["rows.jsonl"]
    assert names("t*t*.jsonl", "test") == ["test.jsonl"]
    with pytest.raises(UserError, match=r"t\*.jsonl: matches files of several splits \(test, train, train_sft\)"):
        names("t*.jsonl")
    assert names("t*.jsonl", "train_sft") == ["train_sft-00000-of-00001.jsonl"]
    with pytest.raises(UserError, match="its name says no split"):
        names("*.jsonl", "train")
    with pytest.raises(UserError, match="data.split: unknown name 'validation'; allowed: test"):
        names("te*.jsonl", "validation")
    (tmp_path / "test").mkdir()
    write(tmp_path / "test" / "rows.jsonl", ROWS)
    assert names("test/rows.jsonl", "test") == ["rows.jsonl"], "its folder's name says it"


def test_groups_are_the_samples_of_one_row(tmp_path: Path) -> None:
    question, answers = {"role": "user", "content": "hi"}, [{"role": "assistant", "content": c} for c in "xyz"]
    rows = [
        {"prompt": [question], "chosen": answers[:1], "rejected": answers[1:2]},
        {"prompt": "one ", "responses": ["two", "three", "four"], "rewards": [0.5, -1, 2]},
        {"prompt": "one ", "responses": ["two", "five"]},
    ]
    plain = [
        *({"prompt": [question], "completion": [answer]} for answer in answers[:2]),
        *({"prompt": "one ", "completion": word} for word in ("two", "three", "four", "two", "five")),
    ]
    path = write(tmp_path / "groups.jsonl", rows)
    dataset = prepare(DataConfig(path=str(path)), byte_level(), tmp_path / "cache")
    single = prepare(DataConfig(path=str(write(tmp_path / "p.jsonl", plain))), byte_level(), tmp_path / "cache")
    # A store that was taught the responses one by one finds those of groups.
    assert keys(dataset) == keys(single) and not single.is_grouped and single.num_units == len(plain)
    for sample, wanted in zip(dataset, single, strict=True):
        assert sample.ids.tolist() == wanted.ids.tolist() and sample.supervised.tolist() == wanted.supervised.tolist()
    assert dataset.in_group.all() and [list(dataset.unit(i)) for i in range(dataset.num_units)] == [
        [0, 1],
        [2, 3, 4],
        [5, 6],
    ]
    assert [sample.group for sample in dataset] == [0, 0, 1, 1, 1, 2, 2]
    chosen, rewards = {"chosen": 1.0}, [{"reward": value} for value in (0.5, -1.0, 2.0)]
    assert [sample.scalars for sample in dataset] == [chosen, {"chosen": 0.0}, *rewards, {}, {}]
    assert dataset.in_words().startswith("3 groups, 7 samples, ")
    # Other rewards are other data.
    assert len(dataset.contents()) == len(single.contents()) + 1 + len(SCALARS)
