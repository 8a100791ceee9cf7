"""A disk that fills up under a build: one error that names it, nothing half, and the same command goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.builds import BuildHost
from tests.support.small_disk import run_on, small_disk
from tests.support.tiny_models import make_tiny_hf

PAGE, DISK_PAGES = 4096, 1024
PLAIN = ("--no-report", "--no-canary")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_hf(tmp_path_factory.mktemp("source") / "tiny")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(f"The engine reads line {number} of them." for number in range(60)))
    return path


_TWICE = """
import json, subprocess, sys
from pathlib import Path
ballast, out, command = Path(sys.argv[1]), Path(sys.argv[3]), sys.argv[4:]
ballast.write_bytes(bytes(int(sys.argv[2])))
out.mkdir(exist_ok=True)
first = subprocess.run(command, capture_output=True, text=True)
between = sorted(path.name for path in out.iterdir())
ballast.unlink()
second = subprocess.run(command, capture_output=True, text=True)
after = sorted(path.name for path in out.iterdir())
print(json.dumps([first.returncode, first.stderr, between, second.stdout, after]))
"""


@pytest.fixture(scope="module")
def undisturbed(tiny: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, int]:
    """Digest of a calibrated engine, and the pages of its bundle."""
    host = BuildHost(tmp_path_factory.mktemp("host"))
    digest = host.build(tiny, "--quant", "int4-gptq", "--calibration", text, *PLAIN).digest
    files = [path for path in host.target.rglob("*") if path.is_file()]
    return digest, sum(-(-path.stat().st_size // PAGE) for path in files)


@pytest.mark.parametrize(
    ("where", "pages"),
    [
        ("home", 4),  # for the checkpoint's first layer: hidden states do not fit
        ("home", 20),  # for hidden states, not for the layer too
        ("out", 8),  # the weights do not fit
        ("out", 50),  # the weights do, the rest does not
        ("out", -2),  # all but the last two files
    ],
)
def test_a_full_disk_is_one_error_and_with_space_the_same_command_ends_well(
    where: str, pages: int, tiny: Path, text: Path, tmp_path: Path, undisturbed: tuple[str, int]
) -> None:
    digest, all_pages = undisturbed
    disk = tmp_path / "disk"
    places = {"home": tmp_path / "home", "out": tmp_path / "out", where: disk / where}
    room = pages if pages > 0 else all_pages + pages
    command = BuildHost(tmp_path / "host").command("build", tiny, "-o", places["out"] / "a.bundle", "--json")
    told = run_on(
        small_disk(disk, str(DISK_PAGES * PAGE)),
        _TWICE,
        disk / "ballast",
        (DISK_PAGES - room) * PAGE,
        places["out"],
        *("env", f"EDGELLM_HOME={places['home']}", *command),
        *("--quant", "int4-gptq", "--calibration", text, *PLAIN),
    )
    code, errors, between, output, after = json.loads(told)
    assert code == 1
    error = json.loads(errors)["error"]
    if pages > 0:
        assert str(places[where]) in error["message"]
        assert "bytes free" in error["message"]
        assert error["hint"].startswith("free some space and run it again")
    else:
        assert "No space left on device" in error["message"]
    assert between == []
    assert json.loads(output)["digest"] == digest
    assert after == ["a.bundle"]
