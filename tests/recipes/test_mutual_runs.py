"""Mutual-Taught in miniature, from prompts to the last policy, and the same after kill -9 in its stages.

Models of random weights and a vocabulary of bytes answer in this process. `make test-full` has every stage.
"""

from __future__ import annotations

import html
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.recipes.test_implicit import prompts, write
from tests.recipes.test_mutual import MUTUAL, of_policy, of_reward

ROOT = Path(__file__).parents[2]
# Stage -> what is waited for before it is killed: a file below the output folder, and how many lines it has then.
WAITED = {
    "sample-policy-1": ("responses/policy-1.jsonl", 3),
    "policy-1": ("policy-1/metrics.jsonl", 1),
    "compare-1": ("compared/1/responses/1-iter-1.jsonl", 4),
    "sample-reward-1-new": ("responses/reward-1-new.jsonl", 1),
    "reward-1": ("reward-1/metrics.jsonl", 1),
    "sample-policy-2": ("responses/policy-2.jsonl", 3),
    "policy-2": ("policy-2/metrics.jsonl", 1),
    "compare-2": ("compared/2/responses/2-before.jsonl", 4),
}
FIRST = ["policy-1", "compare-1"]
EVERY = [*of_policy(1), *of_reward(1), *of_policy(2), "eval-drift-2-before"]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(FIRST, id="killed-twice"),
        pytest.param(EVERY, id="everywhere", marks=pytest.mark.full),
    ],
)
def ran(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, list[str]]]:
    """A folder in which the recipe has run with kill -9 in stages (`broken`), and the names of these. Of every stage it
    has also run without a break (`whole`)."""
    kills = request.param
    folder = tmp_path_factory.mktemp("ran")
    write(folder / "prompts.jsonl", prompts(None, *(f"What is {i}?" for i in range(16))))
    runs = [["broken.yaml", [(stage, *WAITED.get(stage, (None, 0))) for stage in kills]]]
    if kills == EVERY:
        # In the last one every checkpoint would have to win at each of eight prompts.
        runs = [["whole.yaml", []], *runs, ["ended.yaml", [("compare-1", None, 0)]]]
    for file, _ in runs:
        recipe = {**MUTUAL, "output_dir": Path(str(file)).stem}
        if file == "ended.yaml":
            recipe |= {"tau": 1.0, "splits": {"selection": 8}}
        (folder / str(file)).write_text(yaml.safe_dump(recipe, sort_keys=False))
    (folder / "todo.json").write_text(json.dumps(runs))
    told = subprocess.run(
        [sys.executable, "-m", "tests.recipes.forked", str(folder), "write_tiny_models"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    log = (folder / "log").read_text() if (folder / "log").exists() else ""
    assert told.returncode == 0, f"{told.stderr[-3000:]}\n{log[-3000:]}"
    yield folder, kills


def test_policy_and_reward_model_teach_each_other(ran: tuple[Path, list[str]]) -> None:
    whole = ran[0] / "broken"
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["result"] == "broken/policies/2" and summary["policy"] == 2 and summary["stopped"] == {}
    assert summary["splits"] == {"selection": 4, "policy-1": 4, "policy-2": 4, "reward-1": 4, "in no portion": 0}
    for t, one in enumerate(summary["iterations"], 1):
        rates = {each["checkpoint"]: each["rate"] for each in one["compared"]["candidates"]}
        assert list(rates) == [1, 2] and one["decision"]["win_rate"] == max(rates.values())
        assert one["decision"]["kept"] and (whole / "policies" / str(t) / "model.safetensors").is_file()
        assert all(each["prompts"] == 4 for each in one["compared"]["candidates"])
        assert one["kl_from_start"] > 0
    # The policy that was chosen has the weights of that checkpoint, which were compared.
    first = summary["iterations"][0]
    for t, one in enumerate(summary["iterations"], 1):
        compared = whole / "compared" / f"{t}" / "policies" / f"{t}-iter-{one['decision']['checkpoint']}"
        chosen = whole / "policies" / f"{t}"
        assert (chosen / "model.safetensors").read_bytes() == (compared / "model.safetensors").read_bytes()
    reward = first["reward"]
    assert reward["kept"] + reward["dropped"] + reward["same_text"] == reward["pairs"] == 4
    assert 0 <= reward["held_out_accuracy_after"]["accuracy"] <= 1
    assert "reward" not in summary["iterations"][1], "nothing would read r_2"
    page = (whole / "report" / "report.html").read_text()
    assert page.count("<svg") == 5 and "eps is" in page and "the result is" in (ran[0] / "log").read_text()


def test_killed_in_its_stages_it_decides_the_same(ran: tuple[Path, list[str]]) -> None:
    folder, kills = ran
    told = (folder / "log").read_text()
    for stage in kills:
        record = json.loads((folder / "broken" / "stages" / f"{stage}.json").read_text())
        assert record["state"] == "finished" and f"[{stage}] was interrupted" in told
    # No response is sampled twice: those that were there at the kill are the first ones of the file.
    begun = dict(zip(kills, json.loads((folder / "killed.json").read_text()), strict=False))
    for stage, (file, _) in WAITED.items():
        if stage in kills and "responses" in file:
            known = begun[stage][: begun[stage].rfind("\n") + 1]
            assert known and (folder / "broken" / file).read_text().startswith(known)
    # Nothing is trained twice: every update was recorded once.
    for run in ("policy-1", "reward-1", "policy-2"):
        rows = (folder / "broken" / run / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(row)["iteration"] for row in rows] == [1, 2]
    if kills == FIRST:
        return
    compared = ("prompts", "groups", "rewards", "sets", "compared", "policies")
    made = [path.relative_to(folder / "whole") for path in (folder / "whole").rglob("*") if path.is_file()]
    same = [p for p in made if "stages" not in p.parts and (p.parts[0] in compared or p.suffix == ".safetensors")]
    same = [
        p for p in same if "responses" not in p.parts and p.suffix not in (".yaml", ".json") or p.name == "wins.json"
    ]
    assert len(same) >= 30
    for path in same:
        assert (folder / "whole" / path).read_bytes() == (folder / "broken" / path).read_bytes(), path
    summaries = [json.loads((folder / name / "summary.json").read_text()) for name in ("whole", "broken")]
    assert [s.pop("result") for s in summaries] == ["whole/policies/2", "broken/policies/2"]
    assert summaries[0] == summaries[1]


def test_below_tau_it_ends_with_the_policy_before(ran: tuple[Path, list[str]]) -> None:
    folder, kills = ran
    if kills == FIRST:
        pytest.skip("of every stage")
    summary = json.loads((folder / "ended" / "summary.json").read_text())
    decision = summary["iterations"][0]["decision"]
    why = f"stopped at 1, win rate {decision['win_rate']:.4f} < tau 1"
    assert summary["result"] == "model" and summary["policy"] == 0 and summary["stopped"] == {"choose-1": why}
    told = (folder / "log").read_text()
    for stage in ("sample-reward-1-old", "reward-1", "policy-2", "eval-drift-2-before"):
        assert f"[{stage}] not needed: {why}\n" in told
        assert not (folder / "ended" / "stages" / f"{stage}.json").exists()
    assert "the result is model;" in told
    assert f"The result is pi_0, model: {why}." in html.unescape(
        (folder / "ended" / "report" / "report.html").read_text()
    )


def test_no_response_is_asked_for_twice(ran: tuple[Path, list[str]]) -> None:
    for path in (ran[0] / "broken").rglob("responses/*.jsonl"):
        found = Counter((row["key"], row["sample"]) for row in map(json.loads, path.read_text().splitlines()))
        assert found and max(found.values()) == 1
    assert not re.search("Traceback", (ran[0] / "log").read_text())
