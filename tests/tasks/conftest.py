from tests.training.conftest import work  # noqa: F401  (a fixture)
