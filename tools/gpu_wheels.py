"""Which wheels a machine lacks: the project's requirements at its pins, less what the machine's image has.

pip's own resolver picks them, for another Python and platform than this one. A package of the image takes part as an
empty wheel with the image's version and no requirements: so it is neither fetched nor replaced. pip reads markers
(`; python_version < "3.12"`) for the Python that it runs in; here they are read for the image's.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from email.parser import HeaderParser
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from fusemega.errors import UserError
from fusemega.files.cache import cache_folder
from fusemega.files.output import INSIDE, publish, scratch

IN_IMAGE = "image"  # the local version of an empty wheel: no index has one, so nothing is fetched in its place
ROUNDS = 5
OLD_NAMES = {"manylinux2014": 17, "manylinux2010": 12, "manylinux1": 5}  # platform -> minor version of its glibc


@dataclass(frozen=True)
class Image:
    """A machine's image: its Python (`3.12`), the platform of its wheels, and its packages with their versions."""

    python: str
    platform: str
    packages: dict[str, str]

    def marker_values(self) -> dict[str, str]:
        """What markers ask about, of the image."""
        return {
            "python_version": self.python,
            "python_full_version": f"{self.python}.0",
            "platform_machine": machine(self.platform)[1],
            "platform_python_implementation": "CPython",
            "platform_system": "Linux",
            "implementation_name": "cpython",
            "os_name": "posix",
            "sys_platform": "linux",
            "extra": "",
        }

    def pip_options(self) -> list[str]:
        """pip's options for wheels that run there: of its glibc and of every older one."""
        minor, of = machine(self.platform)
        names = [f"manylinux_2_{older}_{of}" for older in range(minor, 4, -1)]
        names += [f"{name}_{of}" for name, least in OLD_NAMES.items() if minor >= least]
        options = ["--python-version", self.python, "--implementation", "cp", "--only-binary", ":all:"]
        return [*options, *(word for name in names for word in ("--platform", name))]


def machine(platform: str) -> tuple[int, str]:
    """glibc's minor version and the processor of a platform tag.

    Raises:
        UserError: another platform than Linux with glibc.

    >>> machine("manylinux_2_28_x86_64")
    (28, 'x86_64')
    """
    found = re.fullmatch(r"manylinux_2_(\d+)_(x86_64|aarch64)", platform)
    if found is None:
        raise UserError(f"--platform {platform}: expected manylinux_2_MINOR_x86_64 or _aarch64 (MINOR: of its glibc)")
    return int(found[1]), found[2]


def read_base(path: Path) -> dict[str, str]:
    """Packages and versions of an image, in the form of `pip list --format=freeze`: NAME==VERSION, a line each.

    Raises:
        UserError: names the line that has another form.
    """
    packages: dict[str, str] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--base {path}: cannot be read: {error}") from None
    for number, line in enumerate(lines, 1):
        if not (text := line.partition("#")[0].strip()):
            continue
        name, _, version = (part.strip() for part in text.partition("=="))
        try:
            packages[canonicalize_name(Requirement(name).name)] = str(Version(version))
        except (InvalidRequirement, InvalidVersion):
            form = "expected NAME==VERSION, as `pip list --format=freeze` prints it"
            raise UserError(f"{path}:{number}: {text!r}: {form}") from None
    return packages


def declared(setup: str, pyproject: str) -> tuple[list[str], list[str]]:
    """What the project needs to run, by its setup.py, and to be installed, by its pyproject.toml.

    Raises:
        UserError: they are not written as literals.
    """
    calls = [node for node in ast.walk(ast.parse(setup)) if isinstance(node, ast.Call)]
    lists = [keyword.value for call in calls for keyword in call.keywords if keyword.arg == "install_requires"]
    build = re.search(r"^requires = (\[.*\])$", pyproject, re.MULTILINE)
    if len(lists) != 1 or build is None:
        raise UserError("setup.py: install_requires, or pyproject.toml: requires, is not a plain list")
    return ast.literal_eval(lists[0]), json.loads(build[1])


def pins(text: str, image: Image) -> dict[str, str]:
    """Name -> specifier of a constraints file, as far as its markers hold in the image."""
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    found = [Requirement(line) for line in lines if line]
    return {canonicalize_name(r.name): str(r.specifier) for r in found if _applies(r, image)}


def _applies(requirement: Requirement, image: Image) -> bool:
    return requirement.marker is None or requirement.marker.evaluate(image.marker_values())


def wheels(needed: Sequence[str], build: Sequence[str], constraints: str, image: Image) -> Path:
    """A folder of wheels, kept in the cache: with the image's packages they are all that `needed` needs.

    Args:
        needed: requirements, of which the image may satisfy some.
        build: requirements of an isolated build, which the image's packages are no part of.
        constraints: text of the project's constraints file.
        image: where they are to be installed.

    Raises:
        UserError: there is no such set of wheels, or it cannot be fetched; pip's own words say why.
    """
    pinned = pins(constraints, image)
    asked = [sorted(needed), sorted(build), sorted(pinned.items()), image.pip_options(), sorted(image.packages.items())]
    target = cache_folder() / f"gpu-wheels-{hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]}"
    if target.is_dir():
        return target
    with scratch(target) as place:
        (place / INSIDE).mkdir()
        _fetch(_wanted(needed, image), pinned, image, place)
        if build:
            bare = Image(image.python, image.platform, {})
            _pip_download([*build], [f"{name}{of}" for name, of in pinned.items()], bare, place, place / INSIDE)
        publish(place / INSIDE, target)
    return target


def _wanted(requirements: Iterable[str], image: Image) -> list[Requirement]:
    """The requirements that apply in the image, without their markers."""
    found = []
    for requirement in map(Requirement, requirements):
        if _applies(requirement, image):
            requirement.marker = None
            found.append(requirement)
    return found


def _fetch(wanted: list[Requirement], pinned: dict[str, str], image: Image, place: Path) -> None:
    """Fetches into `place`/INSIDE, until what the markers of the image's Python ask for is there as well."""
    local = {name: version if "+" in version else f"{version}+{IN_IMAGE}" for name, version in image.packages.items()}
    limits = [f"{name}{of}" for name, of in pinned.items() if name not in local]
    limits += [f"{name}=={version}" for name, version in local.items()]
    (place / "image").mkdir()
    for name, version in local.items():
        _empty_wheel(place / "image", name, version)
    for _ in range(ROUNDS):
        folder = place / "round"
        folder.mkdir()
        _pip_download([str(requirement) for requirement in wanted], limits, image, place, folder)
        own = sorted(path for path in folder.iterdir() if canonicalize_name(path.name.partition("-")[0]) not in local)
        lacking = _lacking(own, local, image)
        if not lacking:
            for path in own:
                path.rename(place / INSIDE / path.name)
            return
        wanted += lacking
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
    missing = ", ".join(map(str, lacking))
    raise UserError(f"wheels for Python {image.python}: {missing} still missing after {ROUNDS} tries")


def _empty_wheel(folder: Path, name: str, version: str) -> None:
    stem = f"{name.replace('-', '_')}-{version}"
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as wheel:
        info = f"{stem}.dist-info"
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


def _pip_download(requirements: list[str], limits: list[str], image: Image, place: Path, folder: Path) -> None:
    constraints = place / "constraints.txt"
    constraints.write_text("".join(f"{line}\n" for line in limits), encoding="utf-8")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", *image.pip_options()]
    command += ["--dest", str(folder), "--constraint", str(constraints)]
    if image.packages:
        command += ["--find-links", str(place / "image")]
    done = subprocess.run([*command, *requirements], capture_output=True, text=True)
    if done.returncode != 0:
        lines = [line.strip() for line in done.stderr.splitlines()]
        named = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
        raise UserError(f"wheels for Python {image.python}, {image.platform}: pip: {' '.join(named or lines[-1:])}")


def _lacking(folder: Sequence[Path], local: dict[str, str], image: Image) -> list[Requirement]:
    """What the wheels need in the image and neither they nor it have.

    Raises:
        UserError: one of them needs another release than is there.
    """
    read = {path: _metadata(path) for path in folder}
    versions = local | {canonicalize_name(name): version for name, version, _ in read.values()}
    lacking = []
    for path, (_, _, requires) in read.items():
        for requirement in _wanted(requires, image):
            version = versions.get(canonicalize_name(requirement.name))
            if version is None:
                lacking.append(requirement)
            elif not requirement.specifier.contains(version, prereleases=True):
                raise UserError(f"wheels for Python {image.python}: {path.name} needs {requirement}, not {version}")
    return lacking


def _metadata(path: Path) -> tuple[str, str, list[str]]:
    """Name, version and requirements of a wheel."""
    with zipfile.ZipFile(path) as wheel:
        name = next(name for name in wheel.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name))
        fields = HeaderParser().parsestr(wheel.read(name).decode("utf-8"))
    return str(fields["Name"]), str(fields["Version"]), list(fields.get_all("Requires-Dist") or [])
