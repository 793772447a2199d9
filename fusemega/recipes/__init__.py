"""Published and teaching pipelines, as graphs of commands.

* `steps.py`, `prune_steps.py`: a builder for each command; `run_files.py`: checks what they write
* `registry.py`: recipes by name, read from a file and run
* `fusion.py`: FuseLLM and FuseChat; `blockpruner.py`: blocks removed from a model, which is then healed
* `fusechat3.py`, `wrpo.py`, `fuserl.py`: from prompts to a trained model. `implicit.py`: the graph that they share;
  `implicit_settings.py`: its settings; `divide.py`: prompts by domain, and held-out rows
* `mutual_taught.py`: policy and reward model teach each other; `mutual_settings.py`: its settings; `mutual_steps.py`,
  `mutual_policy.py`, `mutual_reward.py`: its own stages; `mutual_checks.py`: what is refused before they run;
  `mutual_summary.py`: its figures and its page
* `quickstart.py`, `quickstart_xtok.py`: is fusion worth it? `arms.py`: their stages; `prepare.py`: models and text for
  them; `measures.py`: what is measured of their models
"""
