"""Chooses the chat template of a merge, and with it the tokens that end a turn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from fusemega.errors import UserError
from fusemega.hf.folder import HFFolder
from fusemega.hf.side_files import read_template
from fusemega.merge.run_file import MergeRun
from fusemega.merge.vocabulary import MergedVocabulary


def plan_template(
    vocabulary: MergedVocabulary, folders: Sequence[HFFolder], names: Sequence[str], run: MergeRun, has_base: bool
) -> tuple[MergedVocabulary, str | None, list[str]]:
    """The merge's vocabulary, with the folder (`donor`) whose tokenizer, template and token ids the merge carries.

    Args:
        vocabulary: as planned so far.
        folders, names: the models', the base first if there is one.
        run: what was asked for.
        has_base: whether there is a base.

    Returns:
        The vocabulary; a template to write in place of that folder's (None: its own); what to tell the user.

    Raises:
        UserError: a template was asked for that is not there.
    """
    templates = [read_template(folder.path) for folder in folders]
    own, theirs = templates[vocabulary.donor], [found for found in templates[has_base:] if found is not None]
    asked = run.chat_template
    if asked is None:
        if own is not None or not theirs:
            told = []
            if own is not None and any(found != own for found in theirs):
                told.append(
                    f"the chat template is that of {folders[vocabulary.donor].path}, and not all models have it; "
                    "chat_template: auto, or a model, takes theirs"
                )
            return vocabulary, None, told
        if len(set(theirs)) > 1:
            which = f"{len(set(theirs))} different ones among the models"
            return vocabulary, None, [f"no chat template: {which}; say whose with chat_template: MODEL"]
        chosen = theirs[0]
    elif asked == "auto":
        if not theirs:
            raise UserError("chat_template: auto: none of the models has a chat template")
        chosen = Counter(theirs).most_common(1)[0][0]
    elif asked in names:
        found = templates[names.index(asked)]
        if found is None:
            raise UserError(f"chat_template: {asked} has no chat template")
        chosen = found
    elif "{" in asked:
        return vocabulary, asked, ["the chat template is the run file's"]
    else:
        allowed = ", ".join(names)
        raise UserError(f"chat_template: found {asked!r}; allowed: auto, one of {allowed}, or the template itself")
    if chosen == own:
        return vocabulary, None, []
    owners = [names.index(asked)] if asked in names else [i for i, found in enumerate(templates) if found == chosen]
    told = [f"the chat template is that of {folders[owners[0]].path}"]
    here = vocabulary.files[vocabulary.donor]
    for owner in owners:
        there = vocabulary.files[owner]
        whole = here is None or (there is not None and here.strings.keys() <= there.strings.keys())
        fits = there is not None and max(there.strings, default=0) < vocabulary.rows
        if run.tokenizer_source is None and run.vocabulary in (None, "position", "pad") and whole and fits:
            told = [f"the chat template, the tokenizer and what ends a text are those of {folders[owner].path}"]
            return replace(vocabulary, donor=owner), None, told
    return vocabulary, chosen, told
