"""Published and teaching pipelines, as graphs of commands.

* `steps.py`: a builder for each command; `registry.py`: recipes by name, read from a file and run
* `fusion.py`: FuseLLM and FuseChat
* `quickstart.py`, `quickstart_xtok.py`: is fusion worth it? `arms.py`: their stages; `prepare.py`: models and text for
  them; `measures.py`: what is measured of their models
"""
