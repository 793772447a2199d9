"""One teacher's open store, and the rows of samples in it; how they become targets is up to the objective."""

from __future__ import annotations

from collections.abc import Callable

from pydantic import Field

from fusemega.checkpoint.open_model import weights_hash
from fusemega.config import Section
from fusemega.errors import UserError
from fusemega.fusion.targets import Tail
from fusemega.runtime.console import global_rank
from fusemega.store import Row, Store
from fusemega.store.missing import why_missing
from fusemega.text.dataset import TokenizedDataset
from fusemega.text.document import MASK_POLICY
from fusemega.text.sample import Sample


class TeacherRowsConfig(Section):
    """A teacher's store."""

    store: str = Field(description="folder of a sample store, written by `fusemega teach`")
    store_of: str | None = Field(
        None, description="the model whose rows the store must hold: a folder or hub id; hashes all its weights once"
    )


class TeacherRows:
    """An open store.

    Args:
        config: the store's section of the run file.
        where: the config's key, for messages.
        labels_for: the objective that needs `Row.label_logp_P`, for messages; None: it is not needed.

    Attributes:
        store: the open store.
        can_skip: whether the caller has an `on_missing` setting that allows samples without a row; for messages.

    Raises:
        UserError: no store there; one of another mask or model; one of format 2, if labels are needed.
    """

    def __init__(self, config: TeacherRowsConfig, where: str, labels_for: str | None = None) -> None:
        self.store, self.can_skip = Store.open(config.store), True
        self._labels_for = labels_for
        manifest = self.store.manifest
        manifest.require_rows(self.store.path)
        self.store.check({"mask_policy": MASK_POLICY})
        if labels_for is not None and (manifest.format == 2 or manifest.projected is not None):
            raise UserError(f"{where}.store: {self._no_labels()}")
        # One rank reads the weights for all; if it refuses, the launch ends.
        if config.store_of is not None and global_rank() == 0:
            found = weights_hash(config.store_of)
            if found != manifest.weights:
                raise UserError(
                    f"{where}.store_of: {self.store.path} has rows of weights other than those of {config.store_of} "
                    f"(store {manifest.weights[:12]}, model {found[:12]})"
                )

    def identity(self, dataset: TokenizedDataset) -> dict[str, str | None]:
        """Hashes of content in place of the config's paths. The store's are of its manifest, which says whose rows they
        are and of what kind, and of its rows of the samples."""
        rows = f"{self.store.manifest.hash.hex()}-{self.store.rows_hash(dataset.keys)}"
        return {"store": rows, "store_of": None}

    @property
    def k(self) -> int:
        """Most ids that a position of a row lists."""
        return self.store.manifest.entries

    def check_temperature(self, temperature: float, tail: Tail) -> None:
        """Refuses a temperature of the targets that the rows cannot be brought to.

        Raises:
            UserError: `tail: residual` or a store of draws, at another temperature than the store's.
        """
        manifest = self.store.manifest
        sampled = manifest.rows == "sampled"
        if (sampled or tail == "residual") and temperature != manifest.temperature:
            why = "its rows are draws at that one" if sampled else "with tail: residual they must be equal"
            remedy = "" if sampled else " (or use tail: renormalise)"
            raise UserError(
                f"objective.temperature: found {temperature}, and {self.store.path} was stored at "
                f"{manifest.temperature}; {why}{remedy}"
            )

    def row(self, sample: Sample, required: bool) -> Row | None:
        """The store's row of a sample.

        Raises:
            UserError: there is none, and it is required; it has no labels, and they are needed.
        """
        row = self.store.get(sample.key)
        if row is None and required:
            raise UserError(self._no_row(sample, "it had one of every sample when the run began"))
        if row is not None and row.label_logp_P is None and self._labels_for is not None:
            raise UserError(f"{sample.source}: {self._no_labels()}")
        return row

    def check_rows(self, dataset: TokenizedDataset, required: bool, fits: Callable[[Row, Sample], object]) -> None:
        """Reads the first sample's row, and looks for the rows of all.

        Args:
            fits: called with that row and sample; refuses a row that does not fit.

        Raises:
            UserError: that row does not fit, or some sample has none and rows are required.
        """
        row = self.row(dataset[0], required=False)
        if row is not None:
            fits(row, dataset[0])
        if required:
            for i, key in enumerate(dataset.keys):
                if key not in self.store:
                    raise UserError(self._no_row(dataset[i], why_missing(self.store, dataset, i)))

    def _no_row(self, sample: Sample, reason: str) -> str:
        """What to say of a sample that the store lacks."""
        allowed = " (allowed with on_missing: skip)" if self.can_skip else ""
        return f"{sample.source}: no row in the store {self.store.path}{allowed}: {reason}"

    def _no_labels(self) -> str:
        manifest = self.store.manifest
        made_by = "`fusemega project`, which knows none" if manifest.projected is not None else "an earlier version"
        return (
            f"{self._labels_for} needs the teacher's log-probability of the text's own tokens, and the rows of "
            f"{self.store.path} (format {manifest.format}) lack it: they were written by {made_by}; run `fusemega "
            "teach` with the teacher and its own tokenizer into a new folder"
        )
