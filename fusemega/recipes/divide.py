"""Rows divided among files: prompts by domain, and a share of a preference set that is held out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fusemega.errors import UserError, nearest
from fusemega.files.output import write_durably
from fusemega.pipeline.functions import stage_function


@stage_function
def divide(prompts: Mapping[str, Any], out: str, domains: Mapping[str, str]) -> dict[str, int]:
    """Writes all prompts, each once, and those of each domain; returns how many of each.

    Args:
        prompts: where they come from, as `PromptsConfig`.
        out: JSONL for all of them.
        domains: domain -> JSONL. Empty: the rows' domains are not looked at.

    Raises:
        UserError: a row without a domain or of an unknown one, or a domain without prompts.
    """
    from fusemega.sampling.prompts import PromptsConfig, read_prompts

    lines: dict[str, list[str]] = {domain: [] for domain in domains}
    everything = []
    for prompt in read_prompts(PromptsConfig.model_validate(dict(prompts))).by_key.values():
        line = json.dumps({"prompt": prompt.messages, **prompt.about}, ensure_ascii=False) + "\n"
        everything.append(line)
        if not domains:
            continue
        domain = prompt.about.get("domain")
        if domain not in lines:
            found = "no domain" if domain is None else f"the domain {domain!r}{nearest(domain, domains)}"
            raise UserError(f"{prompt.source}: the row has {found}; allowed by `domains`: {', '.join(domains)}")
        lines[domain].append(line)
    if empty := [domain for domain, found in lines.items() if not found]:
        raise UserError(f"domains.{empty[0]}: {len(everything)} prompts, and none of this domain")
    write_durably(Path(out), "".join(everything))
    for domain, path in domains.items():
        write_durably(Path(path), "".join(lines[domain]))
    return {"all": len(everything)} | {domain: len(found) for domain, found in lines.items()}


@stage_function
def hold_out(data: str, share: float, kept: str, held: str, pairs: str) -> dict[str, int]:
    """Divides the rows of a preference set; returns how many are kept and held out, and the pairs of the latter.

    Which are held out depends on their prompts alone: those of the smallest hashes.

    Args:
        data: JSONL of pairs or groups.
        share: of the rows, to hold out; at least one.
        kept, held: JSONL to write, in the order of `data`.
        pairs: JSONL of the held-out rows as pairs: of a group, the responses of highest and of lowest reward.

    Raises:
        UserError: fewer than two rows.
    """
    from fusemega.sampling.prompts import prompt_key

    # Rows end at newlines alone; a text may contain other characters at which `splitlines` would cut.
    lines = [line for line in Path(data).read_text(encoding="utf-8").split("\n") if line]
    if len(lines) < 2:
        raise UserError(f"{data}: {len(lines)} rows, of which evaluation.held_out takes at least one, and training too")
    rows = [json.loads(line) for line in lines]
    keys = [prompt_key(row["prompt"]) for row in rows]
    count = min(max(1, round(share * len(lines))), len(lines) - 1)
    chosen = set(sorted(range(len(lines)), key=lambda i: (keys[i], i))[:count])
    for path, wanted in ((kept, False), (held, True)):
        write_durably(Path(path), "".join(f"{line}\n" for i, line in enumerate(lines) if (i in chosen) == wanted))
    found = [_pair(row) for i, row in enumerate(rows) if i in chosen]
    write_durably(Path(pairs), "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in found))
    return {"kept": len(lines) - count, "held": count}


def _pair(row: Mapping[str, Any]) -> dict[str, Any]:
    if "responses" not in row:
        return {key: row[key] for key in ("prompt", "chosen", "rejected")}
    ranked = sorted(row["responses"], key=lambda response: float(response["reward"]))
    texts = {"chosen": ranked[-1]["text"], "rejected": ranked[0]["text"]}
    turns = {key: [{"role": "assistant", "content": text}] for key, text in texts.items()}
    return {"prompt": row["prompt"], **turns}
