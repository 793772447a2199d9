"""Whole recipes in miniature, from prompts to a trained model, and the same after kill -9 in their stages.

SmolLM2 with two layers is every model, and answers in this process. `make test-full` has every recipe and stage.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.recipes.test_implicit import RECIPE, prompts, write

ROOT = Path(__file__).parents[2]
QUESTIONS = (
    "What is a star?",
    "Name a river.",
    "Write a line about rain.",
    "Why is the sky blue?",
    "Say hello in French.",
)
SELECT: dict[str, dict[str, Any]] = {
    "fusechat3": {"min_margin": 0.0, "max_margin": None, "without_pair": "sft"},  # rewards are random here
    "wrpo": {},
    "fuserl": {"alpha": "auto"},
}
# Stage -> what is waited for before it is killed: a file below the output folder, and how many lines it has then.
# `prompts` and `held-out` end within milliseconds.
KILLS: dict[str, tuple[str | None, int]] = {
    "sample-warm": ("responses/warm.jsonl", 2),
    "sft": ("sft/metrics.jsonl", 1),
    "preference": (None, 0),
}
OF_WRPO: dict[str, tuple[str | None, int]] = {
    "sample-own": ("responses/own.jsonl", 1),
    "collect-own": (None, 0),
    "score-own": (None, 0),
    "select-own": (None, 0),
}
ALL_KILLS = {
    "sample-warm": KILLS["sample-warm"],
    "sample-cool": ("responses/cool.jsonl", 5),
    "collect-sources": (None, 0),
    "score-sources": (None, 0),
    "select-sources": (None, 0),
    "sft": KILLS["sft"],
    "OWN": (None, 0),
    "teach-reference": (None, 0),
    "preference": ("preference/metrics.jsonl", 1),
    "eval-held-out-target": (None, 0),
    "eval-held-out-preference": (None, 0),
}


def kills_of(kind: str) -> list[tuple[str, str | None, int]]:
    """Every stage of a recipe, in the order of the graph."""
    found: list[tuple[str, str | None, int]] = []
    for stage, (file, lines) in ALL_KILLS.items():
        if stage != "OWN":
            found.append((stage, file, lines))
        elif kind == "wrpo":
            found += [(own, *waited) for own, waited in OF_WRPO.items()]
    return found


EVERY = [pytest.param((kind, kills_of(kind)), id=f"{kind}-everywhere", marks=pytest.mark.full) for kind in SELECT]
FIRST = pytest.param(("fusechat3", [(stage, *waited) for stage, waited in KILLS.items()]), id="fusechat3")


@pytest.fixture(scope="module", params=[FIRST, *EVERY])
def ran(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, smollm2_folder: Path
) -> Iterator[tuple[Path, list[str]]]:
    """A folder in which a recipe has run without a break (`whole`), and with kill -9 in its stages (`broken`); and the
    names of these."""
    kind, kills = request.param
    folder = tmp_path_factory.mktemp("ran")
    write(folder / "prompts.jsonl", prompts("instruction", *QUESTIONS))
    for name in ("whole", "broken"):
        recipe = {**RECIPE, "recipe": kind, "output_dir": name, "select": SELECT[kind]}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    (folder / "todo.json").write_text(json.dumps([["whole.yaml", []], ["broken.yaml", kills]]))
    told = subprocess.run(
        [sys.executable, "-m", "tests.recipes.forked", str(folder)], cwd=ROOT, capture_output=True, text=True
    )
    log = (folder / "log").read_text() if (folder / "log").exists() else ""
    assert told.returncode == 0, f"{told.stderr[-3000:]}\n{log[-3000:]}"
    yield folder, [stage for stage, _, _ in kills]


def test_from_prompts_to_a_trained_model(ran: tuple[Path, list[str]]) -> None:
    whole = ran[0] / "whole"
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["prompts"] == {"all": 5}
    sets = json.loads((whole / "sets" / "sources" / "selection.json").read_text())["files"]
    assert sets in summary["sets"].values() and sets["sft.jsonl"] >= 1
    assert sum(rows for name, rows in sets.items() if name != "removed.jsonl") == 5, "each prompt is in one set"
    for model in ("target", "sft", "preference"):
        assert 0 <= summary["models"][model]["held-out: accuracy_mean"] <= 1
        assert summary["models"][model]["held-out: pairs"] == 1
    weights = [ran[0] / "model", whole / "sft" / "hf", whole / "preference" / "hf"]
    found = {hashlib.sha256((folder / "model.safetensors").read_bytes()).digest() for folder in weights}
    assert len(found) == 3, "each training changed the model"
    lines = [json.loads(line) for line in (whole / "responses" / "cool.jsonl").read_text().splitlines()]
    assert len(lines) == 10 and {line["source"] for line in lines} == {"cool"}


def test_killed_in_its_stages_it_makes_the_same(ran: tuple[Path, list[str]]) -> None:
    folder, kills = ran
    told = (folder / "log").read_text()
    for stage in kills:
        record = json.loads((folder / "broken" / "stages" / f"{stage}.json").read_text())
        assert record["state"] == "finished" and f"[{stage}] was interrupted" in told
    # No response is sampled twice: those that were there at the kill are the first ones of the file.
    begun = dict(zip(kills, json.loads((folder / "killed.json").read_text()), strict=True))
    for stage in (name for name in kills if name.startswith("sample-")):
        name = f"responses/{stage.removeprefix('sample-')}.jsonl"
        whole, broken = (folder / place / name for place in ("whole", "broken"))
        known = begun[stage][: begun[stage].rfind("\n") + 1]
        assert known and broken.read_text().startswith(known)
        assert sorted(whole.read_text().splitlines()) == sorted(broken.read_text().splitlines())
    made = [path.relative_to(folder / "whole") for path in (folder / "whole").rglob("*") if path.is_file()]
    sets = ("prompts", "groups", "rewards", "sets")
    same = [path for path in made if path.parts[0] in sets or path.suffix == ".safetensors"]
    assert len(same) >= 10
    for path in same:
        assert (folder / "whole" / path).read_bytes() == (folder / "broken" / path).read_bytes(), path
