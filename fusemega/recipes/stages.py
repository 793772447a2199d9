"""A pipeline of named stages in one folder: each is done once, and done again when what it was made from changes."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import yaml

from fusemega.errors import UserError
from fusemega.files.json_files import read_json
from fusemega.files.lock import locked
from fusemega.files.output import write_durably
from fusemega.files.remembered import content_hash
from fusemega.launch.local import launch_ranks
from fusemega.runtime.console import say
from fusemega.runtime.lifeline import child_environment


class Stages:
    """Runs stages below `folder`, keeping a mark for each finished one in `folder/stages`.

    Args:
        folder: the pipeline's output folder.
        nproc: processes of the stages that run a command.
    """

    def __init__(self, folder: Path, nproc: int) -> None:
        self.folder, self.nproc = folder, nproc
        held = ExitStack()
        held.enter_context(locked(folder))
        weakref.finalize(self, held.close)  # as long as this object, or its process, is there
        self._marks = folder / "stages"
        self._marks.mkdir(parents=True, exist_ok=True)
        self._chain = ""

    def run(
        self,
        name: str,
        settings: Any,
        work: Callable[[], Any],
        outputs: tuple[Path, ...] = (),
        inputs: Iterable[str | Path] = (),
    ) -> Any:
        """`work()`, or what it returned when it was last finished with the same settings, the same contents of its
        inputs and the same stages before.

        Args:
            settings: JSON-able; everything else that decides the outcome.
            outputs: files or folders that the stage makes; old ones of other settings are removed first.
            inputs: files or folders that no stage before has made.

        Returns:
            What `work` returned; must be JSON-able.
        """
        contents = [content_hash(Path(path), self._marks / "hashes") for path in inputs]
        identity = hashlib.blake2b(
            json.dumps([self._chain, name, settings, contents], sort_keys=True).encode(), digest_size=16
        ).hexdigest()
        self._chain = identity
        mark, begun = self._marks / f"{name}.json", self._marks / f"{name}.begun"
        if mark.exists():
            done = read_json(mark, finite=False)
            if done.get("identity") == identity and all(path.exists() for path in outputs):
                say(f"[{name}] finished before, skipped")
                return done.get("result")
        # An unfinished stage of the same settings resumes from what it left; one of other settings starts clean.
        if not begun.exists() or begun.read_text() != identity:
            if not begun.exists() and (strange := [path for path in outputs if os.path.lexists(path)]):
                raise UserError(f"{strange[0]}: exists, and stage {name} did not make it; choose another output folder")
            mark.unlink(missing_ok=True)
            for path in outputs:
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            write_durably(begun, identity)
        say(f"[{name}]")
        started = time.monotonic()
        result = work()
        say(f"[{name}] done in {time.monotonic() - started:.0f} s")
        write_durably(mark, json.dumps({"identity": identity, "result": result}))
        return result

    def command(self, verb: str, name: str, run: dict[str, Any]) -> str:
        """Write `run` as `folder/{name}.yaml` and run `fusemega {verb}` on it.

        Raises:
            UserError: what the command raised, or that it failed.
        """
        run_file = self.write_run_file(verb, name, run, self.nproc)
        status = launch_ranks([verb, str(run_file)], self.nproc)
        if status:
            raise UserError(f"fusemega {verb} {run_file}: ended with status {status}; its messages are above")
        return str(run_file)

    def tool(self, *argv: str) -> str:
        """Run `fusemega argv...` in one process of its own. Returns the command, as anyone may type it.

        Raises:
            UserError: it failed.
        """
        command = shlex.join(["fusemega", *argv])
        say(command)
        status = subprocess.run([sys.executable, "-m", "fusemega", *argv], env=child_environment()).returncode
        if status:
            raise UserError(f"{command}: ended with status {status}; its messages are above")
        return command

    def write_run_file(self, verb: str, name: str, run: dict[str, Any], nproc: int) -> Path:
        """`run` as `folder/{name}.yaml`, which anyone may run again by hand."""
        run_file = self.folder / f"{name}.yaml"
        how = f"# fusemega {verb} {run_file}" + (f" --nproc {nproc}" if nproc > 1 else "")
        write_durably(run_file, how + "\n" + yaml.safe_dump(run, sort_keys=False))
        return run_file
