"""What a quickstart says of its models is what the figures say, whichever way they came out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fusemega.recipes.measures import panels, seen, table
from fusemega.report.arms_page import write_arms_page

Values = dict[str, list[float]]


def found(**models: Values) -> dict[str, Any]:
    """Each model's figures on chat and on code: bits per byte, KL, share of the same token; of code all but the share
    are twice as high."""
    return {
        name: {
            kind: {
                "bits_per_byte": [times * x for x in of["bits"]],
                "kl": [times * x for x in of["kl"]],
                "same_top_1": of["same"],
            }
            for kind, times in (("chat", 1), ("code", 2))
        }
        for name, of in models.items()
    }


TARGET: Values = {"bits": [1.0], "kl": [0.8], "same": [0.5]}
CONTROL: Values = {"bits": [0.9], "kl": [0.9], "same": [0.6]}
TEACHER: Values = {"bits": [0.5], "kl": [0.0], "same": [1.0]}
BETTER: Values = {"bits": [0.8], "kl": [0.5], "same": [0.7]}
WORSE: Values = {"bits": [0.95], "kl": [0.95], "same": [0.55]}


def test_the_sentence_has_the_figures() -> None:
    assert seen(found(target=TARGET, control=CONTROL, fused=BETTER), "chat") == (
        "fused is better than control on all 4 counts (one seed): bits per byte on held-out chat 0.8000 against 0.9000 "
        "(before: 1.0000); on kinds of text never trained on (code) 1.6000 against 1.8000 (before: 2.0000); distance "
        "from the teacher, nats a token 0.750 against 1.350 (before: 1.200); same most probable token 70.0% against "
        "60.0% (before: 50.0%)."
    )


@pytest.mark.parametrize(
    ("control", "fused", "verdict"),
    [
        (CONTROL, WORSE, "better than control on none of 4 counts (one seed)"),
        (CONTROL, CONTROL, "better than control on none of 4 counts (one seed)"),
        (CONTROL, WORSE | {"same": [0.61]}, "better than control on 1 of 4 counts (one seed)"),
        # Of three seeds each: apart in bits, overlapping in KL, level in the share.
        (
            {"bits": [0.9, 0.91, 0.92], "kl": [0.6, 0.7, 0.8], "same": [0.6, 0.6, 0.6]},
            {"bits": [0.87, 0.88, 0.89], "kl": [0.5, 0.6, 0.7], "same": [0.6, 0.6, 0.6]},
            "better than control on 3 of 4 counts (3 seeds; on 2 beyond their spread)",
        ),
    ],
)
def test_the_verdict_is_what_the_figures_say(control: Values, fused: Values, verdict: str) -> None:
    assert verdict in seen(found(target=TARGET, control=control, fused=fused), "chat")


def test_other_tokenizers_are_compared_in_bits_per_byte_alone() -> None:
    models = found(target=TARGET, control=CONTROL, fused=BETTER, smollm2=TEACHER)
    for of in models.values():
        for one in of.values():
            del one["kl"], one["same_top_1"]
    assert "on all 2 counts" in seen(models, "chat")
    assert [panel.title for panel in panels({"measures": models, "kinds": {"chat": {}, "code": {}}}, None)] == [
        "bits per byte"
    ]


def test_table_picture_and_page_show_every_model(tmp_path: Path) -> None:
    three = {"bits": [0.8, 0.82, 0.84], "kl": [0.5, 0.5, 0.5], "same": [0.7, 0.7, 0.7]}
    models = found(target=TARGET, control=CONTROL | {"bits": [0.8, 0.81, 0.9]}, fused=three, teacher=TEACHER)
    summary = {
        "title": "a quickstart",
        "teachers": {"teacher": "t"},
        "measures": models,
        "kinds": dict.fromkeys(("chat", "code"), {"samples": 3, "tokens": 70, "bytes": 1234}),
        "trained_kind": "chat",
        "seeds": 3,
        "train_tokens": {"control": 10.0, "fused": 10.0},
        "prompt": "Who <asks>?",
        "answers": {"target": "a", "control": "<b>", "fused": "c", "teacher": "d"},
        "seen": seen(models, "chat"),
    }
    lines = table(summary).splitlines()
    assert next(line for line in lines if "chat, held out" in line).split()[3:] == [
        *("1.0000", "0.8367", "(0.1000)", "0.8200", "(0.0400)", "0.5000")
    ]
    assert lines[-1] == summary["seen"] and "  control  '<b>'" in lines
    drawn = panels(summary, "teacher")
    assert [panel.fixed for panel in drawn] == [None, "teacher", "teacher"]
    assert drawn[0].better("chat", "control", "fused") == "fused" and drawn[2].better("chat", "fused", "fused") is None
    curves = {"control": [(1.0, 2.0), (2.0, 1.5)], "fused": [(1.0, 2.0), (2.0, 1.7)]}
    page = write_arms_page(summary, drawn, curves, tmp_path).read_text()
    assert (tmp_path / "summary.png").stat().st_size > 10_000
    assert "Who &lt;asks&gt;?" in page and "&lt;b&gt;" in page and "<asks>" not in page
    assert '<td class="best">0.8200 (0.0400)</td>' in page and "Means of 3" in page
    assert page.count('<td class="best">') == 6 and "NaN" not in page
