"""The run file of a merge, in mergekit's format: the same YAML works for the methods that both programs have."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from fusemega.config import Section, read_yaml, validate
from fusemega.errors import UserError

DtypeName = Literal["float16", "bfloat16", "float32", "float64"]


class ModelEntry(Section):
    """One model to merge."""

    model: str = Field(
        description="Hugging Face folder, hub id, a folder made by `fusemega convert import`, or BASE+ADAPTER (LoRA)"
    )
    parameters: dict[str, Any] = Field({}, description="settings of this model; they override those of the run")


class MergeRun(Section):
    """A merge."""

    merge_method: str = Field(description="picks the method; see [`merge_method`](#merge_method)")
    base_model: str | None = Field(None, description="the model that deltas are computed against; not merged itself")
    models: list[ModelEntry] = Field(min_length=1, description="the models to merge")
    parameters: dict[str, Any] = Field(
        {}, description="the method's settings: values, gradients over the layers, or a list of filters"
    )
    dtype: DtypeName | None = Field(
        None, description="dtype of the written weights; default: the one that all models have"
    )
    vocabulary: Literal["crop", "pad", "position", "union"] | None = Field(
        None,
        description="what to do if vocabularies differ: crop (the base's rows), pad (the longest model's rows), "
        "position (match rows by position), union (match rows by token string)",
    )
    tokenizer_source: str | None = Field(
        None, description="the model whose tokenizer the output gets; default: the base, if it has all tokens"
    )
    chat_template: str | None = Field(
        None,
        description="chat template of the output: `auto` (the one that most models have), a model (to take its "
        "template), or the template itself; default: the base's, or the models' common template if "
        "the base has none",
    )
    seed: int = Field(0, ge=0, description="seed of random masks")
    max_shard_size: str = Field("5GB", description="largest size of a weight file")
    output_format: Literal["hf", "megatron"] = Field(
        "hf", description="a Hugging Face folder, or a Megatron folder as `fusemega convert import` writes it"
    )
    layer_range: tuple[int, int] | None = Field(None, description="from mergekit's slices; must be all layers")


def read_run(path: str | Path, overrides: Sequence[str] = ()) -> tuple[MergeRun, list[str]]:
    """A run file, and what to tell the user about how it was understood.

    Raises:
        UserError: any mistake in the file, or something of mergekit's that is not offered.
    """
    data, notes = from_mergekit(read_yaml(path, overrides), str(path))
    return validate(MergeRun, data, path), notes


def from_mergekit(data: dict[str, Any], source: str) -> tuple[dict[str, Any], list[str]]:
    """The run with mergekit's spellings replaced by ours, and notes on what is understood differently."""
    data, notes = dict(data), []
    if data.get("merge_method") == "sce":
        notes.append("sce is the FuseChat authors' form; what mergekit computes under that name is sce_mergekit")
    if str(data.get("merge_method", "")).startswith(("dare_", "della")):
        notes.append("what is kept is divided by its probability, as the paper does; mergekit matches L1 norms")
    if "modules" in data:
        raise UserError(f"{source}: modules: models of several modules are not supported")
    if "slices" in data:
        _from_slices(data, source)
    models = data["models"] if isinstance(data.get("models"), list) else []
    for holder in [data, *(entry for entry in models if isinstance(entry, dict))]:
        if isinstance(holder.get("parameters"), dict) and "int8_mask" in holder["parameters"]:
            holder["parameters"] = {k: v for k, v in holder["parameters"].items() if k != "int8_mask"}
            notes.append("int8_mask is mergekit's way to save memory; it has no meaning here")
        elif holder.get("parameters", ()) is None:
            del holder["parameters"]
    out_dtype = data.pop("out_dtype", None)
    if out_dtype is not None:
        data["dtype"] = out_dtype
        notes.append(f"sums are in float32 or wider whatever dtype says; weights are written in {out_dtype}")
    _tokenizer(data, source)
    return data, list(dict.fromkeys(notes))


def _from_slices(data: dict[str, Any], source: str) -> None:
    """Turns a single slice, of the same layers of each model, into a list of models."""
    slices = data.pop("slices")
    if not isinstance(slices, list) or len(slices) != 1 or not isinstance(slices[0], dict):
        raise UserError(f"{source}: slices: only one slice, of all layers of each model, can be merged")
    (only,) = slices
    sources = only.get("sources")
    if not isinstance(sources, list) or not sources or not all(isinstance(entry, dict) for entry in sources):
        raise UserError(f"{source}: slices.0.sources: expected a list of models, found {sources!r}")
    parameters = [data.get("parameters") or {}, only.get("parameters") or {}]
    if not all(isinstance(given, dict) for given in parameters):
        raise UserError(f"{source}: parameters: expected a mapping, found {parameters!r}")
    ranges = {str(entry.get("layer_range")) for entry in sources}
    if len(ranges) != 1:
        raise UserError(f"{source}: slices: the models' layer_range differ: {', '.join(sorted(ranges))}")
    data["layer_range"] = sources[0].get("layer_range")
    data["models"] = [{k: v for k, v in entry.items() if k != "layer_range"} for entry in sources]
    data["parameters"] = parameters[0] | parameters[1]
    data["base_model"] = only.get("base_model", data.get("base_model"))


def _tokenizer(data: dict[str, Any], source: str) -> None:
    section = data.pop("tokenizer", None)
    name = data.pop("tokenizer_source", None)
    if isinstance(section, dict):
        if section.keys() - {"source"}:
            raise UserError(f"{source}: tokenizer: only source is supported, found {', '.join(section)}")
        name = section.get("source")
    models = data["models"] if isinstance(data.get("models"), list) else []
    known = [entry.get("model") for entry in models if isinstance(entry, dict)]
    if name == "union":
        data.setdefault("vocabulary", "union")
    elif name == "base":
        data["tokenizer_source"] = data.get("base_model")
    elif name is not None and name not in (data.get("base_model"), *known):
        raise UserError(f"{source}: tokenizer_source: found {name!r}; allowed: base, union, or one of the models")
    elif name is not None:
        data["tokenizer_source"] = name
