"""SERVICE_* variables: the only place a deployment is configured."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from service import settings
from service.clients import Client
from service.errors import ConfigError

ROOT = Path(__file__).parent.parent


def test_flags_come_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVICE_PORT", "7000")
    monkeypatch.setenv("SERVICE_HOST", "127.0.0.2")
    loaded = settings.load(host=None, port=7001)
    assert (loaded.host, loaded.port) == ("127.0.0.2", 7001)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("SERVICE_PROT", "1", "SERVICE_PROT: unknown setting; did you mean 'SERVICE_PORT'?"),
        (
            "SERVICE_MAX_WAIT",
            "1",
            "SERVICE_MAX_WAIT: unknown setting; did you mean 'SERVICE_MAX_WAITING'?",
        ),
        ("SERVICE_PORT", "0", "SERVICE_PORT: input should be greater than or equal to 1"),
        (
            "SERVICE_LOG_PROMPTS",
            "perhaps",
            "SERVICE_LOG_PROMPTS: input should be a valid boolean, unable to interpret input",
        ),
    ],
)
def test_a_mistake_names_the_variable(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as error:
        settings.load()
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("env", "says"),
    [
        ({}, "SERVICE_CACHE_DIR: ~ is no folder here; write the whole path"),
        ({"SERVICE_CACHE_DIR": "/x"}, "/x"),
    ],
)
def test_who_has_no_home_names_a_folder(env: dict[str, str], says: str) -> None:
    script = (
        "import os; os.getuid = lambda: 4_242_424  # who is not in /etc/passwd\n"
        "from service import settings\n"
        "try: print(settings.load().cache_dir)\n"
        "except settings.ConfigError as error: print(error)\n"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == f"{says}\n"


@pytest.mark.parametrize(
    "name",  # as Consul, Registrator and some platforms set
    ["NAME", "CHECK_TIMEOUT", "80_CHECK_TIMEOUT", "TIMEOUT", "CHECK_HTTP", "ID", "TAGS"],
)
def test_a_variable_of_somebody_else_is_told_and_left_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    monkeypatch.setenv(f"SERVICE_{name}", "chat")
    assert settings.load() == settings.Settings()
    said = f"SERVICE_{name} is no setting of this service; it is ignored\n"
    assert capsys.readouterr().err.startswith(said)


def test_the_key_comes_from_a_variable_or_a_file_and_is_kept_as_a_hash(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SERVICE_API_KEY", " secret\n")
    loaded = settings.load()
    assert loaded.clients() == {hashlib.sha256(b"secret").hexdigest(): Client("default")}
    assert "secret" not in repr(loaded)
    monkeypatch.setenv("SERVICE_API_KEY", "SHA256:" + hashlib.sha256(b"secret").hexdigest())
    assert settings.load().clients() == loaded.clients()
    monkeypatch.setenv("SERVICE_API_KEY", "\ufeffsecret")  # by a file of variables with such a mark
    with pytest.raises(ConfigError, match="^SERVICE_API_KEY: the character U\\+FEFF"):
        settings.load().clients()
    file = tmp_path / "key"
    file.write_text("secret\n")
    monkeypatch.setenv("SERVICE_API_KEY_FILE", str(file))
    with pytest.raises(ConfigError, match="not both"):
        settings.load().clients()
    monkeypatch.delenv("SERVICE_API_KEY")
    assert settings.load().clients() == loaded.clients()
    file.write_text("\n")
    with pytest.raises(ConfigError, match="empty"):
        settings.load().clients()
    file.unlink()
    with pytest.raises(ConfigError, match="No such file"):
        settings.load().clients()
