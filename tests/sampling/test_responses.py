"""A responses file: what it says, what is healed, and what is refused; and how files become groups."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from fusemega.cli import main
from fusemega.config import validate
from fusemega.errors import UserError
from fusemega.files.lock import locked
from fusemega.sampling.collect import Collected, Rules, collect
from fusemega.sampling.engine import LENGTH, STOP, Response, SampleRequest, SamplingSettings
from fusemega.sampling.prompts import PromptsConfig
from fusemega.sampling.run_file import SampleRun
from fusemega.sampling.sample import Sampled, sample
from fusemega.text.document import parse_row
from fusemega.text.groups import Group
from tests.sampling.conftest import write_prompts

ROWS = ["one", {"prompt": "two", "domain": "maths", "answer": "2"}, "three"]


class Told:
    """An engine that says what it is told: (text of the prompt, sample) -> text and finish_reason."""

    def __init__(self, says: Mapping[tuple[str, int], tuple[str, str]], identity: Mapping[str, Any]) -> None:
        self.identity, self._says = identity, says
        self.asked: list[tuple[str, int]] = []

    def prepare(self) -> None:
        pass

    def generate(
        self,
        requests: Sequence[SampleRequest],
        settings: SamplingSettings,
        skip: Collection[tuple[str, int]] = frozenset(),
    ) -> Iterator[Response]:
        for request in requests:
            if (request.key, request.sample) not in skip:
                pair = (request.messages[0]["content"], request.sample)
                self.asked.append(pair)
                text, reason = self._says.get(pair, (f"{pair[0]} {pair[1]}", STOP))
                yield Response(request.key, request.sample, text, reason, 3, len(text))


def sampled(
    folder: Path, source: str = "told", n: int = 2, says: Any = None, identity: Any = None, **changes: Any
) -> tuple[Sampled, Told]:
    prompts = folder / "prompts.jsonl"
    if not prompts.exists():
        write_prompts(prompts, ROWS)
    section = {
        "source": source,
        "prompts": {"path": str(prompts)},
        "output": str(folder / f"{source}.jsonl"),
        "engine": {"name": "transformers", "load": "/not/used"},
        "sampling": {"n": n} | changes,
    }
    engine = Told(says or {}, identity or {"name": "told"})
    return sample(validate(SampleRun, section, "test"), engine), engine


def test_the_lines(tmp_path: Path) -> None:
    found, _ = sampled(tmp_path, says={("two", 1): ("cut of", LENGTH)})
    assert (found.responses, found.finish_reasons) == (6, {STOP: 5, LENGTH: 1})
    made = json.loads((tmp_path / "told.jsonl.settings.json").read_text())
    rows = [json.loads(line) for line in (tmp_path / "told.jsonl").read_text().splitlines()]
    assert {row["settings"] for row in rows} == {made["settings"]} and made["n"] == 2
    assert rows[3] | {"key": "", "settings": ""} == {
        "key": "",
        "prompt": [{"role": "user", "content": "two"}],
        "source": "told",
        "sample": 1,
        "text": "cut of",
        "finish_reason": LENGTH,
        "prompt_tokens": 3,
        "tokens": 6,
        "settings": "",
    }


def test_equal_responses_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    same = {(text, number): ("the same", STOP) for text in ("one", "two", "three") for number in (0, 1)}
    sampled(tmp_path, says=same)
    assert (
        "warning: told: the responses to each prompt are all equal, with temperature 1: does" in capsys.readouterr().err
    )
    sampled(tmp_path, "other", says=same | {("two", 1): ("another", STOP)})
    assert "warning" not in capsys.readouterr().err


def test_only_what_is_missing_is_sampled(tmp_path: Path) -> None:
    sampled(tmp_path, n=1)
    found, engine = sampled(tmp_path, n=3)  # another n
    assert found.new == 6 and {number for _, number in engine.asked} == {1, 2}
    write_prompts(tmp_path / "prompts.jsonl", ["three", "four", "four"])  # other prompts
    found, engine = sampled(tmp_path, n=3)
    assert engine.asked == [("four", 0), ("four", 1), ("four", 2)]
    assert (found.responses, found.duplicates, found.finish_reasons) == (6, 1, {STOP: 6})


@pytest.mark.parametrize("kept", [0, 1, 20, -1])
def test_half_a_line_is_sampled_again(tmp_path: Path, kept: int, capsys: pytest.CaptureFixture[str]) -> None:
    sampled(tmp_path)
    file = tmp_path / "told.jsonl"
    whole = file.read_bytes()
    last = whole.rstrip(b"\n").rfind(b"\n") + 1
    file.write_bytes(whole[: last + kept] if kept >= 0 else whole[:kept])
    found, engine = sampled(tmp_path)
    assert engine.asked == [("three", 1)] and file.read_bytes() == whole
    assert ("bytes of a response that was not written to its end are removed" in capsys.readouterr().err) == bool(kept)


def test_a_file_of_half_a_line(tmp_path: Path) -> None:
    sampled(tmp_path)
    file = tmp_path / "told.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole[:10])
    assert sampled(tmp_path)[0].new == 6 and file.read_bytes() == whole


def test_other_settings_are_refused_with_what_differs(tmp_path: Path) -> None:
    sampled(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(
        UserError, match=r"\(sampling\.temperature: 1\.0 there, 0\.5 now; sampling\.seed: 0 there, 4 now\)"
    ):
        sampled(tmp_path, temperature=0.5, seed=4)
    with pytest.raises(UserError, match=r"\(engine\.name: told there, other now; engine\.x: nothing there, 1 now\)"):
        sampled(tmp_path, identity={"name": "other", "x": 1})
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}


def test_files_that_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "told.jsonl"
    file.write_text("mine\n")
    with pytest.raises(UserError, match="exists and was not written by `fusemega sample`; nothing is overwritten"):
        sampled(tmp_path)
    file.unlink()
    sampled(tmp_path)
    lines = file.read_text().splitlines(keepends=True)
    for content, message in {
        lines[0] + lines[1] + lines[0]: r"told\.jsonl:3: the response 0 of line 1 again",
        lines[0] + "{}\n": r"told\.jsonl:2: not a response: key is missing or of another type",
        lines[0] + "{\n": r"told\.jsonl:2: malformed JSON",
        lines[0].replace('"settings": "', '"settings": "0'): r"told\.jsonl:1: a response made with other settings",
    }.items():
        file.write_text(content)
        with pytest.raises(UserError, match=message):
            sampled(tmp_path)
    side = tmp_path / "told.jsonl.settings.json"
    side.write_text(side.read_text().replace('"n": 2', '"n": "2"'))
    with pytest.raises(UserError, match=r"settings\.json: damaged"):
        sampled(tmp_path)


def _hold(path: Path, held: Any, end: Any) -> None:
    with locked(path):
        held.set()
        end.wait(60)


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    held, end = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(tmp_path / "told.jsonl", held, end))
    other.start()
    assert held.wait(60)
    with pytest.raises(UserError, match=rf"told\.jsonl: another process is writing it \(process {other.pid} "):
        sampled(tmp_path)
    end.set()
    other.join()
    assert sampled(tmp_path)[0].new == 6


def groups(folder: Path, *sources: str, **rules: Any) -> tuple[Collected, list[dict[str, Any]]]:
    out = folder / "groups.jsonl"
    out.unlink(missing_ok=True)
    files = [folder / f"{source}.jsonl" for source in sources]
    found = collect(PromptsConfig(path=str(folder / "prompts.jsonl")), out, files, Rules(**rules))
    return found, [json.loads(line) for line in out.read_text().splitlines()]


def test_groups(tmp_path: Path) -> None:
    sampled(tmp_path, "a", says={("two", 0): ("two 1", STOP), ("three", 0): (" ", STOP), ("three", 1): ("x", LENGTH)})
    sampled(tmp_path, "b", n=1, says={("one", 0): ("one 0", STOP)})
    found, rows = groups(tmp_path, "b", "a")
    assert rows[0]["responses"] == [
        {"text": "one 0", "source": "b", "sample": 0, "tokens": 5},
        {"text": "one 0", "source": "a", "sample": 0, "tokens": 5},  # another source may say the same
        {"text": "one 1", "source": "a", "sample": 1, "tokens": 5},
    ]
    assert rows[1] | {"responses": 0} == {
        "prompt": [{"role": "user", "content": "two"}],
        "responses": 0,
        "domain": "maths",
        "answer": "2",
    }
    assert [len(row["responses"]) for row in rows] == [3, 2]
    assert (found.rows, found.too_few, found.prompts) == (2, 1, 3)
    assert found.responses == {"a": 3, "b": 2} and found.merged == {"a": 1, "b": 0}
    assert found.dropped == {"a": {"empty": 1, LENGTH: 1}, "b": {}}
    assert all(isinstance(parse_row(row), Group) for row in rows), "training and `score` read them"
    _, kept = groups(tmp_path, "b", "a", keep_length=True)
    assert [len(row["responses"]) for row in kept] == [3, 2, 2]
    _, singles = groups(tmp_path, "a", "b", sources=("b",), min_responses=1)
    assert [len(row["responses"]) for row in singles] == [1, 1, 1]


def test_what_collect_refuses(tmp_path: Path) -> None:
    sampled(tmp_path, "a")
    with pytest.raises(UserError, match=r"--source: unknown name 'aa' \(did you mean 'a'\?\); allowed: a"):
        groups(tmp_path, "a", sources=("aa",))
    with pytest.raises(UserError, match=r"a\.jsonl: of the source 'a', as .*a\.jsonl is; a source has one file"):
        groups(tmp_path, "a", "a")
    with pytest.raises(
        UserError, match=r"not a responses file of `fusemega sample`: prompts\.jsonl\.settings\.json is not"
    ):
        groups(tmp_path, "prompts")
    with pytest.raises(UserError, match=r"no prompt has 3 responses; the most is 2 \(--min-responses\)"):
        groups(tmp_path, "a", min_responses=3)
    assert not (tmp_path / "groups.jsonl").exists()
    write_prompts(tmp_path / "prompts.jsonl", [*ROWS, "four"])
    with pytest.raises(
        UserError, match=r"a\.jsonl: lacks 2 of 8 responses to these prompts; run `fusemega sample` again"
    ):
        groups(tmp_path, "a")
    found, _ = groups(tmp_path, "a", incomplete=True)
    assert found.missing == {"a": 2} and found.too_few == 1


def test_the_commands(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    sampled(tmp_path, "a")
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["collect", *(str(tmp_path / name) for name in ("prompts.jsonl", "out.jsonl", "a.jsonl"))])
    assert not ended.value.code and json.loads(capfd.readouterr().out)["responses"] == {"a": 6}
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    run = tmp_path / "run.yaml"
    run.write_text(
        f"{{source: b, prompts: {{path: {tmp_path / 'prompts.jsonl'}}}, output: {tmp_path / 'b.jsonl'}, "
        "engine: {name: openai, base_url: 'http://127.0.0.1:1/v1', model: m, api_key_env: NO_SUCH_KEY}}"
    )
    with pytest.raises(SystemExit) as ended:
        main(["sample", str(run)])
    assert ended.value.code == 2
    assert "error: engine.api_key_env: the environment has no NO_SUCH_KEY" in capfd.readouterr().err
    assert not (tmp_path / "b.jsonl").exists()
