"""tools/pack_for_gpu.py and the unpack.py that it packs, on a project of a few lines with wheels of a few bytes."""

from __future__ import annotations

import importlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement

from fusemega.errors import UserError
from fusemega.fixtures import data

ROOT = Path(__file__).resolve().parents[1]
PLATFORM = f"manylinux_2_17_{platform.machine()}"
MOST = 100_000
HERE = "{}.{}".format(*sys.version_info)

SETUP = """
from setuptools import setup
setup(install_requires=["torch>=2.6", "tiny-dep", "never ; python_version < '3'", "had>=1"])
"""
# The build needs a package of its own, which the image's does not spare.
PYPROJECT = '[build-system]\nrequires = ["tiny-build>=1"]\nbuild-backend = "backend"\nbackend-path = ["."]\n'
BACKEND = """
import os, zipfile
import tiny_build

def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    name, info = "toy-1.0-py3-none-any.whl", "toy-1.0.dist-info"
    with zipfile.ZipFile(os.path.join(wheel_directory, name), "w") as wheel:
        wheel.writestr("toy.pth", os.getcwd())
        needs = "".join(f"Requires-Dist: {need}\\n" for need in ("torch>=2.6", "tiny-dep", "had>=1"))
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\\nName: toy\\nVersion: 1.0\\n{needs}")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr(f"{info}/entry_points.txt", "[console_scripts]\\ntoy = toy:main\\n")
        wheel.writestr(f"{info}/RECORD", "")
    return name
"""
TOY = """
import importlib.util, json, os, tiny_dep, had

def main():
    found = {"dep": tiny_dep.version, "had": had.version, "cache": os.environ["FUSEMEGA_CACHE"]}
    found["commit"] = os.environ["FUSEMEGA_COMMIT"]
    print(json.dumps({**found, "torch": importlib.util.find_spec("torch").origin}))
"""


def wheel(folder: Path, name: str, version: str, needs: Sequence[str] = ()) -> None:
    """A wheel with one module that knows its version."""
    module, info = name.replace("-", "_"), f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / f"{module}-{version}-py3-none-any.whl", "w") as file:
        file.writestr(f"{module}.py", f"version = {version!r}\n")
        lines = "".join(f"Requires-Dist: {need}\n" for need in needs)
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{lines}")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", f"{module}.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")


def git(repository: Path, *words: str) -> str:
    person = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
    return subprocess.run(["git", *person, *words], cwd=repository, check=True, capture_output=True, text=True).stdout


def run(command: Sequence[str | Path], settings: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    return subprocess.run(
        [str(word) for word in command], env=environment | (settings or {}), capture_output=True, text=True
    )


class Toy:
    """A project with a commit, an index for pip, a cache of fixtures, and what packing and unpacking them prints."""

    def __init__(self, home: Path) -> None:
        self.home, self.repository, self.out, self.folder = home, home / "project", home / "out", home / "there"
        self.repository.mkdir()
        files = {"setup.py": SETUP, "pyproject.toml": PYPROJECT, "backend.py": BACKEND, "toy.py": TOY}
        files |= {"constraints.txt": "tiny-dep==1.0\nhad==1.5\n", "go.sh": "#!/bin/sh\necho gone\n", "none": ""}
        for name, text in files.items():
            (self.repository / name).write_text(text)
        (self.repository / "go.sh").chmod(0o755)
        git(self.repository, "init", "-q")
        git(self.repository, "add", "-A")
        git(self.repository, "commit", "-qm", "first")
        for name, version, needs in (
            ("tiny-dep", "1.0", ["tiny-low"]),
            ("tiny-dep", "2.0", []),  # newer than the pin
            ("tiny-low", "3.0", []),
            ("tiny-build", "1.0", []),
            ("had", "1.5", []),
            ("torch", "99.0", []),  # never to be fetched
            ("extra-good", "1.0", []),
            ("extra-bad", "1.0", ["rare"]),
            ("rare", "1.0", []),
        ):
            wheel(home / "index", name, version, needs)
        # rare is in the list of the image, but not there; had is there in a release that will do.
        self.base = home / "base.txt"
        self.base.write_text("# an image\ntorch==2.6.0+cu124\nrare==1.0\ntiny-build==9\nhad==1.0\n")
        self.settings = {"FUSEMEGA_CACHE": str(home / "cache"), "PIP_CONFIG_FILE": os.devnull}
        self.settings |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": (home / "index").as_uri()}

    def pack(self, *words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, ROOT / "tools" / "pack_for_gpu.py", "--repository", self.repository]
        options = ["--out", self.out, "--base", self.base, "--platform", PLATFORM, "--most-mb", str(MOST / 1e6)]
        also = ["--also", "extra-good", "extra-bad"]
        return run([*command, *options, *also, *words], self.settings | {"PYTHONPATH": str(ROOT)})

    def unpack(self, out: Path | None = None, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
        """Without a network, where the system allows that."""
        alone = ["unshare", "-rn"]
        if shutil.which("unshare") is None or run([*alone, "true"]).returncode != 0:
            alone = []
        image = {"PYTHONPATH": str(self.home / "image" / "site-packages"), "PIP_CONSTRAINT": "/absent"}
        return run([*alone, sys.executable, (out or self.out) / "unpack.py", folder or self.folder], image)

    @property
    def manifest(self) -> dict[str, object]:
        return json.loads((self.out / "manifest.json").read_text())  # type: ignore[no-any-return]

    def parts(self, group: str) -> list[Path]:
        return sorted(self.out.glob(f"{group}-*.part"))


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """Packed, and unpacked by this Python, whose torch stands for the image's, where a killed call has begun before."""
    toy = Toy(tmp_path_factory.mktemp("pack"))
    names: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "cached", lambda cache, name, *_: names.append(name) or Path(name))
        data.smollm2()
        data.chat_data()
        for domain in data.DOMAINS:
            data.domain_data(domain)
    for number, name in enumerate(names):
        folder = toy.home / "cache" / name
        folder.mkdir(parents=True)
        (folder / "file").write_bytes(os.urandom(250_000 if number == 0 else 1000))
    wheel(toy.home, "had", "1.0")
    with zipfile.ZipFile(toy.home / "had-1.0-py3-none-any.whl") as file:
        file.extractall(toy.home / "image" / "site-packages")
    packed = toy.pack()
    assert packed.returncode == 0, packed.stderr
    (toy.folder / "project").mkdir(parents=True)  # what a call leaves that was killed
    (toy.folder / "project" / "half").touch()
    (toy.folder / ".unpacking").touch()
    unpacked = toy.unpack()
    assert unpacked.returncode == 0, unpacked.stderr
    assert "not installed, and not required: extra-bad: " in unpacked.stdout and "rare" in unpacked.stdout
    return toy


def test_what_is_packed(toy: Toy) -> None:
    sizes = {path.name: path.stat().st_size for path in toy.out.glob("*.part")}
    assert max(sizes.values()) == MOST and len(toy.parts("model")) == 3
    wheels = {name.split("/")[1].split("-py3")[0] for name in toy.manifest["groups"]["wheels"]["files"]}  # type: ignore[index]
    # Neither torch nor what else the image has; but the build's own.
    assert wheels == {"tiny_dep-1.0", "tiny_low-3.0", "tiny_build-1.0", "extra_good-1.0", "extra_bad-1.0"}
    assert toy.manifest["commit"] == git(toy.repository, "rev-parse", "HEAD").strip()


def test_what_is_installed(toy: Toy) -> None:
    done = run([toy.folder / "run", "toy"], {"PYTHONPATH": ""})
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["dep"] == "1.0" and found["had"] == "1.0" and found["cache"] == str(toy.folder / "cache")
    assert found["commit"] == toy.manifest["commit"]
    assert found["torch"] == importlib.util.find_spec("torch").origin  # type: ignore[union-attr]
    inside = next((toy.folder / "venv").glob("lib/python*/site-packages"))
    names = {path.name.split("-")[0] for path in inside.glob("*.dist-info")}
    assert names == {"toy", "tiny_dep", "tiny_low", "extra_good"}
    assert run([toy.folder / "run", "./go.sh"]).stdout == "gone\n" and (toy.folder / "project" / "none").is_file()
    for path in (toy.home / "cache").glob("*-r1/file"):
        assert (toy.folder / "cache" / path.parent.name / "file").read_bytes() == path.read_bytes()
    assert not (toy.folder / ".unpacking").exists() and not (toy.folder / "project" / "half").exists()


def test_again(toy: Toy) -> None:
    """A second call does nothing; a new commit is packed alone, and unpacked beside the old one."""
    before = {path: path.stat().st_mtime_ns for path in toy.out.iterdir()}
    again = toy.pack()
    assert again.returncode == 0 and again.stdout.count("as before") == 4
    assert {path: path.stat().st_mtime_ns for path in toy.out.iterdir()} == before
    assert "nothing to do" in toy.unpack().stdout

    (toy.repository / "new").write_text("new")
    assert "uncommitted changes: new" in toy.pack().stderr
    same = toy.pack("--commit", "HEAD")
    assert same.stdout.count("as before") == 4 and "not packed, as it is not committed: new" in same.stderr
    git(toy.repository, "add", "new")
    git(toy.repository, "commit", "-qm", "second")
    killed = toy.out / "project-0123456789ab.01.part.tmp"
    killed.write_bytes(b"of a call that was killed")
    assert toy.pack().stdout.count("as before") == 3 and not killed.exists()
    gone = set(before) - set(toy.out.iterdir())
    assert [path.name.split("-")[0] for path in gone] == ["project"]
    refused = toy.unpack()
    assert refused.returncode == 2 and "nothing is overwritten" in refused.stderr
    assert json.loads((toy.folder / "manifest.json").read_text())["commit"] != toy.manifest["commit"]


def test_damage_is_named_before_anything_is_written(toy: Toy, tmp_path: Path) -> None:
    out = shutil.copytree(toy.out, tmp_path / "out")
    first, second, third = (out / path.name for path in toy.parts("model"))
    first.unlink()
    second.write_bytes(second.read_bytes()[:-1])
    third.write_bytes(third.read_bytes()[:-1] + bytes([third.read_bytes()[-1] ^ 1]))
    done = toy.unpack(out, tmp_path / "there")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    for words in (f"{first.name} is missing", f"{second.name} is damaged", f"{third.name} is damaged"):
        assert words in done.stderr
    assert not (tmp_path / "there").exists()


def test_a_failed_installation_leaves_nothing(toy: Toy, tmp_path: Path) -> None:
    """Without the wheels the image would have to have all; it has no tiny-build."""
    toy.out, kept = tmp_path / "out", toy.out
    try:
        assert toy.pack("--groups", "project", "data").returncode == 0
        done = toy.unpack(folder=tmp_path / "there")
    finally:
        toy.out = kept
    assert done.returncode == 2 and done.stderr.startswith("error: pip: ") and done.stderr.count("\n") == 1
    assert "tiny-build" in done.stderr and not (tmp_path / "there").exists()


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("python", "3.99", "these archives are for Python 3.99"),
        ("platform", "manylinux_2_17_s390x", "these archives are for manylinux_2_17_s390x, and this machine is"),
        ("platform", f"manylinux_2_999_{platform.machine()}", "and this machine is"),
        ("format", 2, "format 2; this script reads 1"),
    ],
)
def test_another_machine_is_refused(toy: Toy, tmp_path: Path, key: str, value: object, expected: str) -> None:
    shutil.copy(toy.out / "unpack.py", tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps({**toy.manifest, key: value}))
    done = toy.unpack(tmp_path, tmp_path / "there")
    assert done.returncode == 2 and expected in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "there").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--most-mb", "60"], "must be above 0 and below 60"),
        (["--python", "3"], "--python 3: expected 3.MINOR"),
        (["--platform", "win_amd64"], "expected manylinux_2_MINOR_x86_64 or _aarch64"),
        (["--commit", "nowhere"], "git rev-parse"),
        (["--groups", "wheels"], "project is always packed"),
        (["--base", "BAD"], "bad.txt:2: 'numpy @ file:///x': expected NAME==VERSION"),
        (["--base", "/absent"], "--base /absent: cannot be read"),
        (["--out", "TAKEN"], "taken: exists and was not packed by this script"),
    ],
)
def test_refused(toy: Toy, tmp_path: Path, words: list[str], expected: str) -> None:
    (tmp_path / "bad.txt").write_text("torch==2.6.0\nnumpy @ file:///x\n")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").touch()
    places = {"BAD": str(tmp_path / "bad.txt"), "TAKEN": str(tmp_path / "taken")}
    done = toy.pack(*(places.get(word, word) for word in words))
    assert done.returncode == 2 and expected in done.stderr and done.stderr.count("\n") == 1
    assert [path.name for path in (tmp_path / "taken").iterdir()] == ["mine"]


@pytest.fixture
def gpu_wheels(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module("gpu_wheels")


def test_markers_are_read_for_the_image(
    gpu_wheels: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pip alone reads them for the Python that it runs in."""
    index = tmp_path / "index"
    wheel(index, "top", "1.0", ["only-old ; python_version < '3.9'", "only-new ; python_version >= '3.9'", "mid"])
    wheel(index, "only-old", "1.0", ["deeper"])
    for name in ("only-new", "deeper", "mid"):
        wheel(index, name, "1.0")
    wheel(index, "mid", "2.0")
    for name, value in {"NO_INDEX": "1", "FIND_LINKS": index.as_uri(), "CONFIG_FILE": os.devnull}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    monkeypatch.setenv("FUSEMEGA_CACHE", str(tmp_path / "cache"))
    limits = "mid==1.0 ; python_version < '3.9'\nmid==2.0 ; python_version >= '3.9'\n"

    image = gpu_wheels.Image("3.8", PLATFORM, {})
    found = gpu_wheels.wheels(["top"], [], limits, image)
    names = {path.name.split("-py3")[0] for path in found.iterdir()}
    assert {"top-1.0", "only_old-1.0", "deeper-1.0", "mid-1.0"} <= names and "mid-2.0" not in names

    shutil.rmtree(index)
    assert gpu_wheels.wheels(["top"], [], limits, image) == found  # without an index
    with pytest.raises(UserError, match="wheels for Python 3.8, .*No matching distribution found for other"):
        gpu_wheels.wheels(["other"], [], limits, image)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [found.name]


def test_the_default_image_has_the_pinned_releases(gpu_wheels: ModuleType) -> None:
    base = gpu_wheels.read_base(ROOT / "tools" / "gpu_base.txt")
    assert base.keys() == {"torch", "transformers", "triton"}
    needed, build = gpu_wheels.declared((ROOT / "setup.py").read_text(), (ROOT / "pyproject.toml").read_text())
    assert "megatron-core==0.16.1" in needed and [Requirement(need).name for need in build] == ["setuptools"]
    pins = gpu_wheels.pins((ROOT / "constraints.txt").read_text(), gpu_wheels.Image(HERE, PLATFORM, {}))
    assert pins["torch"] == f"=={base['torch']}"
    at_new = gpu_wheels.pins((ROOT / "constraints.txt").read_text(), gpu_wheels.Image("3.12", PLATFORM, {}))
    assert at_new["transformers"] == f"=={base['transformers']}"


def test_the_options_of_the_page() -> None:
    page = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    section = re.split(r"^## ", page, flags=re.MULTILINE)[2]
    assert section.startswith("Without a network")
    named = set(re.findall(r"`(--[\w-]+)|pack_for_gpu\.py (--[\w-]+)", section))
    script = (ROOT / "tools" / "pack_for_gpu.py").read_text(encoding="utf-8")
    options = {one or other for one, other in named}
    assert options >= {"--base", "--python", "--platform", "--commit", "--also"}
    assert [option for option in options if f'"{option}"' not in script] == []
