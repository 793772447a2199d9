"""Weights & Biases, where a run file asks for it (`training.wandb_project`). The package is the user's to install."""

from __future__ import annotations

import importlib.util
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fusemega.errors import UserError
from fusemega.files.output import write_durably

_ID_FILE = "wandb_id"


def require_wandb() -> None:
    """Refuses, before anything is allocated, a run that asks for W&B where it is not installed.

    Raises:
        UserError: says how to install it.
    """
    if importlib.util.find_spec("wandb") is None:
        raise UserError(
            "training.wandb_project: the package wandb is not installed; pip install wandb, or leave the key out"
        )


class WandbRun:
    """The run at W&B of a run's folder. Its id is kept in the folder, so that a resumed training goes on in it.

    Only the main process holds one. WANDB_MODE, WANDB_API_KEY and wandb's other variables are obeyed.

    Args:
        project: the project at W&B.
        folder: the run's output folder; its name is the run's, and wandb's files go to `folder/wandb`.
        settings: the run file's, shown beside the curves.

    Raises:
        UserError: wandb refuses (no key, no network).
    """

    def __init__(self, project: str, folder: Path, settings: Mapping[str, Any]) -> None:
        import wandb

        id_file = folder / _ID_FILE
        if not id_file.exists():
            write_durably(id_file, secrets.token_hex(8))
        try:
            self._run = wandb.init(
                project=project,
                dir=str(folder),
                id=id_file.read_text(encoding="utf-8").strip(),
                name=folder.resolve().name,
                config=dict(settings),
                resume="allow",
            )
        except wandb.Error as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"training.wandb_project: {reason} (WANDB_MODE=offline logs to {folder}/wandb)") from None
        # W&B's own step may never go back, as a resumed run's iteration does.
        self._run.define_metric("iteration")
        self._run.define_metric("*", step_metric="iteration")

    def log(self, iteration: int, values: Mapping[str, float]) -> None:
        """Logs the row of a 1-based iteration."""
        self._run.log({"iteration": iteration, **values})

    def close(self) -> None:
        """Sends what is left and waits for it."""
        self._run.finish()
