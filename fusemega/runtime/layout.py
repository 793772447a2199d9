"""`parallel:` of a run file: the sizes of the parallel groups. Needs neither torch nor a process group."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, model_validator

from fusemega.config import Section
from fusemega.errors import UserError


class ParallelConfig(Section):
    """How the model is split over processes. The remaining factor of the processes is data parallel."""

    tensor_model_parallel_size: int = Field(
        1, ge=1, description="number of ranks over which each layer's matrices are split"
    )
    sequence_parallel: bool = Field(False, description="also split norms and residuals over the tensor-parallel ranks")
    context_parallel_size: int = Field(
        1, ge=1, description="number of ranks over which the tokens of each row are split"
    )
    expert_model_parallel_size: int = Field(
        1, ge=1, description="number of ranks over which the experts of each layer are dealt out"
    )
    expert_tensor_parallel_size: int | None = Field(
        None,
        ge=1,
        description="number of ranks over which the matrices of each expert are split; "
        "default: tensor_model_parallel_size",
    )
    moe_token_dispatcher_type: Literal["alltoall", "allgather"] = Field(
        "alltoall", description="how tokens reach the ranks of their experts; with allgather, all reach each"
    )
    pipeline_model_parallel_size: int = Field(1, ge=1, description="number of pipeline stages")
    virtual_pipeline_model_parallel_size: int | None = Field(
        None, ge=2, description="pieces of each stage in the interleaved schedule"
    )
    overlap_p2p_comm: bool = Field(
        False, description="interleaved schedule: overlap sends to the next stage with computation"
    )
    num_layers_in_first_pipeline_stage: int | None = Field(
        None, ge=1, description="number of layers in the first stage; default: an even share"
    )
    num_layers_in_last_pipeline_stage: int | None = Field(
        None, ge=1, description="number of layers in the last stage; default: an even share"
    )

    @model_validator(mode="after")
    def _sequence_parallel_needs_tp(self) -> ParallelConfig:
        """sequence_parallel needs a tensor_model_parallel_size of 2 or more."""
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            raise ValueError("sequence_parallel needs tensor_model_parallel_size of 2 or more")
        return self

    @model_validator(mode="after")
    def _stages_need_a_pipeline(self) -> ParallelConfig:
        """virtual_pipeline_model_parallel_size and num_layers_in_* need a pipeline_model_parallel_size of 2 or more."""
        for name in (
            "virtual_pipeline_model_parallel_size",
            "num_layers_in_first_pipeline_stage",
            "num_layers_in_last_pipeline_stage",
        ):
            if self.pipeline_model_parallel_size == 1 and getattr(self, name) is not None:
                raise ValueError(f"{name} needs pipeline_model_parallel_size of 2 or more")
        return self

    @model_validator(mode="after")
    def _two_stages_send_apart(self) -> ParallelConfig:
        """overlap_p2p_comm requires virtual_pipeline_model_parallel_size; with two stages the reverse also holds."""
        virtual = self.virtual_pipeline_model_parallel_size
        if self.overlap_p2p_comm and virtual is None:
            raise ValueError(
                "overlap_p2p_comm has no effect without virtual_pipeline_model_parallel_size; set that, or leave it out"
            )
        # Two stages are each other's previous and next. Batched sends and receives then pair up in posting order, and
        # silently deliver the wrong tensors (pipeline_parallel/p2p_communication.py:16).
        if virtual is not None and self.pipeline_model_parallel_size == 2 and not self.overlap_p2p_comm:
            raise ValueError(
                "virtual_pipeline_model_parallel_size with pipeline_model_parallel_size 2 needs overlap_p2p_comm: true "
                "(without it megatron-core gives wrong results), or at least 3 stages"
            )
        return self

    @property
    def expert_tp_size(self) -> int:
        """`expert_tensor_parallel_size`, or what it is by default."""
        return self.expert_tensor_parallel_size or self.tensor_model_parallel_size

    @property
    def replica_size(self) -> int:
        """Processes of one replica of all weights but experts."""
        return self.tensor_model_parallel_size * self.context_parallel_size * self.pipeline_model_parallel_size

    @property
    def model_parallel_size(self) -> int:
        """The least number of processes that hold the whole model; the world is a multiple of it.

        The ranks of expert parallelism are taken from those of tensor, context and data parallelism.
        """
        stages = self.pipeline_model_parallel_size
        return stages * math.lcm(self.replica_size // stages, self.expert_model_parallel_size * self.expert_tp_size)

    @property
    def segment_multiple(self) -> int:
        """Samples in a row are padded to a multiple of this: each context-parallel rank has two pieces of each."""
        return 2 * self.context_parallel_size if self.context_parallel_size > 1 else 1

    @property
    def micro_batch_multiple(self) -> int:
        """A step's micro-batches are a multiple of this: the interleaved schedule takes whole groups of PP."""
        return 1 if self.virtual_pipeline_model_parallel_size is None else self.pipeline_model_parallel_size

    @property
    def rows_alike(self) -> bool:
        """Whether the micro-batches that data-parallel ranks run at one time must have equally many tokens."""
        return self.expert_model_parallel_size > 1 and self.moe_token_dispatcher_type == "allgather"

    @property
    def activation_split(self) -> int:
        """Ranks that share the tokens of a micro-batch between attention layers."""
        return self.context_parallel_size * (self.tensor_model_parallel_size if self.sequence_parallel else 1)

    @property
    def row_unit(self) -> int:
        """A micro-batch's tokens are a multiple of this."""
        return math.lcm(self.segment_multiple, self.activation_split)

    def check_rows(self, seq_length: int, micro_batch_size: int, keys: tuple[str, str]) -> None:
        """Refuses rows that context and sequence parallelism cannot split evenly.

        Args:
            seq_length, micro_batch_size: tokens of a row, rows of a micro-batch.
            keys: what the run file calls them.

        Raises:
            ValueError: pydantic makes it the run file's error.
        """
        if seq_length % self.segment_multiple:
            raise ValueError(
                f"{keys[0]} = {seq_length} is not a multiple of {self.segment_multiple} = 2 x context_parallel_size, "
                "which context parallelism needs"
            )
        tokens = seq_length * micro_batch_size
        if tokens % self.activation_split:
            ranks = f"tensor_model_parallel_size {self.tensor_model_parallel_size}"
            if self.context_parallel_size > 1:
                ranks += f" x context_parallel_size {self.context_parallel_size}"
            raise ValueError(
                f"{' x '.join(keys)} = {tokens} is not a multiple of {ranks}, which sequence_parallel needs"
            )

    def data_parallel_size(self, world_size: int) -> int:
        """World size over TP x CP x PP.

        Raises:
            UserError: the world does not divide.
        """
        for product in (
            {
                name: getattr(self, name)
                for name in ("tensor_model_parallel_size", "context_parallel_size", "pipeline_model_parallel_size")
            },
            {
                "expert_model_parallel_size": self.expert_model_parallel_size,
                "expert_tensor_parallel_size": self.expert_tp_size,
                "pipeline_model_parallel_size": self.pipeline_model_parallel_size,
            },
        ):
            size = math.prod(product.values())
            if world_size % size:
                raise UserError(
                    f"parallel: {' x '.join(f'{name} {factor}' for name, factor in product.items())} = {size} "
                    f"does not divide the {world_size} process(es) of this run; start a multiple of "
                    f"{self.model_parallel_size} (--nproc)"
                )
        return world_size // self.replica_size

    def __str__(self) -> str:
        """Such as "TP 2 SP x CP 2 x EP 2 x PP 2 (x 2 virtual)"; an expert TP of its own follows EP."""
        tp = f"TP {self.tensor_model_parallel_size}{' SP' if self.sequence_parallel else ''}"
        cp = f" x CP {self.context_parallel_size}" if self.context_parallel_size > 1 else ""
        virtual = self.virtual_pipeline_model_parallel_size
        pp = f" x PP {self.pipeline_model_parallel_size}" + (f" (x {virtual} virtual)" if virtual else "")
        ep = f" x EP {self.expert_model_parallel_size}" if self.expert_model_parallel_size > 1 else ""
        if self.expert_tp_size != self.tensor_model_parallel_size:
            ep += f" x ETP {self.expert_tp_size}"
        return tp + cp + ep + pp
