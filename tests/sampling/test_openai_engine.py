"""The engine `openai` against a real HTTP server that fails in every way a server can."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fusemega.config import validate
from fusemega.errors import UserError
from fusemega.sampling.engine import Missing, SampleRequest, SamplingSettings, request_seed
from fusemega.sampling.engines import OpenAISettings
from fusemega.sampling.openai_engine import OpenAIEngine
from fusemega.sampling.prompts import prompt_key
from fusemega.sampling.rendered import PromptIds
from fusemega.sampling.run_file import SampleRun
from fusemega.sampling.sample import sample
from tests.sampling.server import MODEL, Served, answer, serve

FAULTS = ("timeout", "429", "500", "reset", "cut", "chunk", "malformed", "html", "empty", "error")


@pytest.fixture
def server() -> Iterator[Served]:
    with serve() as served:
        yield served


def run_of(server: Served, folder: Path, texts: list[str], **changes: Any) -> SampleRun:
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts), encoding="utf-8")
    engine = {"name": "openai", "base_url": server.url, "model": MODEL, "timeout": 1, "max_retries": 2}
    engine |= changes.pop("engine", {})
    run = {"source": "teacher", "prompts": {"path": str(prompts)}, "output": str(folder / "teacher.jsonl")}
    return validate(SampleRun, run | {"engine": engine, "sampling": {"max_tokens": 50} | changes}, "test")


def rows_of(run: SampleRun) -> list[dict[str, Any]]:
    return sorted(map(json.loads, Path(run.output).read_text().splitlines()), key=lambda r: (r["key"], r["sample"]))


def seed_of(text: str, number: int = 0) -> int:
    return request_seed(0, prompt_key([{"role": "user", "content": text}]), number)


def test_every_fault_is_survived(server: Served, tmp_path: Path) -> None:
    texts = [f"prompt with {fault}" for fault in FAULTS]
    server.faults = {text: [fault] for text, fault in zip(texts, FAULTS, strict=True)}
    run = run_of(server, tmp_path, texts)
    found = sample(run)
    assert (found.new, found.responses, found.finish_reasons) == (10, 10, {"stop": 10})
    assert {row["text"] for row in rows_of(run)} == {answer(text, seed_of(text)) for text in texts}
    assert found.prompt_tokens == 30 and found.tokens == 40  # what the server counts: usage
    assert set(server.asked.values()) == {2}, "each of them was tried twice"
    first, second = server.times["prompt with 429"]
    assert second - first >= 0.7, "Retry-After is obeyed"
    assert sample(run).new == 0 and set(server.asked.values()) == {2}


def test_what_is_missing_is_said_and_made_up_later(server: Served, tmp_path: Path) -> None:
    run = run_of(server, tmp_path, ["one", "two", "three"], n=2)
    server.faults = {"two": ["malformed"] * 6}
    with pytest.raises(
        Missing, match=r"2 of 6 requests have no response.*2 further tries.*run the same command again"
    ) as error:
        sample(run)
    assert {request.key for request in error.value.requests} == {prompt_key([{"role": "user", "content": "two"}])}
    assert len(rows_of(run)) == 4
    before = dict(server.asked)
    assert sample(run).new == 2
    again = {pair: count - before[pair] for pair, count in server.asked.items()}
    assert again == {(text, seed_of(text, i)): int(text == "two") for text in ("one", "two", "three") for i in (0, 1)}


def test_a_dead_server_is_given_up_early(server: Served, tmp_path: Path) -> None:
    server.always = "malformed"
    texts = [f"prompt {number}" for number in range(30)]
    run = run_of(server, tmp_path, texts, engine={"concurrency": 2, "max_retries": 0})
    with pytest.raises(
        Missing, match=r"30 of 30 requests have no response, [12]\d of them not begun after \d+ failures"
    ):
        sample(run)
    assert sum(server.asked.values()) < 20


def test_killed_in_the_middle_nothing_is_asked_again(server: Served, tmp_path: Path) -> None:
    texts = [f"prompt number {number}" for number in range(12)]
    whole = tmp_path / "whole"
    whole.mkdir()
    sample(run_of(server, whole, texts, n=2))
    server.asked.clear()
    run = run_of(server, tmp_path, texts, n=2, engine={"concurrency": 1})
    server.faults = {"prompt number 7": ["timeout"]}  # it waits there until it is killed
    child = multiprocessing.get_context("spawn").Process(target=sample, args=(run,))
    child.start()
    output = Path(run.output)
    while "prompt number 7" not in server.times or not output.exists() or output.read_bytes().count(b"\n") < 14:
        time.sleep(0.02)
        assert child.is_alive()
    os.kill(child.pid or 0, signal.SIGKILL)
    child.join()
    recorded = {(row["prompt"][0]["content"], row["sample"]) for row in rows_of(run)}
    assert len(recorded) >= 14
    with output.open("ab") as file:
        file.write(b'{"key": "torn')
    asked = dict(server.asked)
    assert sample(run).new == 24 - len(recorded)
    for text, number in recorded:
        assert server.asked[text, seed_of(text, number)] == asked[text, seed_of(text, number)]
    assert rows_of(run) == rows_of(run_of(server, whole, texts, n=2))


def test_ctrl_c_leaves_what_is_there(server: Served, tmp_path: Path) -> None:
    run = run_of(server, tmp_path, ["one", "two"], engine={"timeout": 60})
    server.faults = {"two": ["hang"]}

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, interrupt)
    watch = threading.Thread(target=_signal_when, args=(lambda: "two" in server.times and len(rows_of(run)) == 1,))
    try:
        watch.start()
        with pytest.raises(KeyboardInterrupt):
            sample(run)
    finally:
        watch.join()
        signal.signal(signal.SIGUSR1, before)
        server.hang.set()
    assert len(rows_of(run)) == 1 and sample(run).new == 1


def _signal_when(ready: Callable[[], bool]) -> None:
    for _ in range(1000):
        time.sleep(0.02)
        with contextlib.suppress(FileNotFoundError):
            if ready():
                break
    os.kill(os.getpid(), signal.SIGUSR1)


def test_another_model_is_refused_with_the_nearest_name(server: Served, tmp_path: Path) -> None:
    run = run_of(server, tmp_path, ["a"], engine={"model": "org/teacher-7"})
    with pytest.raises(
        UserError, match=r"does not have 'org/teacher-7' \(did you mean 'org/teacher-7b'\?\); it lists: "
    ):
        sample(run)
    assert not Path(run.output).exists() and not list(tmp_path.glob("*settings*")), "nothing is written"


def test_a_model_that_is_served_but_not_listed(server: Served, tmp_path: Path) -> None:
    for number, models in enumerate(([], None)):
        server.models = models  # type: ignore[assignment]
        folder = tmp_path / str(number)
        folder.mkdir()
        assert sample(run_of(server, folder, ["a"])).new == 1


def test_no_server(tmp_path: Path) -> None:
    with serve() as served:
        pass
    with pytest.raises(UserError, match=r"engine\.base_url: http://127.* no server answers"):
        sample(run_of(served, tmp_path, ["a"]))


def test_the_key_is_sent_and_never_shown(
    server: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    server.key = "sk-right"
    run = run_of(server, tmp_path, ["a"], engine={"api_key_env": "TEACHER_KEY"})
    monkeypatch.delenv("TEACHER_KEY", raising=False)
    with pytest.raises(UserError, match="the environment has no TEACHER_KEY; set it to the server's key"):
        sample(run)
    monkeypatch.setenv("TEACHER_KEY", "sk-secret-that-is-wrong")
    with pytest.raises(
        UserError, match=r"HTTP 401: Incorrect API key provided: \[key\] \(the key is that of TEACHER_KEY\)"
    ):
        sample(run)
    monkeypatch.setenv("TEACHER_KEY", "sk-right")
    assert sample(run).new == 1
    shown = "".join(capfd.readouterr()) + "".join(path.read_text() for path in tmp_path.iterdir())
    assert "sk-" not in shown


def test_a_prompt_that_is_too_long_is_recorded_as_refused(server: Served, tmp_path: Path) -> None:
    run = run_of(server, tmp_path, ["short", "too long"])
    server.faults = {"too long": ["400"]}
    assert sample(run).finish_reasons == {"stop": 1, "refused": 1}
    refused = next(row for row in rows_of(run) if row["finish_reason"] == "refused")
    assert refused["text"] == "" and "maximum context length" in refused["reason"]
    assert sample(run).new == 0, "it is not asked again"


def test_a_server_that_refuses_everything_is_a_mistake(server: Served, tmp_path: Path) -> None:
    run = run_of(server, tmp_path, ["a", "b"])
    server.always = "400"
    with pytest.raises(UserError, match="refuses all of the first 2 requests: HTTP 400"):
        sample(run)
    assert not rows_of(run)


def test_what_is_sent(server: Served, tmp_path: Path) -> None:
    settings = {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.1, "seed": 3}
    run = run_of(server, tmp_path, ["Hello"], engine={"extra_body": {"min_p": 0.1}}, **settings)
    sample(run)
    (body,) = server.bodies
    key = prompt_key([{"role": "user", "content": "Hello"}])
    assert body == settings | {
        "model": MODEL,
        "messages": [{"role": "user", "content": "Hello"}],
        "max_tokens": 50,
        "min_p": 0.1,
        "seed": request_seed(3, key, 0),
    }
    made = json.loads(Path(f"{run.output}.settings.json").read_text())
    assert made["engine"] == {"name": "openai", "model": MODEL, "extra_body": {"min_p": 0.1}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "opnai"}, r"engine\.name: unknown name 'opnai' \(did you mean 'openai'\?\)"),
        ({"extra_body": {"seed": 1}}, r"engine\.extra_body: seed: give sampling\.seed instead"),
        ({"extra_body": {"stream": True}}, r"engine\.extra_body: stream: not possible here"),
        ({"base_url": "localhost:8000"}, r"engine\.base_url: expected an address that begins with http"),
        ({"concurency": 3}, r"engine\.concurency: unknown key \(did you mean 'concurrency'\?\)"),
    ],
)
def test_settings_that_are_refused(server: Served, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run_of(server, tmp_path, ["a"], engine=change)


def test_the_servers_prompt_is_compared_with_the_template(server: Served, smollm2_folder: Path) -> None:
    settings = {"name": "openai", "base_url": server.url, "model": MODEL, "tokenizer": str(smollm2_folder)}
    engine = OpenAIEngine(OpenAISettings.model_validate(settings))
    messages = ({"role": "user", "content": "Hello"},)
    prompts = PromptIds(smollm2_folder)
    own = prompts.ids(messages, "test")
    bos = prompts.tokenizer.hf.bos_token_id
    assert own[0] == bos != own[1]

    def sampled(**extra: Any) -> str:
        server.extra = extra
        (response,) = engine.generate([SampleRequest("k", messages)], SamplingSettings())
        return response.text

    assert sampled(prompt_token_ids=own) == answer("Hello", request_seed(0, "k", 0))
    with pytest.raises(UserError, match=r"reads the token '<\|im_start\|>' twice at the beginning of a prompt"):
        sampled(prompt_token_ids=[bos, *own])
    with pytest.raises(UserError, match=r"the token at 3 differs\): another chat template or tokenizer"):
        sampled(prompt_token_ids=[*own[:3], own[3] + 1, *own[4:]])
    with pytest.raises(UserError, match=rf"counts {len(own) + 1} tokens of a prompt that .* writes with {len(own)}"):
        sampled(usage={"prompt_tokens": len(own) + 1, "completion_tokens": 1})
    assert sampled(usage={"prompt_tokens": len(own), "completion_tokens": 1})
