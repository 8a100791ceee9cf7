"""The examples in README and docs do what they say."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main
from typer.testing import CliRunner

from edgellm.cli.main import app
from edgellm_agent.config import load_settings

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PAGES = "\n".join([README, *(path.read_text() for path in sorted(ROOT.glob("docs/*.md")))])


def blocks(language, text=README):
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


@pytest.mark.parametrize("code", blocks("python", PAGES))
def test_a_python_example_prints_an_answer(serving, code):
    # The tiny engine never ends an answer by itself.
    code = code.replace("unix:///run/edgellm/agent.sock", serving.target).replace(
        '?")]', '?")], max_tokens=8'
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout


def test_the_settings_file_is_accepted(tmp_path):
    (text,) = blocks("toml")
    path = tmp_path / "agent.toml"
    path.write_text(text)
    settings = load_settings(path)
    assert (settings.device, settings.mqtt.host) == ("jetson-01", "broker.local")


COMMANDS = re.findall(r"^    edgellm ((?!-agent).*)$", PAGES, flags=re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_the_options_that_it_is_shown_with(command):
    words = command.split()
    names = [w for w in words if not w.startswith("-")]
    # The words that name the command, then its help.
    group = typer.main.get_command(app)
    path = []
    for name in names:
        found = group.get_command(None, name) if hasattr(group, "get_command") else None
        if found is None:
            break
        path.append(name)
        group = found
    assert path
    shown = CliRunner().invoke(app, [*path, "--help"])
    assert shown.exit_code == 0
    for option in (w for w in words if w.startswith("--")):
        assert option in shown.output
