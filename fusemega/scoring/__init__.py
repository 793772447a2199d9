"""Forward-only passes: teachers' rows, evaluation."""
