from tests.training.conftest import make_run, work  # noqa: F401  (fixtures)
