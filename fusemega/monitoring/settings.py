"""`monitoring:` of a run file. Needs no torch."""

from __future__ import annotations

from datetime import timedelta
from typing import Literal

from pydantic import Field, model_validator

from fusemega.config import Section
from fusemega.monitoring.ranks import HANG_SECONDS, SILENT_SECONDS


class MonitoringSection(Section):
    """What is watched while a run runs, and what is said about it. None of it changes the result."""

    heartbeat_seconds: float | None = Field(
        5.0,
        ge=0.1,
        le=3600,
        description="seconds between the heartbeats that each rank writes into output_dir/monitor; null: none",
    )
    silent_seconds: float = Field(
        SILENT_SECONDS, gt=0, description="seconds without a heartbeat of a rank after which a warning names it"
    )
    hang_seconds: float = Field(
        HANG_SECONDS,
        gt=0,
        description="seconds without any movement of any rank after which a warning says where each of them is",
    )
    sample_seconds: float | None = Field(
        10.0,
        ge=0.1,
        le=3600,
        description="seconds between readings, for the metrics, of each rank's GPU by NVML, or of machine and process "
        "where there is none; null: none",
    )
    on_gpu_error: Literal["warn", "stop"] = Field(
        "warn",
        description="after the line that names an XID, a lost GPU or an uncorrected ECC error: go on (warn), or end "
        "the run after a checkpoint, as on a TERM (stop)",
    )
    straggler_interval: int | None = Field(
        20, ge=1, description="iterations between comparisons of the ranks' own times; null: none"
    )
    straggler_ratio: float = Field(
        1.3,
        gt=1,
        description="a rank that needs so many times the median of its peers for a token, in three comparisons in a "
        "row, is named",
    )
    spike_factor: float | None = Field(
        10.0,
        gt=0,
        description="how many usual deviations above its running median a loss or gradient norm is a spike; null: none "
        "is said",
    )
    collective_timeout_minutes: float = Field(
        30.0,
        gt=0,
        le=7 * 24 * 60,
        description="minutes after which a collective that a rank does not come to ends the run",
    )

    @model_validator(mode="after")
    def _silence_is_longer_than_a_beat(self) -> MonitoringSection:
        """silent_seconds must be at least twice heartbeat_seconds."""
        if self.heartbeat_seconds is not None and self.silent_seconds < 2 * self.heartbeat_seconds:
            raise ValueError(
                f"silent_seconds {self.silent_seconds:g} is less than twice heartbeat_seconds "
                f"{self.heartbeat_seconds:g}: every rank would seem to be silent"
            )
        return self

    @property
    def collective_timeout(self) -> timedelta:
        return timedelta(minutes=self.collective_timeout_minutes)
