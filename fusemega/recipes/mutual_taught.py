"""Mutual-Taught (arXiv:2506.06292): a policy and a reward model teach each other.

    E step t   sample pi_{t-1} -> score by r_{t-1} -> length-controlled pairs -> DPO from pi_{t-1}
               -> every checkpoint against pi_{t-1} -> the best is pi_t, or the work ends
    M step t   one response each of pi_t and pi_{t-1} -> score by r_{t-1} -> believed pseudo-pairs, mixed with ranked
               pairs -> Bradley-Terry from r_0: r_t

The graph has every iteration that may come. An E step whose best checkpoint is not good enough raises `Stop`; then
pi_{t-1} is the result, and what would have come after is not needed.

    fusemega run RECIPE.yaml [KEY=VALUE ...]
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fusemega.pipeline.graph import Graph
from fusemega.pipeline.run import Outcome
from fusemega.recipes.fusion import dtype_of
from fusemega.recipes.implicit import WITH_REFERENCE, objective_of
from fusemega.recipes.implicit_settings import TrainStage
from fusemega.recipes.mutual_checks import check_prompts, check_reward_model
from fusemega.recipes.mutual_policy import choose_policy, compare, split_prompts
from fusemega.recipes.mutual_reward import make_reward_set
from fusemega.recipes.mutual_settings import MutualTaughtRecipe
from fusemega.recipes.mutual_steps import MutualSteps
from fusemega.recipes.mutual_summary import summarize
from fusemega.recipes.registry import Recipe

_ENGINE_DTYPES = {"bf16": "bfloat16", "fp32": "float32"}


class MutualTaught(Recipe[MutualTaughtRecipe]):
    """`recipe: mutual_taught`."""

    Settings = MutualTaughtRecipe

    def graph(self, settings: MutualTaughtRecipe) -> Graph:
        """See `Recipe.graph`."""
        check_prompts(settings)
        check_reward_model(settings)
        return MutualWork(settings).steps.graph()

    def finish(self, settings: MutualTaughtRecipe, outcome: Outcome) -> list[str]:
        """See `Recipe.finish`. Also writes the page."""
        return summarize(settings, MutualWork(settings).policies, outcome)

    def stopped(self, settings: MutualTaughtRecipe, outcome: Outcome) -> list[str]:
        """See `Recipe.stopped`."""
        return self.finish(settings, outcome)


RECIPE = MutualTaught()


class MutualWork:
    """The stages of one recipe file.

    Args:
        recipe: the settings.

    Attributes:
        steps: the stages.
        policies, rewards: pi_0, pi_1 ... and r_0, r_1 ..., each a folder.
    """

    def __init__(self, recipe: MutualTaughtRecipe) -> None:
        self.recipe, self.folder = recipe, Path(recipe.output_dir)
        parallel = recipe.parallel.model_dump(exclude_defaults=True)
        self.steps = MutualSteps(self.folder, recipe.nproc, parallel, recipe.model)
        reward = recipe.reward_model
        self._reward_model = reward.model_dump(
            exclude_unset=True, exclude={"load", "seq_length", "micro_batch_size", "parallel", "template"}
        )
        self._reward_parallel = (
            parallel if reward.parallel is None else reward.parallel.model_dump(exclude_defaults=True)
        )
        # The same stages, of models in another precision and layout.
        self._reward_steps = MutualSteps(
            self.folder, recipe.nproc, self._reward_parallel, self._reward_model, self.steps.stages
        )
        self._engine = {"name": recipe.engine.name, **recipe.engine.model_dump(exclude_unset=True)}
        self._engine = {key: value for key, value in self._engine.items() if key not in ("load", "model")}
        self._sampling = recipe.sampling.model_dump(exclude_defaults=True)
        self._prompts = self._split()
        self._ranked: list[str] = []
        self.policies, self.rewards = [recipe.target], [recipe.reward_model.load]
        for t in range(1, recipe.iterations + 1):
            self._policy(t)
            if t <= recipe.reward_steps:
                self._reward(t)
        if recipe.evaluation.pairs is not None:
            for t, load in enumerate(self.rewards):
                self._score(f"pairs-{t}", load, recipe.evaluation.pairs)

    def _path(self, *parts: str) -> str:
        return str(self.folder.joinpath(*parts))

    def _split(self) -> dict[str, str]:
        """Adds stage splits. Returns portion -> its prompts."""
        recipe = self.recipe
        names = ["selection", *(f"policy-{t}" for t in range(1, recipe.iterations + 1))]
        names += [f"reward-{t}" for t in range(1, recipe.reward_steps + 1)]
        files = {name: self._path("prompts", f"{name}.jsonl") for name in names}
        asked: dict[str, Any] = {"seed": recipe.seed, "sizes": recipe.sizes, "files": files}
        asked["record"] = self._path("prompts", "splits.json")
        read = {f"prompts.{i}": path for i, path in enumerate(recipe.prompts.paths)}
        asked["prompts"] = recipe.prompts.model_dump(exclude_defaults=True)
        self.steps.call("splits", split_prompts, asked, {}, read, {**files, "record": asked["record"]})
        return files

    def _policy(self, t: int) -> None:
        """Adds E step t: pi_t from pi_{t-1} and r_{t-1}."""
        recipe, stage, name = self.recipe, self.recipe.policy, f"policy-{t}"
        before, reward = self.policies[-1], self.rewards[-1]
        prompts = self._prompts[name]
        source, keeps = f"policy-{t - 1}", before == recipe.target
        said = self.steps.sample_policy(name, source, before, prompts, self._engine, self._sampling, keeps=keeps)
        options = ["--keep-length"] if recipe.keep_length else []
        groups = self.steps.collect(name, prompts, [said], *options)
        rewarded = self._score(name, reward, groups)
        protocol = {"protocol": {"name": "mutual_taught"}, "seed": recipe.seed, "unknown_fields": "ignore"}
        pairs = str(Path(self.steps.select(name, [rewarded], protocol)) / "preference.jsonl")
        objective = objective_of({"name": "dpo", "beta": 0.01}, stage)
        rows = _rows(stage)
        if (
            objective["name"] in WITH_REFERENCE
            and objective.get("loss_type") != "simpo"
            and "reference" not in objective
        ):
            store = self.steps.teach(name, before, {"path": pairs, **rows}, rows="none")
            objective = {**objective, "reference": {"store": store}}
        # The next policy is trained from this one, and narrower types would round most of a small update away.
        training = {"export_dtype": "fp32"} | stage.training.model_dump(exclude_unset=True)
        optimizer = stage.optimizer.model_dump(exclude_unset=True)
        trained = self.steps.train(name, before, {"path": pairs, **rows}, objective, optimizer, training)
        # As the checkpoints are compared: the last policy is what its win rate was measured on, rounded or not.
        compared = _ENGINE_DTYPES.get(getattr(recipe.engine, "dtype", ""), "") or dtype_of(recipe.target)
        wins = self._compare(t, trained, before, reward, compared)
        is_last = t == recipe.iterations
        policy, answers = self._path("policies", str(t)), self._path("policies", f"answers-{t}.jsonl")
        chosen = {"iteration": t, "wins": wins, "trained": trained, "tau": recipe.tau}
        chosen |= {"dtype": compared if is_last else "float32", "policy": policy, "answers": answers}
        outputs = {"policy": policy, "answers": answers}
        self.steps.call(f"choose-{t}", choose_policy, chosen, {"trained": trained}, {"wins": wins}, outputs)
        self.policies.append(policy)
        self._ranked.append(pairs)
        drift = {"path": answers, "seq_length": stage.seq_length}
        for other, load in {"start": recipe.target, "before": before}.items():
            if other == "start" or t > 1:
                # KL(pi_t || other) on what pi_t says.
                self.steps.divergence(f"drift-{t}-{other}", load, policy, drift)

    def _compare(self, t: int, trained: str, before: str, reward: str, dtype: str) -> str:
        """Adds stage compare-t, of checkpoints in `dtype`. Returns the file of its result."""
        recipe, folder = self.recipe, self._path("compared", str(t))
        wins = str(Path(folder) / "wins.json")
        judge = {
            "load": reward,
            "model": self._reward_model,
            "parallel": self._reward_parallel,
            "rows": self._reward_rows(),
            "micro_batch_size": recipe.reward_model.micro_batch_size,
        }
        asked = {
            "iteration": t,
            "trained": trained,
            "interval": recipe.policy.training.save_interval,
            "before": before,
            "prompts": self._prompts["selection"],
            "engine": self._engine,
            "sampling": {**self._sampling, "n": 1},
            "reward": judge,
            "dtype": dtype,
            "nproc": recipe.nproc,
            "folder": folder,
            "wins": wins,
        }
        models = {"trained": trained, "before": before, "reward": reward}
        inputs = {"prompts": self._prompts["selection"]}
        self.steps.work(f"compare-{t}", compare, asked, models, inputs, {"wins": wins}, [folder])
        return wins

    def _reward(self, t: int) -> None:
        """Adds M step t: r_t from r_0, by the responses of pi_t and pi_{t-1}."""
        recipe, stage, name = self.recipe, self.recipe.reward, f"reward-{t}"
        prompts, judge = self._prompts[name], self.rewards[-1]
        one = {**self._sampling, "n": 1}
        said = []
        # Of two policies that are alike, nearly all responses would be equal with the same draws.
        for part, policy, further in (("new", t, 0), ("old", t - 1, 1)):
            sampling = {**one, "seed": recipe.sampling.seed + further}
            load = self.policies[policy]
            source, place = f"policy-{policy}", f"{name}-{part}"
            # If the E step keeps the policy before, no response of either is needed.
            last = self.policies[t]
            keeps = load == recipe.target
            said.append(self.steps.sample_policy(place, source, load, prompts, self._engine, sampling, last, keeps))
        options = ["--keep-length"] if recipe.keep_length else []
        rewarded = self._score(name, judge, self.steps.collect(name, prompts, said, *options))
        share = recipe.evaluation.held_out
        files = {key: self._path("sets", name, f"{key}.jsonl") for key in ("pairs", "train", *["held"] * bool(share))}
        asked: dict[str, Any] = {
            "rewarded": rewarded,
            "new": f"policy-{t}",
            "old": f"policy-{t - 1}",
            "ranked": list(self._ranked),
            "mix": recipe.mix,
            "held_out": share,
            "seed": recipe.seed,
            "held": None,
            **files,
        }
        read = {"rewarded": rewarded} | {f"ranked.{i}": path for i, path in enumerate(self._ranked)}
        self.steps.call(f"pairs-{name}", make_reward_set, asked, {}, read, files)
        rows = {"path": files["train"], **_rows(stage)}
        training = stage.training.model_dump(exclude_unset=True)
        optimizer = stage.optimizer.model_dump(exclude_unset=True)
        objective = objective_of({"name": "reward"}, stage)
        # Always from the base: what an earlier reward model was wrong about must not pile up.
        trained = self._reward_steps.train(name, recipe.reward_model.load, rows, objective, optimizer, training)
        self.rewards.append(trained)
        if share:
            self._score(f"held-out-{t}", trained, files["held"])

    def _score(self, name: str, load: str, data: str) -> str:
        rows = {"path": data, **self._reward_rows()}
        micro_batch_size = self.recipe.reward_model.micro_batch_size
        return self._reward_steps.score(name, load, rows, micro_batch_size=micro_batch_size)

    def _reward_rows(self) -> dict[str, Any]:
        # What rows say of their prompts and responses beside texts is no concern of a reward model.
        return {"seq_length": self.recipe.reward_model.seq_length, "unknown_fields": "ignore"}


def _rows(stage: TrainStage) -> dict[str, Any]:
    given = {"seq_length", "max_length", "truncation"}
    return {"seq_length": stage.seq_length} | stage.model_dump(include=given, exclude_unset=True, exclude_none=True)
