"""`fusemega switch label`: responses in both modes, verified; each recorded as soon as it is there.

OUT/labels/SET/MODE.jsonl   responses, in the form of `fusemega sample`
OUT/labels/SET.jsonl        the labels (`labels.py`), written when all responses are there
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict

from fusemega.errors import UserError
from fusemega.files.integrity import file_hash
from fusemega.files.json_files import read_json
from fusemega.files.lock import locked
from fusemega.files.output import check_writable, disk_errors, write_durably
from fusemega.files.results_journal import results_journal
from fusemega.runtime.console import say
from fusemega.sampling.engine import LENGTH, REFUSED, Engine, Response, SampleRequest, SamplingSettings
from fusemega.sampling.engines import EngineSettings, OpenAISettings, TransformersSettings, open_engine
from fusemega.sampling.prompts import Prompts, PromptsConfig, read_prompts
from fusemega.sampling.responses import read_made, read_responses
from fusemega.sampling.run_file import SampleRun
from fusemega.sampling.sample import sample
from fusemega.switch.families import LONG, MODES, SHORT
from fusemega.switch.labels import side_file
from fusemega.switch.modes import Modes
from fusemega.switch.run_file import LabelSettings, SwitchRun
from fusemega.switch.verdicts import Asked, verdict_of, verifiable, verify


class SetLabelled(BaseModel):
    """What is known of a set of prompts.

    Attributes:
        prompts: prompts that have a label.
        left_out: prompts without a decided response in one of the modes.
        responses: mode -> responses.
        pass_rate: mode -> mean over prompts.
        tokens: mode -> mean tokens of a response.
        spent: mode -> tokens of all responses.
        undecided, cut: mode -> responses that no verdict was found for; that reached the most tokens (they are judged
            as they are, and are wrong if they were still reasoning). Refused ones are not among the responses.
        long_better, equal: prompts on which the long mode is right more often; as often.
    """

    model_config = ConfigDict(frozen=True)

    prompts: int
    left_out: int
    responses: dict[str, int]
    pass_rate: dict[str, float]
    tokens: dict[str, float]
    spent: dict[str, int]
    undecided: dict[str, int]
    cut: dict[str, int]
    long_better: int
    equal: int


class ModeEngine:
    """An engine that is asked in one mode. See `Engine`.

    Args:
        engine: made with the settings of `engine_settings`.
        mode: the mode.
        modes: of the model.
    """

    def __init__(self, engine: Engine, mode: str, modes: Modes) -> None:
        self._engine, self._mode, self._modes = engine, mode, modes
        # Only a server is told of an empty block by a message; here the prompt's text has it.
        self._by_message = modes.mode(mode).empty_block and engine.identity.get("name") == "openai"

    @property
    def identity(self) -> Mapping[str, Any]:
        return {**self._engine.identity, "mode": self._mode, "modes": self._modes.identity}

    def prepare(self) -> None:
        self._engine.prepare()

    def generate(
        self,
        requests: Sequence[SampleRequest],
        settings: SamplingSettings,
        skip: Collection[tuple[str, int]] = frozenset(),
    ) -> Iterator[Response]:
        if self._by_message:
            opening = {"role": "assistant", "content": self._modes.opens_with}
            requests = [replace(request, messages=(*request.messages, opening)) for request in requests]
        return self._engine.generate(requests, settings, skip)


def engine_settings(run: SwitchRun, modes: Modes, mode: str) -> EngineSettings:
    """The engine's settings for one mode. What the run file says of the other settings stays.

    Raises:
        UserError: the run file chooses a mode itself.
    """
    model = run.model
    settings = run.engine or TransformersSettings(
        load=model.load, dtype=model.dtype, trust_remote_code=model.trust_remote_code
    )
    chosen = modes.mode(mode)
    if isinstance(settings, TransformersSettings):
        if settings.opens_with is not None or settings.template_variables.keys() & chosen.variables.keys():
            raise UserError(
                "engine: opens_with and the switch of the template are set by the modes here; leave them out"
            )
        changes: dict[str, Any] = {"template_variables": {**settings.template_variables, **chosen.variables}}
        changes["opens_with"] = modes.opens_with if chosen.empty_block else None
        if run.modes.chat_template is not None:
            changes["chat_template"] = run.modes.chat_template
        return settings.model_copy(update=changes)
    assert isinstance(settings, OpenAISettings)
    body = modes.request({"messages": [], **settings.extra_body}, mode)
    del body["messages"]
    # With an empty block in a message the count of prompt tokens is that of another prompt.
    tokenizer = None if chosen.empty_block else settings.tokenizer
    return settings.model_copy(update={"extra_body": body, "tokenizer": tokenizer})


def label(run: SwitchRun, opened: Callable[[EngineSettings], Engine] = open_engine) -> dict[str, SetLabelled]:
    """Labels every set of prompts of a run file; goes on where an earlier call stopped.

    Args:
        run: the run file.
        opened: makes an engine of its settings.

    Returns:
        Set -> what is known of it.

    Raises:
        UserError: unusable prompts, modes, engine or output, before anything is sampled.
        Missing: some requests got no response; the others are recorded, and the next call goes on.
    """
    check_writable(run.out)
    modes = Modes(run.modes, run.model.load, run.model.trust_remote_code)
    if isinstance(run.engine, OpenAISettings):
        modes.check_server()
    say(f"modes: {modes.name}; features are read at the end of {modes.prefill_words.partition(', ')[2]}")
    read = {name: read_prompts(config) for name, config in run.sets.items()}
    _check_apart(read)
    prompts = {name: verifiable(each, run.labels, name) for name, each in read.items()}
    settings = {mode: engine_settings(run, modes, mode) for mode in MODES}
    (run.out / "labels").mkdir(parents=True, exist_ok=True)
    with locked(run.out / "labels"), disk_errors(run.out):
        for mode in MODES:  # one model in memory at a time
            engine = ModeEngine(opened(settings[mode]), mode, modes)
            for name, each in prompts.items():
                _sample(run, name, each, mode, settings[mode], engine, modes)
            del engine
        return {name: _labelled(run, name, each, modes) for name, each in prompts.items()}


def _check_apart(prompts: Mapping[str, Prompts]) -> None:
    """A prompt that was trained on would flatter the switcher when it is tested."""
    names = list(prompts)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            if same := prompts[first].by_key.keys() & prompts[second].by_key.keys():
                place = prompts[second].by_key[min(same)].source
                raise UserError(f"{place}: the prompt is in {first} too, and {len(same) - 1} more; sets must be apart")


def _folder(run: SwitchRun, name: str) -> Path:
    return run.out / "labels" / name


def _sample(
    run: SwitchRun,
    name: str,
    prompts: Prompts,
    mode: str,
    settings: EngineSettings,
    engine: Engine,
    modes: Modes,
) -> None:
    """Samples what is missing of a set in one mode."""
    folder, labels = _folder(run, name), run.labels
    folder.mkdir(parents=True, exist_ok=True)
    sampling = labels.sampling
    if mode == SHORT and labels.max_tokens_short is not None:
        sampling = sampling.model_copy(update={"max_tokens": labels.max_tokens_short})

    def ask(keys: Iterable[str], n: int) -> None:
        path = folder / "prompts.jsonl"
        lines = [json.dumps({"prompt": list(prompts.by_key[key].messages)}) + "\n" for key in keys]
        write_durably(path, "".join(lines))
        asked, output = sampling.model_copy(update={"n": n}), str(folder / f"{mode}.jsonl")
        config = PromptsConfig(path=str(path))
        sample(SampleRun(source=mode, prompts=config, output=output, engine=settings, sampling=asked), engine)

    if labels.early_stop is None:
        ask(prompts.by_key, sampling.n)
        return
    ask(prompts.by_key, labels.early_stop)
    found = _responses(folder, mode, prompts, labels.early_stop, modes)
    verdicts: dict[str, Any] = {}
    verify([each.asked for several in found.values() for each in several], labels, verdicts, verdicts.update)
    said = {key: {verdict_of(each.asked, verdicts) for each in several} for key, several in found.items()}
    open_ = [key for key, several in said.items() if several not in ({True}, {False})]
    say(f"{name}, {mode}: {len(found) - len(open_)} prompts are settled after {labels.early_stop} responses")
    if open_:
        ask(open_, sampling.n)


class _Answer(NamedTuple):
    """A response that the engine did not refuse, and what is verified of it."""

    row: Mapping[str, Any]
    asked: Asked


def _responses(folder: Path, mode: str, prompts: Prompts, n: int, modes: Modes) -> dict[str, list[_Answer]]:
    """Prompt's key -> its responses by number, without refused ones."""
    path = folder / f"{mode}.jsonl"
    found: dict[str, list[_Answer]] = {key: [] for key in prompts.by_key}
    begins = mode == LONG and modes.begins_thinking
    for row in read_responses(path, read_made(path)):
        if row["key"] not in found or row["sample"] >= n or row["finish_reason"] == REFUSED:
            continue
        if row["tokens"] is None:
            raise UserError(f"{path}: the server does not tell how many tokens a response has, which is the cost here")
        answer = _without_reasoning(row["text"], row["finish_reason"] == LENGTH, begins)
        found[row["key"]].append(_Answer(row, Asked(prompts.by_key[row["key"]], answer)))
    return {key: sorted(several, key=lambda each: each.row["sample"]) for key, several in found.items()}


def _without_reasoning(text: str, cut: bool, begins: bool) -> str:
    """What follows the reasoning. A response that was cut while reasoning has no answer, whatever stands in it.

    Args:
        begins: whether the prompt has opened the thinking block.
    """
    _, mark, answer = text.rpartition("</think>")
    return "" if not mark and cut and (begins or "<think>" in text) else answer


def _judges(settings: LabelSettings) -> dict[str, Any]:
    return {"maths": settings.maths.timeout, "code": settings.code.model_dump(mode="json", exclude={"sandbox"})}


def _labelled(run: SwitchRun, name: str, prompts: Prompts, modes: Modes) -> SetLabelled:
    """Verifies all responses of a set and writes its labels, unless they are there."""
    path, settings = run.labels_file(name), run.labels
    found = {mode: _responses(_folder(run, name), mode, prompts, settings.sampling.n, modes) for mode in MODES}
    made = {
        "modes": modes.identity,
        "judges": _judges(settings),
        "responses": {mode: _hash_of(prompts, answers) for mode, answers in found.items()},
    }
    side = side_file(path)
    if path.exists():
        said = read_json(side) if side.is_file() else {}
        if said.get("hash") != file_hash(path):
            raise UserError(f"{path}: is not the file that {side.name} describes, and is not replaced; move it away")
        if all(said.get(key) == value for key, value in made.items()):
            say(f"{path}: is up to date")
            return SetLabelled.model_validate(said["counts"])
        path.unlink()
    with results_journal(path, {**made, "set": name}) as journal:
        asked = [each.asked for by_key in found.values() for several in by_key.values() for each in several]
        verify(asked, settings, journal.found, journal.record)
        counts = _write(journal.out, prompts, found, journal.found)
        # Before the labels get their name: the labels that this describes are there, or none.
        told = {**made, "hash": file_hash(journal.out), "counts": counts.model_dump(mode="json")}
        write_durably(side, json.dumps(told, indent=1) + "\n")
    return counts


def _write(
    out: Path,
    prompts: Prompts,
    found: Mapping[str, Mapping[str, Sequence[_Answer]]],
    verdicts: Mapping[str, Sequence[Any]],
) -> SetLabelled:
    """Writes the labels, and counts."""
    tallies = {mode: Counter[str]() for mode in MODES}
    rates: list[list[float]] = []
    tokens: list[list[float]] = []
    with open(out, "w", encoding="utf-8") as file:
        for key, prompt in prompts.by_key.items():
            told: dict[str, Any] = {}
            for mode in MODES:
                answers = found[mode][key]
                correct = [verdict_of(each.asked, verdicts) for each in answers]
                lengths = [each.row["tokens"] for each in answers]
                cut = sum(each.row["finish_reason"] == LENGTH for each in answers)
                undecided = correct.count(None)
                tallies[mode].update(responses=len(answers), spent=sum(lengths), cut=cut, undecided=undecided)
                told[mode] = {"correct": correct, "tokens": lengths, "cut": cut}
            decided = [[c for c in told[mode]["correct"] if c is not None] for mode in MODES]
            if not all(decided):
                continue
            about = {name: value for name, value in prompt.about.items() if name != "tests"}
            file.write(json.dumps({"key": key, "prompt": list(prompt.messages), **about, **told}, ensure_ascii=False))
            file.write("\n")
            rates.append([fmean(each) for each in decided])
            tokens.append([fmean(told[mode]["tokens"]) for mode in MODES])
    if not rates:
        raise UserError(f"{out.parent}: no prompt has a decided response in both modes")
    names = ("responses", "spent", "undecided", "cut")
    counts: dict[str, Any] = {name: {mode: tallies[mode][name] for mode in MODES} for name in names}
    for name, values in (("pass_rate", rates), ("tokens", tokens)):
        counts[name] = {mode: fmean(each[i] for each in values) for i, mode in enumerate(MODES)}
    return SetLabelled(
        prompts=len(rates),
        left_out=len(prompts) - len(rates),
        long_better=sum(long > short for short, long in rates),
        equal=sum(long == short for short, long in rates),
        **counts,
    )


def _hash_of(prompts: Prompts, answers: Mapping[str, Sequence[_Answer]]) -> str:
    """Of the responses to be judged, with what judges them, in the order of the prompts."""
    digest = hashlib.blake2b(digest_size=16)
    for key, prompt in prompts.by_key.items():
        told = [
            [each.row["sample"], each.asked.text, each.row["tokens"], each.row["finish_reason"]]
            for each in answers[key]
        ]
        digest.update(json.dumps([key, dict(prompt.about), told], sort_keys=True).encode())
    return digest.hexdigest()
