"""Malformed orders of blocks, and the run files of `fusemega prune`."""

from __future__ import annotations

from tests.bad_inputs.base import ORDER
from tests.bad_inputs.damage import put
from tests.bad_inputs.run import Bad, kind

SEARCH, EVAL, APPLY = "prune search prune.yaml", "prune eval prune_eval.yaml", "prune apply model order.json new"
HEAL = "run prune_recipe.yaml"


_p = kind("pruning")

# fmt: off
TABLE: list[Bad] = [
    _p("more blocks than there are", SEARCH + " blocks=9", "blocks: 9, and model has 4 blocks; allowed: 1 to 3"),
    _p("an odd number for ordinary layers", SEARCH + " blocks=1 constraint=plain", "blocks: 1 of the 4 blocks of model cannot be removed with constraint: plain"),
    _p("text too short for a window", SEARCH + " windows=joined data.seq_length=512", "too few for one window of data.seq_length 512", put("data.jsonl", {"text": "a plain text"})),
    _p("conversations to be joined", SEARCH + " windows=joined", "data.jsonl:1: windows: joined takes rows of text; for conversations use windows: rows"),
    _p("more samples than rows", SEARCH + " samples=99", "samples: 99, and the data has"),
    _p("a misspelt search", SEARCH + " search.name=topm", "search.name: unknown name 'topm' (did you mean 'top_m'?)"),
    _p("a misspelt measure", SEARCH + " measure=perplexiti", "measure: "),
    _p("a search for a measure that has none", SEARCH + " measure=random search.name=racing", "search: no effect with measure: random; leave it out"),
    _p("an order to compare that is not there", SEARCH + " compare=nowhere.json", "nowhere.json"),
    _p("a search's output that is there", SEARCH + " output=store", "store: "),
    _p("a count above the order", EVAL + " counts=[0,3]", "order.json: asked for 3 removed blocks, and the order has 2"),
    _p("a figure's file that is no figure", EVAL + " output=data.jsonl", "data.jsonl: exists and is not a result of `fusemega prune eval`"),
    _p("no order", APPLY, "order.json:1: malformed JSON", put("order.json", "")),
    _p("an order with other keys", APPLY, "order.json: not an order of removed blocks: found the keys blocks", put("order.json", {"blocks": []})),
    _p("an unknown kind of block", APPLY, "order.json: entry 1: kind of block: unknown name 'mla' (did you mean 'mlp'", put("order.json", {"1": [["mla", 1]]})),
    _p("a layer that the model has not", APPLY, "order.json: removes mha 7, and model has layers 0 to 1", put("order.json", {"1": [["mha", 7]]})),
    _p("a block removed twice", APPLY, "order.json: entry 2: mha 1 is in it twice", put("order.json", {**ORDER, "2": [["mha", 1], ["mha", 1]]})),
    _p("an entry that forgets a block", APPLY, "order.json: entry 2: lacks mha 1, which entry 1 removes", put("order.json", {**ORDER, "2": [["mha", 0], ["mlp", 0]]})),
    _p("an order of another model", APPLY, "an order for another model: its weights are", put("order.json", {"fusemega": "order of removed blocks, 1", "type": "mix", "model": {"family": "llama", "layers": 2, "weights": "x"}, "steps": [{"block": ["mha", 1]}]})),
    _p("more blocks than the order has", APPLY + " --blocks 3", "order.json: asked for 3 removed blocks, and the order has 2"),
    _p("what is left is no ordinary model", APPLY + " --blocks 1", "the model cannot be written as plain"),
    _p("a misspelt form", APPLY + " --export plane", "--export: unknown name 'plane' (did you mean 'plain'?)"),
    _p("an output of apply that is there", "prune apply model order.json store", "store"),
    _p("neither search nor order", HEAL + " order=null", "order"),
    _p("an order that does not fit a recipe", HEAL + " blocks=1", "the model cannot be written as plain"),
]
