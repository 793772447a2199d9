"""Shows drawings in a terminal, or writes them as one HTML page that needs no other file."""

from __future__ import annotations

import html
import io
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console, RenderableType

from fusemega import __version__
from fusemega.errors import printable
from fusemega.files.output import new_file
from fusemega.report.page_template import HEAD, STYLE

_WIDTH = 120  # characters, of a page and of output that is no terminal


def show(drawings: Sequence[RenderableType], title: str, page: Path | None) -> None:
    """Prints the drawings on stdout, or writes them to `page`.

    Raises:
        UserError: the page exists, or cannot be written.
    """
    if page is None:
        terminal = Console(highlight=False)
        if not terminal.is_terminal:
            terminal = Console(highlight=False, width=_WIDTH)
        for drawing in drawings:
            terminal.print(drawing)
        return
    recorder = Console(file=io.StringIO(), record=True, width=_WIDTH, highlight=False, force_terminal=True)
    for drawing in drawings:
        recorder.print(drawing)
    body = recorder.export_html(inline_styles=True, code_format="{code}")
    with new_file(page) as file:
        file.write(
            f"{HEAD}<title>{html.escape(printable(title))}</title>\n<style>\n{STYLE}"
            "pre { font: 13px/1.35 ui-monospace, 'DejaVu Sans Mono', monospace; overflow-x: auto; }\n</style>\n"
            f"</head>\n<body>\n<h1>{html.escape(printable(title))}</h1>\n<pre>{body}</pre>\n"
            f"<footer>fusemega {__version__}</footer>\n</body>\n</html>\n"
        )
