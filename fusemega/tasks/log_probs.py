"""Tasks `bits_per_byte` and `pairs`: what `fusemega eval` measures, for the model of the engine, in this process.

`bits_per_byte` is of texts or conversations, `pairs` of chosen and rejected responses: the share of pairs whose chosen
response has the higher log-probability, by the sum over its tokens and by the mean.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from fusemega.config import validate
from fusemega.errors import UserError
from fusemega.sampling.engines import TransformersSettings
from fusemega.scoring.evaluate import EvalRun, Scorer
from fusemega.scoring.evaluation import Evaluation
from fusemega.scoring.pair_accuracy import PairsEvaluation
from fusemega.tasks.task import Judged, Task, TaskSettings, register
from fusemega.text.data import DataConfig


class LogProbSettings(TaskSettings):
    """What both tasks have."""

    data: DataConfig
    micro_batch_size: int = Field(1, ge=1, description="rows of data.seq_length tokens in one forward pass")


class LogProbTask(Task):
    """A task that needs the model's log-probabilities of its data."""

    Settings = LogProbSettings
    settings: LogProbSettings

    def scorer(self, engine: TransformersSettings) -> Scorer:
        """The model, opened and checked.

        Raises:
            UserError: it cannot be read, or the data's chat template cannot.
        """
        if self.settings.data.chat_template is not None and engine.chat_template is not None:
            raise UserError("data.chat_template: engine.chat_template is given already, and is used here too")
        data = self.settings.data.model_dump()
        if engine.chat_template is not None:
            data["chat_template"] = engine.chat_template
        model = {"load": engine.load, "dtype": engine.dtype, "trust_remote_code": engine.trust_remote_code}
        run = {"model": model, "data": data, "micro_batch_size": self.settings.micro_batch_size}
        return Scorer(validate(EvalRun, run, self.settings.name))

    def judged(self, found: Evaluation) -> Judged:
        """The figures of an evaluation of the data.

        Raises:
            UserError: the data are not what the task is about.
        """
        raise NotImplementedError


class BitsPerByteSettings(LogProbSettings):
    """Texts or conversations, as `fusemega eval` reads them."""

    name: Literal["bits_per_byte"] = "bits_per_byte"


@register("bits_per_byte")
class BitsPerByte(LogProbTask):
    """See the module."""

    Settings = BitsPerByteSettings

    def judged(self, found: Evaluation) -> Judged:
        """See `LogProbTask.judged`."""
        figures: dict[str, Any] = {"bits_per_byte": found.bits_per_byte, "perplexity": found.perplexity}
        return Judged(figures, {"rows": found.samples, "tokens": found.tokens, "bytes": found.bytes})


class PairsSettings(LogProbSettings):
    """Pairs: `prompt`, `chosen`, `rejected`."""

    name: Literal["pairs"] = "pairs"


@register("pairs")
class Pairs(LogProbTask):
    """See the module."""

    Settings = PairsSettings

    def judged(self, found: Evaluation) -> Judged:
        """See `LogProbTask.judged`."""
        if not isinstance(found, PairsEvaluation):
            raise UserError(f"data.path: {self.settings.data.path} is not of pairs; allowed: prompt, chosen, rejected")
        figures: dict[str, float | None] = {}
        for by in ("sum", "mean"):
            share = getattr(found, f"accuracy_{by}")
            error = (share * (1 - share) / (found.pairs - 1)) ** 0.5 if found.pairs > 1 else None
            figures |= {f"accuracy_{by}": share, f"accuracy_{by}_stderr": error}
        figures |= {"margin_sum": found.margin_sum, "margin_mean": found.margin_mean}
        figures |= {"bits_per_byte": found.bits_per_byte}
        return Judged(figures, {"rows": found.pairs})
