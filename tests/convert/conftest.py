from tests.checkpoint.conftest import world  # noqa: F401  (a fixture)
