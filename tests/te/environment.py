"""`.venv-te`: the main environment plus the Python part of Transformer Engine, for the tests and one benchmark.

Transformer Engine's wheel cannot live in the main environment: without its compiled library importing it fails, and
then megatron-core does not import either. `.venv-te` sees the main environment's packages, so nothing is installed
twice. `python -m tests.te.environment` makes it and prints its interpreter.
"""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

from fusemega.fixtures.packages import AssetMissing

ROOT = Path(__file__).resolve().parents[2]
REQUIREMENTS = Path(__file__).with_name("requirements.txt")
FOLDER = ROOT / ".venv-te"
MADE = ".made"  # written last: what this environment was made from


def python() -> Path:
    """The interpreter of `.venv-te`, made on first use and again when its pins or the main environment change.

    Raises:
        AssetMissing: the packages cannot be fetched.
    """
    main_packages = sysconfig.get_path("purelib")
    made_from = hashlib.sha256(f"{sys.version}\n{main_packages}\n{REQUIREMENTS.read_text()}".encode()).hexdigest()
    interpreter = FOLDER / "bin" / "python"
    with (ROOT / ".venv-te.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        marker = FOLDER / MADE
        if marker.is_file() and marker.read_text() == made_from:
            return interpreter
        shutil.rmtree(FOLDER, ignore_errors=True)
        venv.create(FOLDER, with_pip=False, symlinks=True)
        packages = next((FOLDER / "lib").glob("python*/site-packages"))
        _install(packages)
        # This checkout first, then the main environment with its own .pth files.
        lines = [str(ROOT), f"import site; site.addsitedir({main_packages!r})"]
        (packages / "main-environment.pth").write_text("\n".join(lines) + "\n")
        marker.write_text(made_from)
    return interpreter


def _install(packages: Path) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps"]
    command += ["--only-binary", ":all:", "--retries", "2", "--target", str(packages), "-r", str(REQUIREMENTS)]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode != 0:
        reason = (run.stderr.strip() or run.stdout.strip() or "no output").splitlines()[-1]
        raise AssetMissing(f"asset .venv-te (transformer-engine==2.11.0): pip could not install it: {reason}")


if __name__ == "__main__":
    print(python())
