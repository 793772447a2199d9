"""File operations of all ranks together: one rank writes and checks, and all ranks get the result or the error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from fusemega.errors import UserError
from fusemega.files.output import INSIDE, disk_errors, new_folder
from fusemega.files.owned import scratch_of

if TYPE_CHECKING:  # megatron-core takes seconds to import, and conversions do without it
    from fusemega.runtime.parallel import World


def on_main(world: World, action: Callable[[], object]) -> None:
    """Run `action` on the main process; a UserError there is raised on every process. Collective."""
    message: str | None = None
    if world.is_main:
        try:
            action()
        except UserError as error:
            message = str(error)
    message = world.from_main(message)
    if message is not None:
        raise UserError(message)


@contextmanager
def output_folder(path: Path, world: World, needed_bytes: int = 0) -> Iterator[Path]:
    """`new_folder` for several processes. Collective.

    Args:
        path: the folder to appear; absent, or present and empty.
        world: all its processes enter and leave together.
        needed_bytes: refuses at once if the disk has less.

    Raises:
        UserError: as `new_folder`, on every process.
    """
    held = ExitStack()
    on_main(world, lambda: held.enter_context(new_folder(path, needed_bytes)))
    with held:
        with disk_errors(path):
            yield scratch_of(path) / INSIDE
            world.barrier()  # every rank has written before the main one publishes the folder
        on_main(world, held.close)
