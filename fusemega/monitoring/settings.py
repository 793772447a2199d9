"""`monitoring:` of a run file. Needs no torch."""

from __future__ import annotations

from datetime import timedelta

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
