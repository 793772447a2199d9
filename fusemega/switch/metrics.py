"""What the proxy counts, in Prometheus' text form."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)  # seconds
UPSTREAM_KINDS = ("connect", "timeout", "broken", "cut")


@dataclass
class ProxyMetrics:
    """Counts since the start.

    Attributes:
        requests: (mode, who decided) -> requests.
        upstream: kind -> faults of the upstream: no connection; no byte in time; broken before the first byte; cut
            after it.
        statuses: status of the upstream's answers -> how many.
        errors_in_streams: answers with status 200 whose stream told an error.
        clients_gone: clients that left before their answer's end.
        refused: requests that the proxy refused itself.
        tried_again: requests whose connection the upstream closed before its answer began.
        decisions: seconds -> decisions that took at most so long; their sum and number.
        in_flight: requests under way.
    """

    requests: Counter[tuple[str, str]] = field(default_factory=Counter)
    upstream: Counter[str] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
    errors_in_streams: int = 0
    clients_gone: int = 0
    refused: int = 0
    tried_again: int = 0
    decisions: Counter[float] = field(default_factory=Counter)
    decision_seconds: float = 0.0
    decision_count: int = 0
    in_flight: int = 0

    def decided(self, mode: str, by: str, seconds: float) -> None:
        """Counts a decision and the time that it took."""
        self.requests[mode, by] += 1
        self.decision_seconds += seconds
        self.decision_count += 1
        for bucket in BUCKETS:
            self.decisions[bucket] += seconds <= bucket

    def text(self) -> str:
        """Prometheus' exposition format."""
        lines = ["# TYPE fusemega_switch_requests_total counter"]
        for (mode, by), count in sorted(self.requests.items()):
            lines.append(f'fusemega_switch_requests_total{{mode="{mode}",decided_by="{by}"}} {count}')
        lines.append("# TYPE fusemega_switch_upstream_faults_total counter")
        for kind in UPSTREAM_KINDS:
            lines.append(f'fusemega_switch_upstream_faults_total{{kind="{kind}"}} {self.upstream[kind]}')
        lines.append("# TYPE fusemega_switch_answers_total counter")
        for status, count in sorted(self.statuses.items()):
            lines.append(f'fusemega_switch_answers_total{{status="{status}"}} {count}')
        for name, value in (
            ("errors_in_streams", self.errors_in_streams),
            ("clients_gone", self.clients_gone),
            ("refused", self.refused),
            ("tried_again", self.tried_again),
        ):
            lines += [f"# TYPE fusemega_switch_{name}_total counter", f"fusemega_switch_{name}_total {value}"]
        lines += ["# TYPE fusemega_switch_in_flight gauge", f"fusemega_switch_in_flight {self.in_flight}"]
        lines.append("# TYPE fusemega_switch_decision_seconds histogram")
        for bucket in BUCKETS:
            lines.append(f'fusemega_switch_decision_seconds_bucket{{le="{bucket:g}"}} {self.decisions[bucket]}')
        lines.append(f'fusemega_switch_decision_seconds_bucket{{le="+Inf"}} {self.decision_count}')
        lines.append(f"fusemega_switch_decision_seconds_sum {self.decision_seconds:.6f}")
        lines.append(f"fusemega_switch_decision_seconds_count {self.decision_count}")
        return "\n".join(lines) + "\n"
