"""Malformed prompts, responses and the run files of what reads them."""

from __future__ import annotations

from tests.bad_inputs.base import FILES, GROUP, SCORED
from tests.bad_inputs.damage import key, put
from tests.bad_inputs.run import Bad, kind

SAMPLE, VERIFY, JUDGE, RULES, SELECT, TASKS = (
    f"{name} {name}.yaml" for name in ("sample", "verify", "judge", "rules", "select", "tasks")
)

_r = kind("responses")
OPENAI = SAMPLE + " engine.name=openai"
SERVER = put("sample.yaml", {**FILES["sample.yaml"], "engine": {"base_url": "http://127.0.0.1:9/v1", "model": "x"}})

# fmt: off
TABLE: list[Bad] = [
    _r("a file without prompts", SAMPLE, "prompts.jsonl:1: the row has no prompt (keys: text)", put("prompts.jsonl", {"text": "a"})),
    _r("an empty file of prompts", SAMPLE, "prompts.jsonl: no prompts in 0 rows", put("prompts.jsonl", "")),
    _r("a misspelt field of a prompt", SAMPLE, "answr", put("prompts.jsonl", {"prompt": "a", "answr": "b"})),
    _r("no file of prompts", SAMPLE + " prompts.path=prompt.jsonl", "prompt.jsonl"),
    _r("a misspelt engine", SAMPLE + " engine.name=openapi", "engine.name: unknown name 'openapi' (did you mean 'openai'?)"),
    _r("no model folder", SAMPLE + " engine.load=./nowhere", "nowhere: no such model folder"),
    _r("a folder without chat template", SAMPLE, "the tokenizer has no chat template, with which prompts become text; give engine.chat_template: FILE", put("model/chat_template.jinja", ""), key("model/tokenizer_config.json", "chat_template", None)),
    _r("no server", OPENAI, "engine.base_url: http://127.0.0.1:9/v1: no server answers", SERVER),
    _r("no key in the environment", OPENAI + " engine.api_key_env=NO_SUCH_KEY", "the environment has no NO_SUCH_KEY", SERVER),
    _r("an output that is there", SAMPLE + " output=data.jsonl", "data.jsonl: exists and was not written by `fusemega sample`"),
    _r("rows for responses", "collect prompts.jsonl new.jsonl groups.jsonl", "groups.jsonl: not a responses file of `fusemega sample`"),
    _r("no responses", VERIFY, "groups.jsonl:1: the row has no responses", put("groups.jsonl", {"prompt": "a"})),
    _r("an output of verify that is there", VERIFY + " output=data.jsonl", "data.jsonl: exists; nothing is overwritten"),
    _r("one response to judge", JUDGE, "no row has two responses to compare", put("groups.jsonl", {**GROUP, "responses": GROUP["responses"][:1]})),
    _r("a judge's template without answers", JUDGE + " 'template=Which? {prompt} {first}'", "template: has no {second}"),
    _r("a misspelt rule", RULES + " 'rules=[{name: exat}]'", "rules[0].name: unknown name 'exat' (did you mean 'exact'?)"),
    _r("a pattern that is none", RULES + " 'rules=[{name: pattern, pattern: \"(\"}]'", "not a regular expression"),
    _r("an unknown protocol", SELECT + " protocol=fusechat", "protocol.name: unknown name 'fusechat' (did you mean 'fusechat3'"),
    _r("an unknown source", SELECT + " 'sources=[b]'", "sources: no response has the source 'b'"),
    _r("responses without rewards", SELECT, "scored.jsonl:1: a response has no reward", put("scored.jsonl", {**SCORED[0], "responses": GROUP["responses"]})),
    _r("a reward that is no number", SELECT, "scored.jsonl:1: ", put("scored.jsonl", {**SCORED[0], "responses": [{"text": "2", "source": "a", "reward": "high"}]})),
    _r("an unknown published set", "published fusechat3-dop data.jsonl new.jsonl", "unknown name 'fusechat3-dop' (did you mean 'fusechat3-dpo'"),
    _r("another set than the published", "published fusechat3-dpo data.jsonl new.jsonl", "data.jsonl"),
    _r("an unknown task", TASKS + " tasks.sums.name=gsm9k", "tasks.sums.name: unknown name 'gsm9k' (did you mean 'gsm8k'?)"),
    _r("a question without number", TASKS, "questions.jsonl:1: ", put("questions.jsonl", {"question": "a", "answer": "none"})),
    _r("no file of questions", TASKS + " tasks.sums.data.path=nowhere.jsonl", "nowhere.jsonl"),
    _r("a language model as reward model", "score score.yaml", "LlamaForCausalLM"),
    _r("scores of a part of a text", "score score.yaml data.max_length=8", "data: max_length: a part of a text has no score"),
    _r("a message without content", SAMPLE, "prompts.jsonl:1: ", put("prompts.jsonl", {"prompt": [{"role": "user"}]})),
]
