"""Files that are not what their reader expects: bombs, odd types, absurd numbers, and what is no file at all."""

from __future__ import annotations

import zipfile

from tests.bad_inputs.damage import (
    ABSENT,
    Damage,
    entry,
    fifo,
    flip,
    folder,
    gone,
    header,
    key,
    mapped,
    put,
    rows,
    sealed,
    swap,
)
from tests.bad_inputs.run import Bad, kind

TRAIN, DISTILL, RESUME, REPORT = "train train.yaml", "train distill.yaml", "train resume.yaml", "report run"
EXPORT, VERIFY = "convert export megatron out", "store verify store"
CONFIG, SAFE, TOKENIZER = "model/config.json", "model/model.safetensors", "model/tokenizer.json"
SETTINGS, INDEX = "model/tokenizer_config.json", "sharded/model.safetensors.index.json"
NEWEST, METRICS, NORM = "run/checkpoints/iter_0000002", "run/metrics.jsonl", "model.norm.weight"
TRACKER = "run/checkpoints/latest_checkpointed_iteration.txt"
DEEP, LONG = "[" * 100_000, "1" * 5000
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9)
)
MERGES = "a0: &a0 {k: v}\n" + "".join(f"a{i}: &a{i}\n  <<: [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9))
REFERENCES = "a0: xxxxxxxxxx\n" + "".join(f"a{i}: {f'${{a{i - 1}}}' * 9}\n" for i in range(1, 30))
# {t: 1} of t(0) = (), t(i + 1) = (t(i), t(i)), t = t(59)
ENDLESS = b"\x80\x04})\x94" + b"".join(b"h%c\x86\x94" % i for i in range(59)) + b"K\x01s."
ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}

_c, _m, _w, _i = kind("configuration"), kind("model configuration"), kind("weights"), kind("index")
_t, _d, _s, _k = kind("tokenizer"), kind("data"), kind("store"), kind("checkpoint")
_r, _a = kind("report"), kind("alignment")


def _run(text: str) -> Damage:
    return put("train.yaml", text)


def _zeros(size: int) -> Damage:
    """map.npz with a table of so many zeros, packed a thousand times smaller."""

    def do() -> None:
        with zipfile.ZipFile("map.npz", "w", zipfile.ZIP_DEFLATED) as archive, archive.open("facts.npy", "w") as file:
            for _ in range(size >> 20):
                file.write(bytes(1 << 20))

    return do


# fmt: off
TABLE: list[Bad] = [
    # Run files.
    _c("a list for a key", TRAIN, "train.yaml:1: malformed YAML: a key is a word, found a list", _run("? [a, b]\n: 1")),
    _c("yes for a key", TRAIN, "train.yaml:1: malformed YAML: a key is a word, found 'on'", _run("on: 1")),
    _c("a tag that lies, int", TRAIN, "train.yaml:1: malformed YAML: 'abc' is not an integer, as its tag says", _run("x: !!int abc")),
    _c("a tag that lies, float", TRAIN, "'abc' is not a number, as its tag says", _run("x: !!float abc")),
    _c("a tag that lies, bool", TRAIN, "'maybe' is not yes or no, as its tag says", _run("x: !!bool maybe")),
    _c("a date by tag", TRAIN, "the tag 'tag:yaml.org,2002:timestamp' means nothing here", _run("x: !!timestamp foo")),
    _c("a set", TRAIN, "means nothing here", _run("x: !!set {a, b}")),
    _c("a date that is none", TRAIN, "x: unknown key", _run("x: 2020-99-99")),
    _c("a number of 5,000 digits", TRAIN, "train.yaml:1: malformed YAML: a number of 5000 digits; allowed: 20", _run(f"x: {LONG}")),
    _c("a number of 65 bits", TRAIN + " training.seed=18446744073709551616", "is not a 64-bit integer"),
    _c("an override of 5,000 digits", f"{TRAIN} training.seed={LONG}", "a number of 5000 digits; allowed: 20"),
    _c("a number beyond all", TRAIN + " optimizer.lr=1e400", "'1e400' is larger than any number of 64 bits"),
    _c("an override inside a list", TRAIN + " data.path=[a] data.path.0=b", "a key inside a list; give the whole list"),
    _c("a bomb of aliases", TRAIN, "has more than 100000 values, with aliases or without", _run(BOMB)),
    _c("a bomb of merged mappings", TRAIN, "train.yaml:", _run(MERGES + "<<: *a8\n")),
    _c("a bomb of references", TRAIN, "train.yaml: a", _run(REFERENCES)),
    _c("a reference to itself", TRAIN, "train.yaml: a: ${b} refers to itself", _run("a: ${b}\nb: x${a}\n")),
    _c("a reference to the environment", TRAIN + " 'output_dir=${oc.env:HOME}'", "only ${section.key}, another value of the file"),
    _c("a reference in a reference", TRAIN + " 'output_dir=${a.${b}}'", "a reference is ${section.key}, with no other inside"),
    _c("a mapping inside a text", TRAIN + " 'output_dir=x${model}'", "which cannot be part of a text"),
    _c("a NUL in a name", TRAIN + ' \'output_dir="a\\0b"\'', "a text with the character U+0000, which none may have"),
    _c("a name that moves the cursor", TRAIN + ' \'output_dir="a\\e[2J"\'', "a text with the character U+001B"),
    _c("half a character", TRAIN + ' \'output_dir="\\ud800"\'', "override"),
    _c("a name of 300 characters", f"{TRAIN} output_dir={'o' * 300}", "ooo: File name too long"),
    _c("a FIFO", TRAIN, "train.yaml: cannot read the run file: a FIFO, not a regular file", fifo("train.yaml")),
    _c("a device", "train /dev/zero", "/dev/zero: cannot read the run file: a device, not a regular file"),
    _c("rows by the billion", "teach teach.yaml micro_batch_size=1000000000", "micro_batch_size: Input should be less than or equal to 65536"),
    _c("larger than any", TRAIN, "train.yaml: 300000 bytes; allowed: 262144", _run("#" * 300_000)),
    _c("too deep", TRAIN, "train.yaml: malformed YAML: nested too deeply", _run("[" * 2000)),
    _c("a merge's slices of a number", "merge m.yaml out", "slices.0.sources: expected a list of models, found 5", put("m.yaml", "merge_method: linear\nslices: [{sources: 5}]")),
    _c("a merge by weights beyond all", "merge out --method linear --models model sharded --weights 1e308 1e308", "normalize takes numbers below 1e100"),
    _c("a merge of a number", "merge m.yaml out", "m.yaml: models: ", put("m.yaml", "merge_method: linear\nmodels: 5")),
    _c("a merge into the current folder", "merge . --method linear --models model sharded", ".: is the current folder or a parent of it"),
    # The model's configuration.
    _m("layers without number", TRAIN, "num_hidden_layers = 1" + "0" * 30 + " is more than any model has; allowed: 10000", key(CONFIG, "num_hidden_layers", 10**30)),
    _m("layers by the million", TRAIN, "num_hidden_layers = 1000000 is more than any model has", key(CONFIG, "num_hidden_layers", 10**6)),
    _m("a head of gigabytes", TRAIN, "head_dim = 4294967296 is more than any model has", key(CONFIG, "head_dim", 1 << 32)),
    _m("heads that are true", TRAIN, "num_attention_heads = True, expected a positive integer", key(CONFIG, "num_attention_heads", True)),
    _m("an infinite epsilon", TRAIN, "Infinity is not a finite number", key(CONFIG, "rms_norm_eps", float("inf"))),
    _m("an epsilon of two", TRAIN, "rms_norm_eps = 2.0, expected a positive number below 1", key(CONFIG, "rms_norm_eps", 2.0)),
    _m("an epsilon that is no number", TRAIN, "NaN is not a finite number", key(CONFIG, "rms_norm_eps", float("nan"))),
    _m("positions that do not turn", TRAIN, "rope_theta = 0, expected a positive number", key(CONFIG, "rope_parameters", ABSENT), key(CONFIG, "rope_theta", 0)),
    _m("positions of 1e400", TRAIN, "model/config.json: malformed JSON: 1e400 is not a finite number", swap(CONFIG, b'"rope_theta": 10000.0', b'"rope_theta": 1e400')),
    _m("positions of 1e30", TRAIN, "rope_theta = 1e+30, expected a positive number below 1e+18", key(CONFIG, "rope_parameters/rope_theta", 1e30)),
    _m("frequencies in disorder", TRAIN, "low_freq_factor = 1.0 is not below high_freq_factor = 1.0", key(CONFIG, "rope_parameters", ROPE | {"high_freq_factor": 1.0})),
    _m("an end that is true", TRAIN, "eos_token_id = True, expected a token's id", key(CONFIG, "eos_token_id", True)),
    _m("a key twice", TRAIN, "model/config.json: malformed JSON: the key 'hidden_size' occurs twice", swap(CONFIG, b'"hidden_size"', b'"hidden_size": 1, "hidden_size"')),
    _m("a hundred levels", TRAIN, "nested too deeply; allowed: 100 levels", swap(CONFIG, b'"hidden_size"', b'"x": ' + b"[" * 101 + b"]" * 101 + b', "hidden_size"')),
    _m("a number of 5,000 digits", TRAIN, "an integer of 5000 digits; allowed: 40", put(CONFIG, '{"hidden_size": ' + LONG + "}")),
    _m("a FIFO", TRAIN, "model/config.json: a FIFO, not a regular file", fifo(CONFIG)),
    # Weights.
    _w("a FIFO", TRAIN, "model.safetensors: a FIFO, not a regular file", fifo(SAFE)),
    _w("a shape of no file", TRAIN, "corrupt header", header(SAFE, lambda h: h[NORM].update(shape=[1 << 62, 1 << 62]))),
    _w("a shape below nothing", TRAIN, "corrupt header", header(SAFE, lambda h: h[NORM].update(shape=[-32, -1]))),
    _w("a shape that is true", TRAIN, "corrupt header", header(SAFE, lambda h: h[NORM].update(shape=[True, 32]))),
    _w("a shape that is a word", TRAIN, "corrupt header", header(SAFE, lambda h: h[NORM].update(shape="32"))),
    _w("a name that moves the cursor", TRAIN, r"\x1b[2J", header(SAFE, lambda h: h.update({"\x1b[2J": {"shape": [1]}}))),
    _i("a file outside, by a link's name", TRAIN + " model.load=sharded", "names a file outside the folder: './/x'", key(INDEX, f"weight_map/{NORM}", ".//x")),
    _i("a file with a NUL", TRAIN + " model.load=sharded", r"names a file outside the folder: 'a\x00b'", key(INDEX, f"weight_map/{NORM}", "a\0b")),
    _i("a file of 300 characters", TRAIN + " model.load=sharded", "names a file outside the folder", key(INDEX, f"weight_map/{NORM}", "x" * 300)),
    # Tokenizers.
    _t("a FIFO", TRAIN, "model/tokenizer.json: a FIFO, not a regular file", fifo(TOKENIZER)),
    _t("an id of gigabytes", TRAIN, "model: cannot load a tokenizer: model/tokenizer.json: the id 4000000000 of a token; allowed: 0 to 33554431", key(TOKENIZER, "model/vocab/a", 4_000_000_000)),
    _t("an added id of gigabytes", TRAIN, "the id 4000000000 of a token", key(TOKENIZER, "added_tokens", [{"id": 4_000_000_000, "content": "x"}])),
    _t("too deep", TRAIN, "model: cannot load a tokenizer: model/tokenizer.json: malformed JSON: nested too deeply", put(TOKENIZER, DEEP)),
    _t("settings too deep", TRAIN, "model: cannot load a tokenizer: model/tokenizer_config.json", put(SETTINGS, '{"a":' + DEEP)),
    _t("without its unknown token", TRAIN, "model: cannot load a tokenizer: WordPiece error", key(TOKENIZER, "model", {"type": "WordPiece", "vocab": {"b": 0}, "unk_token": "[UNK]", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100}), key(TOKENIZER, "added_tokens", []), put(SETTINGS, {"tokenizer_class": "PreTrainedTokenizerFast"})),
    _t("a model that panics", TRAIN, "model: cannot load a tokenizer: the tokenizers library broke down: range end index", key(TOKENIZER, "model/continuing_subword_prefix", "x" * 90)),
    _t("an added token without id", "merge out --method linear --models model sharded --vocabulary union --dry-run", "sharded/tokenizer.json: the id None of a token", key("sharded/tokenizer.json", "added_tokens", [{"content": "x"}])),
    _t("an added token without text", "align model sharded new.npz", "{'id': 3} is not an added token", key("sharded/tokenizer.json", "added_tokens", [{"id": 3}])),
    # Rows.
    _d("a FIFO", TRAIN, "data.jsonl: cannot read: a FIFO, not a regular file", fifo("data.jsonl")),
    _d("a FIFO among files", TRAIN + " 'data.path=[\"*.jsonl\"]'", "x.jsonl: cannot read: a FIFO, not a regular file", fifo("x.jsonl")),
    _d("an array with a mark, torn", TRAIN + " data.path=a.json", "a.json:1: malformed JSON", put("a.json", b"\xef\xbb\xbf [{},")),
    _d("an array of texts", TRAIN + " data.path=a.json", "a.json:1: a row is an object, found a string", put("a.json", '\n ["a"]')),
    _d("a key twice", TRAIN, "data.jsonl:2: malformed JSON: the key 'text' occurs twice", rows('{"text": "a", "text": "b"}')),
    _d("a row of 200 levels", TRAIN, "data.jsonl:2: malformed JSON: nested too deeply", rows('{"text": ' + "[" * 200 + "]" * 200 + "}")),
    # Stores with sound checksums.
    _s("no positions", DISTILL, "damaged shard: the row of sample", entry(positions=0)),
    _s("positions below nothing", DISTILL, "damaged shard: the row of sample", entry(positions=-5)),
    _s("positions by the billion", DISTILL, "damaged shard: the row of sample", entry(positions=2**31 - 1)),
    _s("one position more", DISTILL, "damaged shard: the row of sample", entry(positions=500)),
    _s("a row from nowhere", DISTILL, "damaged shard: the row of sample", entry(begin=-8)),
    _s("bytes below nothing", VERIFY, "damaged shard: the row of sample", entry(num_bytes=-1)),
    _s("a log-prob that is no number", "store inspect store", "'sum_logp': nan", entry(sum_logp=float("nan"))),
    _s("nothing scored", "store inspect store", "damaged shard: the row of sample", entry(num_scored=0)),
    _s("more ids than the vocabulary", DISTILL, "top_k: 301 is more than the vocabulary of 300", key("store/manifest.json", "top_k", 301)),
    _s("its manifest too deep", "store inspect store", "store/manifest.json: malformed JSON: nested too deeply", put("store/manifest.json", DEEP)),
    _s("its manifest a list", "store inspect store", "store/manifest.json: expected a JSON object, found a list", put("store/manifest.json", [])),
    _s("a FIFO for a shard", DISTILL, "shard-00000-000000.bin: cannot read: a FIFO", fifo("store/shard-00000-000000.bin")),
    # Vocabulary maps.
    _a("a map of too many ids", "train fuse.yaml", "damaged vocabulary map: target_size is 1000000000; allowed: 1 to 33554432", mapped("map.npz", target_size=10**9)),
    _a("a map that unpacks to gigabytes", "train fuse.yaml", "map.npz: not a vocabulary map, or a damaged one", _zeros(16 << 20)),
    _a("a FIFO for a map", "train fuse.yaml", "map.npz: cannot read the vocabulary map: a FIFO", fifo("map.npz")),
    # Reports, and what a run that resumes reads of itself.
    _r("a line too deep", REPORT, "run/metrics.jsonl:1: malformed JSON: nested too deeply", put(METRICS, DEEP + "\n")),
    _r("a number of 400 digits", REPORT, "run/metrics.jsonl:1: malformed JSON: an integer of 400 digits", put(METRICS, '{"iteration": 1, "lm loss": ' + "1" * 400 + "}\n")),
    _r("a metric that is a formula", REPORT, "run/metrics.jsonl:1: a metric named '$", put(METRICS, '{"iteration": 1, "$\\\\frac{$": 1.0}\n')),
    _r("a metric that moves the cursor", REPORT, r"a metric named '\x1b[2J'", put(METRICS, '{"iteration": 1, "\\u001b[2J": 1.0}\n')),
    _r("an iteration that is true", REPORT, "run/metrics.jsonl:1: not a row of metrics", put(METRICS, '{"iteration": true}\n')),
    _r("an evaluation without loss", REPORT, "the row of iteration 1 has no loss", put("run/evaluations.jsonl", '{"iteration": 1}\n')),
    _r("a FIFO for its record", REPORT, "run: not the folder of a training run (no run.json)", fifo("run/run.json")),
    _r("a path that moves the cursor", "report '\x1b[2J'", r"\x1b[2J: no such folder of a training run"),
    _k("metrics too deep", RESUME, "run/metrics.jsonl:1: malformed JSON: nested too deeply", gone("run/done"), put(METRICS, DEEP + "\n")),
    _k("metrics of nothing", RESUME, "run/metrics.jsonl:1: the row has no iteration", gone("run/done"), put(METRICS, "{}\n")),
    _k("the tracker of 5,000 digits", RESUME, "latest_checkpointed_iteration.txt: 5000 bytes; allowed: 1024", put(TRACKER, LONG)),
    _k("a FIFO for the tracker", RESUME, "latest_checkpointed_iteration.txt: cannot read: a FIFO", fifo(TRACKER)),
    _k("integrity too deep", RESUME, "integrity.json: malformed JSON: nested too deeply", put(NEWEST + "/integrity.json", DEEP)),
    _k("integrity of infinity", RESUME, "Infinity is not a finite number", put(NEWEST + "/integrity.json", '{"format": "fusemega-integrity-1", "files": {"state.json": {"size": Infinity, "xxh3_128": "x"}}}')),
    _k("integrity of a NUL", RESUME, r"names a file outside the folder: 'a\x00b'", put(NEWEST + "/integrity.json", {"format": "fusemega-integrity-1", "files": {"a\0b": {"size": 1, "xxh3_128": "x"}}})),
    _k("integrity without sizes", RESUME, "it has no size or no hash of state.json", put(NEWEST + "/integrity.json", {"format": "fusemega-integrity-1", "files": {"state.json": 3}})),
    _k("a FIFO that integrity lists", RESUME, "state.json: listed in integrity.json, but not a regular file", fifo(NEWEST + "/state.json")),
    _k("an import's journal of junk", "convert import model out --resume --workers 1", ".out.incomplete/journal.jsonl:1: malformed JSON", folder(".out.incomplete/out"), put(".out.incomplete/.fusemega", "temporary, of fusemega\n"), put(".out.incomplete/journal.jsonl", "junk\n")),
    _k("an import whose source is a path", "merge out --method linear --models megatron model", "source_hash is '../../x', expected 32 hex digits", key("megatron/manifest.json", "source_hash", "../../x")),
    _k("a state without its best", RESUME, "state.json: its best is None; expected data, loss, iteration", gone("run/done"), key(NEWEST + "/state.json", "best"), sealed(NEWEST)),
    _k("a state of no number", RESUME, "best.loss is 'low', which is not a value that a run writes", gone("run/done"), key(NEWEST + "/state.json", "best/loss", "low"), sealed(NEWEST)),
    _k("a state of no layout", RESUME, "state.json: its layout is 3, which is not a value that a run writes", gone("run/done"), key(NEWEST + "/state.json", "layout", 3), sealed(NEWEST)),
    _k("a state of an iteration that is true", RESUME, "state.json: iteration is True, expected a number", key(NEWEST + "/state.json", "iteration", True), sealed(NEWEST)),
    _k("an index whose hash takes for ever", RESUME, ".metadata: not an index of a torch_dist checkpoint: a tuple as a key", gone("run/done"), put(NEWEST + "/.metadata", ENDLESS), sealed(NEWEST)),
    _k("an index that asks for gigabytes", RESUME, "place 4294967295 of a memo", gone("run/done"), put(NEWEST + "/.metadata", b"\x80\x02]r\xff\xff\xff\xff."), sealed(NEWEST)),
    _k("an index that names a file outside", EXPORT, "damaged: no file of the folder", swap("megatron/weights/.metadata", b"__0_0.distcp", b"../../x/y..x"), sealed("megatron")),
    _k("an import's FIFO", EXPORT, "megatron/hf/config.json: cannot read: a FIFO", fifo("megatron/hf/config.json")),
    _k("an import's index, flipped", EXPORT, "megatron/weights/.metadata: damaged: its hash differs from the one", flip("megatron/weights/.metadata", 0)),
]
