from tests.checkpoint.conftest import folder, world  # noqa: F401  (fixtures)
