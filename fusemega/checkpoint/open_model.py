"""`model:` of a run file: a Hugging Face folder, a hub id or an imported Megatron folder, opened and filled."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from fusemega.checkpoint.check import check_tensors, is_megatron_folder
from fusemega.checkpoint.convert import MegatronFolder
from fusemega.checkpoint.hf_folder import HFFolder
from fusemega.checkpoint.hf_load import load_hf
from fusemega.checkpoint.hub import resolve
from fusemega.config import Section
from fusemega.models.build import GPT, build_model, check_layout
from fusemega.runtime.parallel import ParallelConfig, World
from fusemega.text.tokenizer import Tokenizer

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class ModelConfig(Section):
    """Which weights, and the precision they are computed in."""

    load: str = Field(description="Hugging Face folder or hub id, or a folder made by `fusemega convert import`")
    dtype: Literal["bf16", "fp32"] = Field("bf16", description="of parameters and activations; gradients are fp32")
    trust_remote_code: bool = Field(False, description="let the tokenizer's folder bring its own Python code")


class ModelSource:
    """A checked model: nothing is allocated until `build`.

    Attributes:
        hf: the folder with the configuration and the tokenizer (and, for Hugging Face folders, the weights).
        hf_config: its `config.json`.
        tokenizer: the folder's.
        vocab_size: the model's, without padding.

    Raises:
        UserError: the folder is damaged, of an unknown architecture, or the layout does not divide it or
            the world; no tokenizer.
    """

    def __init__(self, config: ModelConfig, parallel: ParallelConfig, world_size: int) -> None:
        parallel.data_parallel_size(world_size)
        folder = resolve(config.load)
        self.dtype = DTYPES[config.dtype]
        self._source: MegatronFolder | HFFolder
        if is_megatron_folder(folder):
            self._source = MegatronFolder(folder)
            self.hf = self._source.hf
        else:
            self._source = HFFolder(folder)
            check_tensors(self._source, self._source.config)
            self.hf = folder
        self.hf_config = self._source.config
        check_layout(self.hf_config, parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size)
        self.tokenizer = Tokenizer.load(self.hf, trust_remote_code=config.trust_remote_code)
        self.vocab_size = int(self.hf_config["vocab_size"])

    def weights_hash(self) -> str:
        """Hex digest of configuration and weights, the same for a folder and its import. Reads all weights once."""
        if isinstance(self._source, MegatronFolder):
            return str(self._source.manifest["source_hash"])
        return self._source.content_hash()

    def build(self, world: World) -> GPT:
        """This rank's part of the model, with its weights. Collective."""
        if isinstance(self._source, MegatronFolder):
            return self._source.load(world, self.dtype)
        model = build_model(self.hf_config, world, self.dtype)
        load_hf(model, self.hf, world)
        return model
