"""The engine `transformers`: what is drawn, what it depends on, where it ends, memory, and a killed run."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LogitsProcessorList, TopKLogitsWarper, TopPLogitsWarper

from fusemega.config import validate
from fusemega.errors import UserError
from fusemega.sampling.draw import Draw
from fusemega.sampling.engine import Response, SampleRequest, SamplingSettings, request_seed
from fusemega.sampling.engines import TransformersSettings
from fusemega.sampling.prompts import prompt_key
from fusemega.sampling.run_file import SampleRun
from fusemega.sampling.sample import sample
from fusemega.sampling.transformers_engine import TransformersEngine
from tests.sampling.conftest import write_prompts

SETTINGS = SamplingSettings(temperature=0.9, top_p=0.95, repetition_penalty=1.05, max_tokens=5, seed=5)
QUESTIONS = [f"Tell me of {number}{' please' * (number % 4)}" for number in range(4)]


def requests(n: int = 2) -> list[SampleRequest]:
    made = []
    for question in QUESTIONS:
        messages = ({"role": "user", "content": question},)
        made += [SampleRequest(prompt_key(messages), messages, number) for number in range(n)]
    return made


def engine_of(folder: Path, batch_size: int = 4) -> TransformersEngine:
    return TransformersEngine(TransformersSettings(load=str(folder), dtype="fp32", batch_size=batch_size))


@pytest.fixture(scope="module")
def engine(small_model: Path) -> TransformersEngine:
    return engine_of(small_model)


def by_pair(responses: Sequence[Response]) -> dict[tuple[str, int], Response]:
    return {(response.key, response.sample): response for response in responses}


def drawn(settings: SamplingSettings, scores: torch.Tensor, seeds: Sequence[int], steps: int = 1) -> torch.Tensor:
    """The tokens that `Draw` leaves possible after a prompt of two tokens; the last of `steps` steps."""
    prompt = torch.tensor([[0, 7]]).expand(len(seeds), 2)
    draw = Draw(settings, seeds, prompt, torch.ones_like(prompt))
    left = draw(torch.cat([prompt, torch.zeros(len(seeds), steps - 1, dtype=torch.int64)], 1), scores)
    assert bool(((left == 0).sum(1) == 1).all()) and bool(((left == 0) | (left == -torch.inf)).all())
    return left.argmax(1)


@pytest.mark.parametrize(("top_p", "top_k"), [(1.0, None), (0.8, None), (1.0, 5)])
def test_tokens_are_drawn_from_the_distribution_of_transformers(top_p: float, top_k: int | None) -> None:
    count = 20_000
    scores = 2 * torch.randn(1, 30, generator=torch.Generator().manual_seed(1))
    warpers = LogitsProcessorList([*([TopKLogitsWarper(top_k)] if top_k else []), TopPLogitsWarper(top_p)])
    expected = warpers(torch.zeros(1, 1), scores / 0.7).softmax(-1)[0]
    settings = SamplingSettings(temperature=0.7, top_p=top_p, top_k=top_k, max_tokens=3)
    found = drawn(settings, scores.expand(count, 30), range(count), steps=2)
    shares = torch.bincount(found, minlength=30) / count
    assert bool((shares[expected == 0] == 0).all())
    assert bool(((shares - expected).abs() <= 4.5 * (expected * (1 - expected) / count).sqrt() + 1e-9).all())


def test_the_steps_of_a_response_are_independent() -> None:
    scores = torch.zeros(4000, 10)
    first, second = (drawn(SamplingSettings(max_tokens=4), scores, range(4000), steps) for steps in (1, 2))
    assert bool((torch.bincount(10 * first + second, minlength=100) > 10).all())


def test_padding_is_no_repeated_token() -> None:
    settings = SamplingSettings(temperature=0, repetition_penalty=2.0, max_tokens=1)
    ids, mask = torch.tensor([[9, 9, 3], [4, 5, 3]]), torch.tensor([[0, 0, 1], [1, 1, 1]])
    found = Draw(settings, [0, 0], ids, mask)(ids, torch.ones(2, 10))
    assert [row.nonzero().flatten().tolist() for row in found != 1] == [[3], [3, 4, 5]]


def test_a_response_depends_on_its_seed_and_not_on_its_neighbours(
    engine: TransformersEngine, small_model: Path
) -> None:
    together = by_pair(list(engine.generate(requests(), SETTINGS)))
    alone = by_pair(list(engine_of(small_model, batch_size=1).generate(requests()[::-1], SETTINGS)))
    assert together == alone and len(together) == 8
    assert len({response.text for response in together.values()}) > 4
    assert {response.finish_reason for response in together.values()} == {"stop", "length"}
    other_seed = by_pair(list(engine.generate(requests(), SETTINGS.model_copy(update={"seed": 6}))))
    assert sum(other_seed[pair].text != together[pair].text for pair in together) > 4


def test_the_responses_that_are_there_do_not_change_the_others(engine: TransformersEngine) -> None:
    whole = by_pair(list(engine.generate(requests(), SETTINGS)))
    known = set(list(whole)[::3])
    rest = by_pair(list(engine.generate(requests(), SETTINGS, known)))
    assert rest == {pair: response for pair, response in whole.items() if pair not in known}


def test_without_temperature_it_is_transformers_greedy_search(engine: TransformersEngine, small_model: Path) -> None:
    settings = SamplingSettings(temperature=0, max_tokens=8)
    model = AutoModelForCausalLM.from_pretrained(small_model, dtype=torch.float32)
    tokenizer = engine._prompts.tokenizer.hf
    for response in engine.generate(requests(1), settings):
        request = next(r for r in requests(1) if r.key == response.key)
        text = tokenizer.apply_chat_template(list(request.messages), tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        found = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, repetition_penalty=1.0, top_k=0
        )[0, ids.shape[1] :].tolist()
        assert response.prompt_tokens == ids.shape[1] and response.tokens == len(found)
        ended = found[-1] in (2, 284)
        assert response.finish_reason == ("stop" if ended else "length")
        assert response.text == tokenizer.decode(found[:-1] if ended else found, skip_special_tokens=True)


def test_too_little_memory_halves_the_batch(
    small_model: Path, engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = by_pair(list(engine.generate(requests(), SETTINGS)))
    small = engine_of(small_model)
    generate, sizes, most = small._model.generate, [], 2

    def limited(**given: Any) -> Any:
        sizes.append(len(given["input_ids"]))
        if sizes[-1] > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generate(**given)

    monkeypatch.setattr(small._model, "generate", limited)
    assert by_pair(list(small.generate(requests(), SETTINGS))) == expected
    assert sizes == [4, 2, 2, 2, 2]
    assert "out of memory with 4 responses at once; going on with 2" in capsys.readouterr().err
    most = 0
    with pytest.raises(UserError, match="memory of cpu does not suffice for one prompt of .*a response of 5"):
        list(small.generate(requests(), SETTINGS))


def test_prompts_that_are_too_long(engine: TransformersEngine) -> None:
    messages = ({"role": "user", "content": "word " * 300},)
    long = SampleRequest("long", messages)
    found = by_pair(list(engine.generate([*requests(1), long], SETTINGS)))
    assert len(found) == 5
    refused = found["long", 0]
    assert (refused.finish_reason, refused.text, refused.tokens) == ("refused", "", 0)
    assert "max_tokens 5 are more than the 256 positions of the model" in refused.reason
    with pytest.raises(UserError, match="no prompt can be answered: a prompt of .* tokens"):
        list(engine.generate([long], SETTINGS))


def test_a_folder_without_chat_template(small_model: Path, tmp_path: Path) -> None:
    for file in small_model.iterdir():
        if file.suffix != ".jinja":
            (tmp_path / file.name).symlink_to(file)
    with pytest.raises(UserError, match=r"the tokenizer has no chat template.*engine\.chat_template: FILE"):
        engine_of(tmp_path)


def test_an_unknown_folder() -> None:
    with pytest.raises(UserError, match="/no/such: no such model folder"):
        TransformersEngine(TransformersSettings(load="/no/such"))


def test_seeds_differ() -> None:
    seeds = {request_seed(seed, key, number) for seed in range(10) for key in "abcdefghij" for number in range(10)}
    assert len(seeds) == 1000 and all(0 <= seed < 1 << 31 for seed in seeds)


def test_killed_in_the_middle_the_file_becomes_the_same(small_model: Path, tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "prompts.jsonl", QUESTIONS)
    engine = {"name": "transformers", "load": str(small_model), "dtype": "fp32", "batch_size": 3}
    sampling = SETTINGS.model_dump() | {"n": 2}

    def run(name: str) -> SampleRun:
        section = {"source": "small", "prompts": {"path": str(prompts)}, "output": str(tmp_path / name)}
        return validate(SampleRun, section | {"engine": engine, "sampling": sampling}, "test")

    def rows(name: str) -> list[str]:
        return sorted((tmp_path / name).read_text().splitlines())

    assert sample(run("whole.jsonl")).new == 8
    child = multiprocessing.get_context("spawn").Process(target=sample, args=(run("killed.jsonl"),))
    child.start()
    killed = tmp_path / "killed.jsonl"
    while not killed.exists() or killed.read_bytes().count(b"\n") < 4:
        time.sleep(0.005)
        assert child.is_alive()
    os.kill(child.pid or 0, signal.SIGKILL)
    child.join()
    # As if the kill had come in the middle of a batch, and of a line.
    lines = killed.read_bytes().splitlines(keepends=True)
    killed.write_bytes(b"".join(lines[:4]) + lines[3][:30])
    assert {line.decode().strip() for line in lines[:4]} < set(rows("whole.jsonl"))
    assert sample(run("killed.jsonl")).new == 4
    assert rows("killed.jsonl") == rows("whole.jsonl")
    assert len({(row["key"], row["sample"]) for row in map(json.loads, rows("killed.jsonl"))}) == 8
