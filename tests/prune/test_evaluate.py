"""The examples as they are, on a tiny model; and `prune eval`: a plain loop's perplexities along an order."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fusemega import cli
from fusemega.config import validate
from fusemega.errors import UserError
from fusemega.hf.folder import HFFolder
from fusemega.models.registry import architecture_of
from fusemega.prune.evaluate import check_eval_output, evaluate_order
from fusemega.prune.order import Order, ResidualBlock, Step, blocks_of
from fusemega.prune.run_file import PruneEvalRun
from fusemega.prune.savings import size_of, size_of_blocks
from tests.prune.plain import Plain

EXAMPLES = Path(__file__).parents[2] / "examples" / "blockpruner"
AUTHORS = {"1": [["mlp", 2]], "2": [["mha", 0], ["mlp", 2]], "3": [["mha", 0], ["mha", 3], ["mlp", 2]]}


def run_of(work: Path, **keys: Any) -> PruneEvalRun:
    base: dict[str, Any] = {
        "model": {"load": str(work / "model"), "dtype": "fp32"},
        "data": {"path": str(work / "texts.jsonl"), "seq_length": 40, "limit": 8},
    }
    return validate(PruneEvalRun, base | keys, "test")


def command(*words: str) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["prune", *words])
    assert end.value.code == 0


def test_along_the_authors_order(work: Path, tmp_path: Path) -> None:
    file = tmp_path / "authors.json"
    file.write_text(json.dumps(AUTHORS), encoding="utf-8")
    plain = Plain(work / "model", work / "texts.jsonl", limit=8, length=40)
    result, _ = evaluate_order(run_of(work, order=str(file), counts=[0, 1, 3]))
    wanted = {"0": plain.perplexity([]), "1": plain.perplexity([("mlp", 2)])}
    wanted["3"] = plain.perplexity([("mha", 0), ("mha", 3), ("mlp", 2)])
    assert result.perplexities == pytest.approx(wanted, rel=1e-4)
    with pytest.raises(UserError, match="asked for 4 removed blocks, and the order has 3"):
        evaluate_order(run_of(work, order=str(file), counts=[4]))
    with pytest.raises(UserError, match="ascending order"):
        run_of(work, order=str(file), counts=[2, 1])


def test_refused_orders_and_outputs(work: Path, tmp_path: Path) -> None:
    file = tmp_path / "order.json"
    Order((Step(ResidualBlock("mha", 4)),), "mha").write(file)
    with pytest.raises(UserError, match=r"removes mha 4, and .*model has layers 0 to 3"):
        evaluate_order(run_of(work, order=str(file)))
    other = json.loads(file.read_text(encoding="utf-8"))
    other |= {"steps": [], "model": {"layers": 4, "family": "llama", "weights": "00"}}
    file.write_text(json.dumps(other), encoding="utf-8")
    with pytest.raises(UserError, match="an order for another model: its weights are 00"):
        evaluate_order(run_of(work, order=str(file)))
    with pytest.raises(UserError, match="is not a result of `fusemega prune eval`; it is not replaced"):
        check_eval_output(file)


def test_the_examples(work: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    small = [f"model.load={work}/model", f"data.path={work}/chat.jsonl", "data.seq_length=128"]
    output = tmp_path / "out"
    command("search", str(EXAMPLES / "search.yaml"), *small, "data.limit=3", f"output={output}")
    found = json.loads(capfd.readouterr().out)
    assert len(found["order"]) == 4 and (output / "report.html").is_file()
    result = tmp_path / "eval.json"
    order = f"order={output}/order.json"
    command("eval", str(EXAMPLES / "eval.yaml"), *small, "data.limit=3", order, f"output={result}")
    printed = json.loads(capfd.readouterr().out)
    assert printed == json.loads(result.read_text(encoding="utf-8"))
    wanted = [found["dense_perplexity"], found["perplexities"][1], found["perplexities"][3]]
    assert list(printed["perplexities"].values()) == pytest.approx(wanted, rel=1e-5)


def test_what_blocks_have(work: Path) -> None:
    folder = HFFolder(work / "model")
    whole = folder.architecture
    left_out = [{}, {"attention": {"no_op": True}}, {"ffn": {"no_op": True}}, {}]
    less = architecture_of({**folder.config, "block_configs": left_out})
    gone = size_of_blocks(whole, set(blocks_of(whole)) - set(blocks_of(less)))
    before, after = size_of(whole), size_of(less)
    assert before.parameters - gone.parameters == after.parameters
    assert (before.kv_values - gone.kv_values, before.kv_values) == (after.kv_values, 4 * 2 * 2 * 16)
