"""Malformed recipe files."""

from __future__ import annotations

from tests.bad_inputs.damage import put
from tests.bad_inputs.run import Bad, kind

RUN = "run recipe.yaml"
MUTUAL = "run mutual.yaml"

_c = kind("configuration")

# fmt: off
TABLE: list[Bad] = [
    _c("no such recipe file", "run nowhere.yaml", "nowhere.yaml: cannot read the run file: No such file"),
    _c("an unknown recipe", RUN + " recipe=fusee", "recipe.yaml: recipe: unknown name 'fusee' (did you mean 'fuse'?); allowed: blockpruner, fuse, fusechat3, fuserl, mutual_taught, wrpo"),
    _c("a recipe that is a list", RUN + " 'recipe=[fuse]'", "recipe.yaml: recipe: found ['fuse']; allowed: fuse"),
    _c("a misspelt key of a recipe", RUN + " teach.topk=3", "teach.topk: unknown key (did you mean 'top_k'?)"),
    _c("a run file for a recipe", "run train.yaml", "train.yaml: target: required, and not given"),
    _c("a source that is not there", RUN + " sources.two=./nowhere", "nowhere: no such model folder"),
    _c("text that is not there", RUN + " data=dat.jsonl", "stage split: input data: dat.jsonl: no such file or folder, and no stage makes it"),
    _c("held-out text that is not there", RUN + " held_out=nowhere.jsonl --dry-run", "stage eval-target: input data: nowhere.jsonl: no such file"),
    _c("a source's name for two stages", RUN + " sources.a=model sources.merged=model", "'merged' names folders"),
    _c("nothing exported", RUN + " training.export_hf=false", "training.export_hf: false, and the folder hf is what the recipe makes"),
    _c("a stage alone before what it needs", RUN + " --only merge", "stage merge: it needs split, which is not finished (new)"),
    _c("a stage alone that is not there", RUN + " --only splitt", "--only: there is no stage 'splitt' (did you mean 'split'?)"),
    _c("a stage alone, and others", RUN + " --only split --until merge", "--only: it names the one stage that runs; leave --until, --from and --dry-run out"),
    _c("begun without a stage", RUN + " --begin words", "--begin: it is for one stage; give --only as well"),
    _c("ended before it began", RUN + " --only split --end", "stage split: it has not begun"),
    _c("too few prompts for the portions", MUTUAL + " splits.selection=2", "prompts.jsonl: splits: 2 prompts, and the portions need 3 or more (selection 2, policy-1 at least 1)"),
    _c("a prompt that is none", MUTUAL, "prompts.jsonl:1: the row has no prompt", put("prompts.jsonl", {"text": "a"})),
    _c("a reward model of another template", MUTUAL, "reward_model.load: rewarding: its chat template writes 'user: Why?assistant: So.' where that of model writes", put("rewarding/chat_template.jinja", "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}")),
    _c("a language model as a reward model", MUTUAL + " reward_model.load=model", "reward_model.load: model: the M step trains a model with one score"),
    _c("a win rate above 1", MUTUAL + " tau=1.1", "mutual.yaml: tau: "),
    _c("a win rate below 0", MUTUAL + " tau=-0.5", "mutual.yaml: tau: "),
    _c("no policies to choose from", MUTUAL + " policy.training.keep_checkpoints=1", "training.keep_checkpoints: every checkpoint may be the next policy; leave it out"),
    _c("one response to a prompt", MUTUAL + " sampling.n=1", "sampling.n: 1, and a pair has two responses of one policy"),
    _c("a stage's output is there", RUN, "new/data.jsonl: exists, and stage split did not make it", put("new/data.jsonl", "")),
]
