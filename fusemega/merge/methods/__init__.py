"""The merge methods. Importing this package registers all of them; a new one is one file and one line here."""

from fusemega.merge.methods import (  # noqa: F401
    dare,
    della,
    linear,
    sce,
    sce_mergekit,
    sce_paper,
    slerp,
    task_arithmetic,
    ties,
    varm,
)
