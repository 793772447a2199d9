"""A tiny model whose chat template has a switch, prompts whose difficulty is readable, and an engine that knows it."""

from __future__ import annotations

import json
import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks import tiny
from fusemega.config import validate
from fusemega.sampling.engine import Response, SampleRequest, SamplingSettings
from fusemega.sampling.engines import EngineSettings, TransformersSettings
from fusemega.switch.run_file import SwitchRun
from tests.training.conftest import work  # noqa: F401  (a fixture)

TURN = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
OPEN = "{% if add_generation_prompt %}<|im_start|>assistant\n"
OFF = "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
ENABLE = TURN + OPEN + OFF + "{% endif %}"

LEVELS = 9
SHORT_RATES = (1.0, 0.95, 0.9, 0.7, 0.5, 0.3, 0.1, 0.05, 0.0)
LONG_RATES = tuple(0.95 - 0.02 * level for level in range(LEVELS))
SHORT_TOKENS, LONG_TOKENS = 5, tuple(50 + 10 * level for level in range(LEVELS))


@pytest.fixture(scope="session")
def switch_model(work: Path) -> Path:  # noqa: F811
    """A folder; its model is random."""
    folder = tiny.write_model(work / "switch_model", work / "chat.jsonl")
    (folder / "chat_template.jinja").write_text(ENABLE, encoding="utf-8")
    return folder


def question(level: int, number: int) -> str:
    """The share of the word "hard" is the level."""
    words = ["hard"] * level + ["easy"] * (LEVELS - 1 - level)
    random.Random(number).shuffle(words)
    return f"{' '.join(words)} {number}?"


def level_of(text: str) -> int:
    return text.split().count("hard")


def write_questions(path: Path, count: int, start: int = 0) -> Path:
    rows = [
        {"prompt": question(n % LEVELS, n), "answer": str(n % 5), "domain": "maths", "id": str(n)}
        for n in range(start, start + count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


class ScriptedEngine:
    """Right with the rate of the prompt's level and the mode, which it reads off its settings."""

    asked = 0

    def __init__(self, settings: EngineSettings) -> None:
        assert isinstance(settings, TransformersSettings)
        self._long = settings.template_variables["enable_thinking"]
        self.identity: Mapping[str, Any] = {"name": "scripted", "long": self._long}

    def prepare(self) -> None:
        pass

    def generate(
        self,
        requests: Sequence[SampleRequest],
        settings: SamplingSettings,
        skip: Collection[tuple[str, int]] = frozenset(),
    ) -> Iterator[Response]:
        for request in requests:
            if (request.key, request.sample) in skip:
                continue
            ScriptedEngine.asked += 1
            text = request.messages[-1]["content"]
            level = level_of(text)
            number = int(text.split()[-1].rstrip("?"))
            rate = (LONG_RATES if self._long else SHORT_RATES)[level]
            right = random.Random(f"{text} {request.sample} {self._long}").random() < rate
            said = f"So it is \\boxed{{{number % 5 if right else 9}}}"
            if self._long:
                said = f"<think>\nhm, {number % 5}?\n</think>\n\n{said}"
            yield Response(request.key, request.sample, said, "stop", 10, LONG_TOKENS[level] if self._long else 5)


def switch_run(folder: Path, model: Path, **sections: Any) -> SwitchRun:
    """A valid run on `folder`/train.jsonl, with those keys replaced."""
    base: dict[str, Any] = {
        "output_dir": str(folder / "out"),
        "model": {"load": str(model), "dtype": "fp32"},
        "prompts": {"path": str(folder / "train.jsonl")},
        "labels": {"sampling": {"n": 8}},
        "features": {"seq_length": 256},
        "train": {"hidden_sizes": [32], "lr": 3e-3, "dropout": 0.0, "seeds": [0], "patience": 40},
        "baselines": {"resamples": 200},
    }
    for name, value in sections.items():
        base[name] = {**base.get(name, {}), **value} if isinstance(value, dict) else value
    return validate(SwitchRun, base, "test")
