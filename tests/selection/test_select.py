"""`fusemega select` on files: what it writes, whatever the order of the rows, and that the losses read it."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from fusemega.cli.select import command as select_command
from fusemega.config import load, validate
from fusemega.errors import UserError
from fusemega.losses.registry import build_objective, check_data, parse_objective
from fusemega.sampling.prompts import PromptsConfig, prompt_key, read_prompts
from fusemega.selection.run_file import SelectRun
from fusemega.selection.select import select
from fusemega.text.data import DataConfig
from fusemega.text.dataset import TokenizedDataset, prepare
from tests.selection.make import drawn, read, row, write
from tests.text.toys import byte_level

ROOT = Path(__file__).parents[2]
DOMAINS = ("instruction", "maths", "code", "chinese")
IN_JOB = {"reference": {"in_job": {"load": "a folder that nobody opens"}}}


def run(out: Path, data: Any, protocol: Any = "fusechat3", **settings: Any) -> dict[str, Any]:
    values = {"data": data, "output_dir": str(out), "protocol": protocol, **settings}
    return select(validate(SelectRun, values, "run.yaml"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def prepared(path: Path, folder: Path) -> TokenizedDataset:
    return prepare(DataConfig(path=str(path), seq_length=4096), byte_level(), folder / "cache")


def texts_of(rows: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Prompt -> text -> the response that the data have."""
    return {each["prompt"]: {one["text"]: one for one in each["responses"]} for each in rows}


@pytest.mark.parametrize("seed", range(3))
def test_fusechat3_from_files(seed: int, tmp_path: Path) -> None:
    """What the rows say is what the data say: sources, rewards, verdicts; sets are disjoint; all are counted."""
    rows = drawn(random.Random(seed), 120, DOMAINS)
    given = texts_of(rows)
    found = run(tmp_path / "out", str(write(tmp_path / "groups.jsonl", rows)), seed=seed)
    sft, pairs, gone = (read(tmp_path / "out" / f"{name}.jsonl") for name in ("sft", "preference", "removed"))
    domains = {each["prompt"]: each["domain"] for each in rows}
    prompts = Counter(each["prompt"][0]["content"] for each in [*sft, *pairs, *gone])
    assert prompts == Counter(each["prompt"] for each in rows)
    for each in pairs:
        said = given[each["prompt"][0]["content"]]
        chosen, rejected = (said[each[name][0]["content"]] for name in ("chosen", "rejected"))
        assert chosen["source"] == rejected["source"] == each["source"]
        assert (chosen["reward"], rejected["reward"]) == (each["score_chosen"], each["score_rejected"])
        if each["domain"] != "code":
            assert 0.01 <= round(each["score_chosen"] - each["score_rejected"], 9) <= 0.1
        if each["domain"] in ("maths", "code"):
            assert chosen["correct"] is True and rejected["correct"] is False
        assert each["domain"] != "chinese"
    for each in sft:
        said = given[each["prompt"][0]["content"]]
        one = said[each["completion"][0]["content"]]
        assert one["source"] == each["source"] and one["reward"] == each["score"]
        fit = [r for r in said.values() if each["domain"] in ("instruction", "chinese") or r["correct"]]
        assert one["reward"] == max(r["reward"] for r in fit)
    total = found["counts"][-1]
    assert total["total"] == len(sft) + len(pairs)
    assert (total["prompts"], total["sft"], total["preference"], total["removed"]) == (
        120,
        len(sft),
        len(pairs),
        len(gone),
    )
    for line in found["counts"][:-1]:
        assert line["prompts"] == sum(
            domains[each["prompt"]] == line["domain"] and each.get("dataset", "") == line["dataset"] for each in rows
        )
    assert sum(line["prompts"] for line in found["removed"]) == len(gone)
    assert found["files"] == {"sft.jsonl": len(sft), "preference.jsonl": len(pairs), "removed.jsonl": len(gone)}
    assert json.loads((tmp_path / "out" / "selection.json").read_text("utf-8")) == found


@pytest.mark.parametrize("protocol", ["fusechat3", "wrpo", {"name": "wrpo", "target": "model 1"}, "fuserl", "simpo"])
def test_the_same_bytes_whatever_the_order(protocol: Any, tmp_path: Path) -> None:
    """Rows, responses and files in another order, and the responses of a prompt in several rows: the same folder."""
    rng = random.Random(7)
    rows = drawn(rng, 60, DOMAINS, sources=1 if protocol == "simpo" else 3)
    rows += [{**each, "prompt": each["prompt"] + " please"} for each in rows[:5]]
    settings: dict[str, Any] = {"dedup": {"ngram": 2, "threshold": 0.5}, "seed": 3}
    run(tmp_path / "a", str(write(tmp_path / "groups.jsonl", rows)), protocol, **settings)
    parts: list[dict[str, Any]] = []
    for each in rng.sample(rows, len(rows)):
        responses = rng.sample(each["responses"], len(each["responses"]))
        at = rng.randint(0, len(responses))
        for part in (responses[:at], responses[at:]):
            parts += [{**each, "responses": part}] if part else []
    half = len(parts) // 2
    files = [write(tmp_path / "1.jsonl", parts[half:]), write(tmp_path / "2.jsonl", parts[:half])]
    run(tmp_path / "b", [str(path) for path in files], protocol, **settings)
    one, other = contents(tmp_path / "a"), contents(tmp_path / "b")
    numbers = [json.loads(folder.pop("selection.json")) for folder in (one, other)]
    assert [each.pop("read")["prompts"] for each in numbers] == [65, 65] and numbers[0] == numbers[1]
    assert numbers[0]["removed"] and any("duplicate" in line["rule"] for line in numbers[0]["removed"])
    pages = [folder.pop("selection.html").decode() for folder in (one, other)]
    assert pages[0].split("<h2>Margins")[1:] == pages[1].split("<h2>Margins")[1:] or "<h2>Margins" not in pages[0]
    assert one == other


def test_the_losses_read_every_set(tmp_path: Path) -> None:
    """SFT rows, pairs, triples and groups: as data of the objectives, whose own choice is the protocol's."""
    rows = drawn(random.Random(1), 40, ["instruction"], sources=4)
    groups = str(write(tmp_path / "groups.jsonl", rows))
    given = {prompt: list(said.values()) for prompt, said in texts_of(rows).items()}
    cases: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
        "pairs": ({"name": "fusechat3", "max_margin": None}, {"name": "sft"}, {"name": "dpo", "beta": 0.1, **IN_JOB}),
        "triples": ({"name": "wrpo", "target": "model 3"}, {}, {"name": "wrpo", **IN_JOB}),
        "groups": ("fuserl", {"name": "fuse_sft"}, {"name": "fuse_po", "beta": 0.1, **IN_JOB}),
    }
    for name, (protocol, sft, preference) in cases.items():
        out = tmp_path / name
        files = run(out, groups, protocol)["files"]
        for file, objective in (("sft.jsonl", sft), ("preference.jsonl", preference)):
            assert (file in files) == bool(objective)
            if not objective:
                continue
            dataset = prepared(out / file, tmp_path)
            assert dataset.num_units == files[file]
            loss = build_objective(parse_objective(objective), byte_level(), 600)
            check_data(loss, dataset)  # raises where a row has no comparison
            if name != "triples":
                continue
            for unit, written in enumerate(read(out / file)):
                (found,) = loss.compare([dataset[i] for i in dataset.unit(unit)])
                assert found.places == (0, 1, 2)
                texts = [each["text"] for each in written["responses"]]
                said = given[written["prompt"][0]["content"]]
                own = [each for each in said if each["source"] == "model 3"]
                others = [each for each in said if each["source"] != "model 3"]
                rewards = {each["text"]: each["reward"] for each in said}
                assert rewards[texts[0]] == max(each["reward"] for each in others)
                assert rewards[texts[1]] == max(each["reward"] for each in own)
                assert rewards[texts[2]] == min(each["reward"] for each in own)


def test_wrpo_in_two_steps(tmp_path: Path) -> None:
    """The prompts that are left are read as prompts; with the target's samples in a file of their own they give the
    triples, and the SFT third gives none."""
    rows = [row(f"question {i}", ("a", 0.1 * i), ("b", 0.5), domain="maths", answer=str(i)) for i in range(12)]
    groups = write(tmp_path / "groups.jsonl", rows)
    first = run(tmp_path / "one", str(groups), "wrpo")
    assert first["files"] == {"sft.jsonl": 4, "left.jsonl": 8}
    left = read_prompts(PromptsConfig(path=str(tmp_path / "one" / "left.jsonl")))
    assert len(left) == 8
    assert {p.about["answer"] for p in left.by_key.values()} < {str(i) for i in range(12)}
    trained = {each["prompt"][0]["content"] for each in read(tmp_path / "one" / "sft.jsonl")}
    samples = [
        row(p.messages[0]["content"], ("target", 0.2), ("target", 0.7), domain="maths") for p in left.by_key.values()
    ]
    own = write(tmp_path / "own.jsonl", samples)
    second = run(tmp_path / "two", [str(own), str(groups)], {"name": "wrpo", "target": "target"})
    assert second["files"] == {"preference.jsonl": 8, "removed.jsonl": 4}
    assert second["removed"] == [{"domain": "maths", "rule": "no response of the target", "prompts": 4}]
    triples = read(tmp_path / "two" / "preference.jsonl")
    assert not trained & {each["prompt"][0]["content"] for each in triples}
    assert all([one["source"] for one in each["responses"]][1:] == ["target"] * 2 for each in triples)


def test_a_killed_command_starts_again(tmp_path: Path) -> None:
    """SIGKILL when the sets are written, but have no name yet: nothing is at the output, and the next call makes what
    an uninterrupted one makes."""
    groups = str(write(tmp_path / "groups.jsonl", drawn(random.Random(2), 30, DOMAINS)))
    run(tmp_path / "whole", groups)
    killed = (
        "import os, signal, sys\n"
        "from fusemega.cli import main\n"
        "from fusemega.selection import select\n"
        "select.summary_of = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)\n"
        "main(sys.argv[1:])\n"
    )
    run_file = tmp_path / "run.yaml"
    run_file.write_text(f"data: {groups}\noutput_dir: {tmp_path / 'out'}\nprotocol: fusechat3\n", encoding="utf-8")
    ended = subprocess.run([sys.executable, "-c", killed, "select", str(run_file)], check=False, capture_output=True)
    assert ended.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists() and (tmp_path / ".out.incomplete" / "out" / "sft.jsonl").is_file()
    select_command(run_file, [])
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not (tmp_path / ".out.incomplete").exists()


def test_known_texts_and_near_duplicates_are_listed(tmp_path: Path) -> None:
    question = "What is the sum of the first hundred positive integers, please"
    rows = [row(f"{i} is a number about which nothing else is known", ("a", 0.1), ("a", 0.15)) for i in range(6)]
    rows += [row(f"Hello! {question}?", ("a", 0.1), ("a", 0.15), id="leak"), row("short", ("a", 0.1), ("a", 0.15))]
    known = write(tmp_path / "bench.jsonl", [{"q": "an unrelated question"}, {"q": question.upper()}])
    found = run(
        tmp_path / "out",
        str(write(tmp_path / "groups.jsonl", rows)),
        {"name": "fusechat3", "sft_share": 0.5},
        dedup={"ngram": 3, "threshold": 0.7},
        decontaminate={"against": [{"name": "bench", "path": str(known), "field": "q"}]},
    )
    gone = {each["rule"]: each for each in read(tmp_path / "out" / "removed.jsonl")}
    leak = gone["contains a text of bench"]
    assert (leak["id"], leak["set"], leak["overlap"], leak["like"]) == ("leak", "bench", 1.0, question.upper())
    alike = gone["near-duplicate of another prompt"]
    kept = read(tmp_path / "out" / "sft.jsonl") + read(tmp_path / "out" / "preference.jsonl")
    assert alike["key_kept"] in {prompt_key(each["prompt"]) for each in kept}
    assert {line["rule"]: line["prompts"] for line in found["removed"]} == {leak["rule"]: 1, alike["rule"]: 5}
    page = (tmp_path / "out" / "selection.html").read_text("utf-8")
    assert "contains a text of bench (1 of 1)" in page and "is like" in page and question.upper() in page


def test_lengths_and_sources_by_hand(tmp_path: Path) -> None:
    """Two pairs: in one the chosen response is longer, and tokens are counted because every response has them."""

    def group(text: str, long_wins: bool) -> dict[str, Any]:
        found = row(text, ("a", 0.15), ("a", 0.10), ("b", 0.05))
        for one, tokens in zip(found["responses"], (30 if long_wins else 5, 10, 1), strict=True):
            one["tokens"] = tokens
        return found

    rows = [group("x", True), group("y", False)]
    protocol = {"name": "fusechat3", "sft_share": 0}
    found = run(tmp_path / "out", str(write(tmp_path / "groups.jsonl", rows)), protocol)
    assert found["lengths"]["unit"] == "tokens"
    assert found["lengths"]["pairs"] == [
        {"domain": "instruction", "pairs": 2, "chosen": 17.5, "rejected": 10, "chosen_longer": 0.5, "equal": 0}
    ]
    assert found["sources"]["preference"] == {"instruction": {"a": 2}} and found["responses"] == {"a": 4, "b": 2}
    margins = found["margins"]["instruction"]
    assert margins["written_quantiles"]["median"] == 0.05 and sum(margins["written"]) == 2


def test_fuserl_weights_by_hand(tmp_path: Path) -> None:
    """exp(0) / (exp(0) + exp(-1)) for a difference of alpha."""
    rows = [row(f"q {i}", ("a", 0.11), ("a", 0.1), ("b", 0.1), ("b", 0.05)) for i in range(5)]
    found = run(tmp_path / "out", str(write(tmp_path / "groups.jsonl", rows)), {"name": "fuserl", "alpha": 0.01})
    assert found["weights"]["sft"]["mean"] == {"a": 0.7311, "b": 0.2689}
    auto = run(tmp_path / "auto", str(tmp_path / "groups.jsonl"), {"name": "fuserl", "alpha": "auto"})
    assert auto["weights"]["preference"] == {
        "alpha": 0.005,
        "mean": {"a": 0.8808, "b": 0.1192},
        "mean_of_largest": 0.8808,
    }


def test_the_example(tmp_path: Path) -> None:
    """examples/selection/tiny.yaml: the counts of its page, counted by hand from the 20 prompts."""
    example = load(SelectRun, ROOT / "examples" / "selection" / "tiny.yaml", [f"output_dir={tmp_path / 'out'}"])
    found = select(example.model_copy(update={"data": str(ROOT / example.data)}))
    rows = {row["domain"]: [row[name] for name in ("removed", "sft", "preference")] for row in found["counts"]}
    # Code: of 3 prompts with a passing response, 2 have a failing one of the same source; 1 more is dropped.
    assert rows["code"] == [1, 1, 2]
    # Instruction: of two prompts both sources' margins are outside (0.25 and 0.102; 0.005 and 0.002); floor(0.4 x 6).
    assert rows["instruction"] == [2, 2, 4]
    # Maths: 1 without a correct response; floor(0.4 x 5) are for SFT.
    assert rows["maths"] == [1, 2, 3]
    assert rows["chinese"] == [0, 2, 0] and rows["total"] == [4, 7, 9]


BAD: dict[str, tuple[list[Any], dict[str, Any], str]] = {
    "no pair in the window": (
        [row(f"q {i}", ("a", 0.1), ("a", 3.1)) for i in range(3)],
        {},
        r"sft.jsonl would be empty: of 3 prompts 3 \(no pair in the window 0.01 to 0.1\)$",
    ),
    "all into sft": (
        [row(f"q {i}", ("a", 0.1), ("a", 3.1)) for i in range(3)],
        {"protocol": {"name": "fusechat3", "without_pair": "sft"}},
        r"preference.jsonl would be empty: of 3 prompts 3 \(no pair in the window 0.01 to 0.1\); margins.* 3 to 3$",
    ),
    "one prompt": (
        [row("q", ("a", 0.1), ("a", 0.15))],
        {},
        r"sft.jsonl would be empty: of 1 prompts 1 are in preference",
    ),
    "all fail": (
        [row(f"q {i}", ("a", 0.1, False), domain="code") for i in range(2)],
        {},
        r"would be empty: of 2 prompts 2 \(every response fails\)",
    ),
    "no rewards": ([{"prompt": "q", "responses": ["a", "b"]}], {}, r"groups.jsonl:1: a response has no reward"),
    "rewards of another number": (
        [{"prompt": "q", "responses": ["a", "b"], "rewards": [1]}],
        {},
        r"groups.jsonl:1: rewards is a list of 2 numbers",
    ),
    "two rewards": (
        [{"prompt": "q", "responses": [{"text": "a", "reward": 1}], "rewards": [1]}],
        {},
        r"groups.jsonl:1: responses\[0\] has more than one reward",
    ),
    "no responses": ([{"prompt": "q", "responses": []}], {}, r"groups.jsonl:1: the row has no responses"),
    "no prompt": ([{"responses": ["a"]}], {}, r"groups.jsonl:1: the row has no prompt"),
    "unknown field": (
        [row("q", ("a", 0.1), verdict=1)],
        {},
        r"groups.jsonl:1: the row has verdict.*\(unknown_fields: ignore would",
    ),
    "unknown field of a response": (
        [{"prompt": "q", "responses": [{"text": "a", "grade": 1}]}],
        {},
        r"groups.jsonl:1: responses\[0\] has grade",
    ),
    "NaN": (
        [{"prompt": "q", "responses": [{"text": "a", "reward": float("nan")}]}],
        {},
        r"groups.jsonl:1: .*finite number",
    ),
    "verdict of another type": (
        [{"prompt": "q", "responses": [{"text": "a", "correct": "yes"}]}],
        {},
        r"responses\[0\].correct is true, false or null",
    ),
    "answers differ": (
        [row("q", ("a", 0.1), answer="1"), row("q", ("b", 0.2), answer="2")],
        {},
        r"groups.jsonl:2: the row's answer is another than in .*groups.jsonl:1",
    ),
    "unknown source": (
        [row("q", ("gemma", 0.1), ("gemma", 0.2))],
        {"sources": ["gema"]},
        r"sources: no response has the source 'gema' \(did you mean 'gemma'\?\); found: gemma",
    ),
    "field of a set": (
        [row("q", ("a", 0.1), ("a", 0.2))],
        {"decontaminate": {"against": [{"name": "b", "path": "GROUPS", "field": "text"}]}},
        r"groups.jsonl:1: the row has no text; found the keys prompt, responses",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_mistakes_leave_nothing(name: str, tmp_path: Path) -> None:
    rows, settings, message = BAD[name]
    groups = write(tmp_path / "groups.jsonl", rows)
    settings = json.loads(json.dumps(settings).replace("GROUPS", str(groups)))
    with pytest.raises(UserError, match=message):
        run(tmp_path / "out", str(groups), settings.pop("protocol", "fusechat3"), **settings)
    assert list(tmp_path.iterdir()) == [groups]


def test_fields_left_out_and_joined_rows_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row(f"q {i}", ("a", 0.1), ("a", 0.15), note=1) for i in range(5)]
    rows += [row("q 0", ("b", 0.1), note=2), row("q 1", ("a", 0.1))]
    run(tmp_path / "out", str(write(tmp_path / "groups.jsonl", rows)), unknown_fields="ignore", sources=["a"])
    told = capsys.readouterr().err
    for words in ("2 rows joined", "1 responses equal", "1 responses of other sources", "fields left out: 6 (note)"):
        assert words in told
    with pytest.raises(UserError, match="exists and is not an empty folder"):
        run(tmp_path / "out", str(tmp_path / "groups.jsonl"))
