"""Published and teaching pipelines, as compositions of commands."""
