"""`model:` of a run file: a Hugging Face folder, a hub id or an imported Megatron folder, opened and filled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from pydantic import Field

from fusemega.checkpoint.megatron_folder import MegatronFolder, RunCheckpoint, is_megatron_folder, open_megatron
from fusemega.checkpoint.read_plan import RankReads, plan_reads
from fusemega.errors import UserError
from fusemega.hf.check import check_tensors
from fusemega.hf.folder import HFFolder
from fusemega.hf.hub import resolve
from fusemega.hf.load import load_hf
from fusemega.hf.new_score import NewScore
from fusemega.hf.proof import check_written
from fusemega.models.build import GPT, build_model
from fusemega.models.heads import REWARD, HeadKind
from fusemega.models.stages import check_layout, layers_of_stages
from fusemega.runtime.console import global_rank, phase, say
from fusemega.runtime.parallel import ParallelConfig, World
from fusemega.runtime.precision import Precision
from fusemega.runtime.shared_prompts import sharing_problem
from fusemega.runtime.together import on_main
from fusemega.text.tokenizer import Tokenizer

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class ModelConfig(Precision):
    """The weights, and the precision of the computation."""

    load: str = Field(
        description="Hugging Face folder or hub id, a folder made by `fusemega convert import`, or a run's checkpoint "
        "(of a run's folder, the newest)"
    )
    trust_remote_code: bool = Field(False, description="let the tokenizer's folder bring its own Python code")


class ModelSource:
    """A checked model: nothing is allocated until `build`.

    Args:
        chat_template: a file used in place of the tokenizer's template.
        heads: the kinds of head that are accepted.
        new_score: seed of the scalar head that a language model's folder gets, where "scalar" is accepted; None: such a
            folder is refused.

    Attributes:
        config: the section it was opened from.
        hf: the folder with the configuration and the tokenizer (and, for Hugging Face folders, the weights).
        architecture: what its `config.json` says of the model.
        hf_config: the content of that `config.json`.
        tokenizer: the folder's.
        vocab_size: the model's, without padding.
        chunk_sizes: the numbers of layers that pipeline stages, or their virtual stages, have.
        pad_id: id that fills up rows, below `vocab_size`; nothing is computed from it.
        unscored_id: of a reward model, the id that it takes for padding, before which it reads a text's score; or None.

    Raises:
        UserError: the folder is damaged, of an unknown architecture, or with another head; the layout does not divide
            it or the world; no tokenizer; FP8 or Transformer Engine is requested and not available; sliding windows
            or capped attention scores under context parallelism and Transformer Engine.
    """

    def __init__(
        self,
        config: ModelConfig,
        parallel: ParallelConfig,
        world_size: int,
        chat_template: str | None = None,
        heads: Sequence[HeadKind] = ("vocabulary",),
        new_score: int | None = None,
    ) -> None:
        parallel.data_parallel_size(world_size)
        self.config = config
        self._parallel = parallel
        self.dtype = DTYPES[config.dtype]
        self._source = _opened(config.load)
        tokenizer = None
        if new_score is not None and "scalar" in heads and self._source.architecture.head == "vocabulary":
            tokenizer = self._tokenizer()
            self._source = self._with_new_score(new_score, tokenizer)
        self.hf = self._source.hf if isinstance(self._source, MegatronFolder) else self._source.path
        self.architecture = self._source.architecture
        self.architecture.require_head(heads, str(self.hf))
        self.hf_config = self._source.config
        check_layout(self.architecture, parallel)
        layers = self.architecture.transformer_config
        config.check_layers(layers, parallel)
        self.chunk_sizes = {len(chunk) for stage in layers_of_stages(self.architecture, parallel) for chunk in stage}
        self.kernels = config.kernels()
        if parallel.context_parallel_size > 1 and self.kernels.transformer_engine:
            capped = self.architecture.attention_softcap is not None
            if capped or layers.get("window_size"):
                found = "capped attention scores" if capped else "sliding windows"
                raise UserError(
                    f"parallel.context_parallel_size: {parallel.context_parallel_size} is not supported here: this "
                    f"model has {found}, and Transformer Engine's ring attention has none; allowed: 1, or "
                    "model.transformer_impl: local"
                )
        self.tokenizer = (tokenizer or self._tokenizer()).with_template(chat_template)
        self.vocab_size = self.architecture.vocab_size
        # A pad token added to the tokenizer alone is common, and the model has no row for it.
        self.pad_id = self.tokenizer.pad_id if self.tokenizer.pad_id < self.vocab_size else 0
        self.unscored_id: int | None = self.hf_config.get("pad_token_id") if self.architecture.head in REWARD else None

    def _tokenizer(self) -> Tokenizer:
        hf = self._source.hf if isinstance(self._source, MegatronFolder) else self._source.path
        return Tokenizer.load(hf, trust_remote_code=self.config.trust_remote_code)

    def _with_new_score(self, seed: int, tokenizer: Tokenizer) -> NewScore:
        """The folder of a language model with a scalar head; says so once."""
        if isinstance(self._source, MegatronFolder):
            raise UserError(
                f"{self.config.load}: a language model without a score; a new one is made only for a Hugging Face "
                "folder; use the run's hf/, or `fusemega convert export` first"
            )
        made = NewScore(self._source.path, seed, tokenizer)
        if global_rank() == 0:
            say(
                f"{self.config.load}: a language model; its head is replaced by a new score.weight, drawn from the seed"
            )
        return made

    def check_sharing(self, key: str, seq_length: int) -> None:
        """Refuses rows with shared prompts where this model cannot run them.

        Args:
            key: of the run file, for the message.
            seq_length: the most tokens of a text.

        Raises:
            UserError: says why, and what is allowed.
        """
        if self.architecture.attention_softcap is not None:
            return  # such scores are computed in one way on every machine
        head_size = self.architecture.transformer_config["kv_channels"]
        problem = sharing_problem(self._parallel, bool(self.kernels.fp8), head_size)
        if problem is not None:
            raise UserError(f"{key}: cannot be true here: {problem}")
        rope = self.architecture.text_rope()
        if rope is not None and rope.same_up_to is not None and seq_length > rope.same_up_to:
            raise UserError(
                f"{key}: cannot be true here: this model's rotary positions depend on the length of a text beyond "
                f"{rope.same_up_to} tokens, so a short and a long response have different keys of one prompt; allowed: "
                f"false, or data.seq_length up to {rope.same_up_to}"
            )

    def weights_hash(self) -> str:
        """See `weights_hash`."""
        return _hash_of(self._source)

    def dtypes(self) -> dict[str, torch.dtype]:
        """The type of each tensor of the Hugging Face folder that the weights come from."""
        if isinstance(self._source, MegatronFolder):
            return self._source.dtypes
        return {name: self._source.dtype(name) for name in self._source}

    @property
    def folder(self) -> MegatronFolder | HFFolder:
        """The open folder of the weights."""
        return self._source

    def note_length(self, seq_length: int) -> None:
        """Tells the user if samples can be longer than the texts that the model was trained on.

        It is no error, because every family here has rope, which computes any position.
        """
        longest = self.architecture.family.longest_text(self.hf_config)
        if seq_length > longest:
            say(
                f"{self.config.load}: data.seq_length is {seq_length}, and the model was trained on texts of up "
                f"to {longest} tokens only (max_position_embeddings, with rope scaling)"
            )

    def plan_reads(self) -> list[RankReads]:
        """What each model-parallel rank would read of the weights. Reads none of them."""
        return plan_reads(self._source, self._parallel)

    def build(self, world: World, recompute: Mapping[str, Any] = MappingProxyType({})) -> GPT:
        """This rank's part of the model, with its weights. Collective. Arguments as in `build_model`."""
        with phase(f"{self.config.load} is built and its weights are read"):
            if isinstance(self._source, MegatronFolder):
                return self._source.load(world, self.dtype, self.kernels, recompute)
            source = self._source
            on_main(world, lambda: check_written(source))
            model = build_model(self.architecture, world, self.dtype, self.kernels, recompute)
            load_hf(model, source, world)
            return model


def weights_hash(load: str) -> str:
    """Hex digest of configuration and weights, the same for a folder and its import. Reads all weights once.

    Args:
        load: as `ModelConfig.load`.

    Raises:
        UserError: no such folder, or a damaged one.
    """
    return _hash_of(_opened(load))


def _opened(load: str) -> MegatronFolder | HFFolder:
    folder = resolve(load)
    if is_megatron_folder(folder):
        opened = open_megatron(folder)
        if isinstance(opened, RunCheckpoint) and opened.path != folder and global_rank() == 0:
            say(f"{load}: a run; using its newest checkpoint, of iteration {opened.iteration}")
        return opened
    source = HFFolder(folder)
    check_tensors(source)
    return source


def _hash_of(source: MegatronFolder | HFFolder) -> str:
    return source.content_hash if isinstance(source, MegatronFolder) else source.content_hash()
