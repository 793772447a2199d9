"""What can be refused of the prompts, the policy and the reward model before any stage runs."""

from __future__ import annotations

import os

from fusemega.errors import UserError
from fusemega.files.json_files import read_json
from fusemega.hf.hub import resolve
from fusemega.models.registry import architecture_of
from fusemega.mutual.splits import portion_sizes
from fusemega.recipes.mutual_settings import MutualTaughtRecipe
from fusemega.sampling.prompts import PromptsConfig, read_prompts
from fusemega.text.fields import BadRow
from fusemega.text.templates import ChatTemplate
from fusemega.text.tokenizer import Tokenizer

_PROBE = [{"role": role, "content": content} for role, content in (("user", "Why?"), ("assistant", "So."))]
_SHOWN = 60  # characters of a template's text


def check_prompts(recipe: MutualTaughtRecipe) -> None:
    """Refuses prompts that are too few for the portions. Files that are not there are left to the graph.

    Raises:
        UserError: says how many there are and how many are needed, or which row is unusable.
    """
    if all(os.path.exists(path) for path in recipe.prompts.paths):
        config = PromptsConfig.model_validate(recipe.prompts.model_dump(exclude_defaults=True))
        try:
            portion_sizes(len(read_prompts(config, tell=False)), **recipe.sizes)
        except UserError as error:
            named = str(error).startswith("splits: ")
            raise UserError(f"{', '.join(recipe.prompts.paths)}: {error}" if named else str(error)) from None


def check_reward_model(recipe: MutualTaughtRecipe) -> None:
    """Refuses a reward model that the M step cannot train, or whose chat template is not the policy's.

    A folder without `config.json` at its top is left to the stage that opens it.

    Raises:
        UserError: names the folder, and what is allowed.
    """
    folder = resolve(recipe.reward_model.load)
    if (folder / "config.json").is_file():
        head = architecture_of(read_json(folder / "config.json")).head
        if head != "scalar":
            raise UserError(
                f"reward_model.load: {recipe.reward_model.load}: the M step trains a model with one score; allowed: "
                f"...ForSequenceClassification with one label (this one's head is: {head})"
            )
    if recipe.reward_model.template == "own":
        return
    texts = {}
    for key, model in (("target", recipe.target), ("reward_model.load", recipe.reward_model.load)):
        if not (resolve(model) / "config.json").is_file():
            return
        texts[key] = _text(key, model)
    if len(set(texts.values())) == 1:
        return
    at = len(os.path.commonprefix(list(texts.values())))
    policy, reward = (text[max(0, at - 20) : at + _SHOWN - 20] for text in texts.values())
    raise UserError(
        f"reward_model.load: {recipe.reward_model.load}: its chat template writes {reward!r} where that of "
        f"{recipe.target} writes {policy!r}; if that is intended, give reward_model.template: own"
    )


def _text(key: str, model: str) -> str:
    """What the chat template of a model writes of a short conversation."""
    tokenizer = Tokenizer.load(resolve(model))
    template = tokenizer.chat_template
    if template is None:
        raise UserError(f"{key}: {model}: the tokenizer has no chat template, with which conversations become text")
    try:
        return ChatTemplate(template, tokenizer).render(_PROBE)
    except BadRow as error:
        raise UserError(f"{key}: {model}: {error.detail}") from None
