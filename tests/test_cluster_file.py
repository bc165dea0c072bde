"""The YAML of a cluster: each mistake with its line, and what the command makes of it."""

import dataclasses
import socket
from collections.abc import Callable, Collection
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from service.clients import Client
from service.cluster import applications, command, config, placement, update
from service.cluster.state import State
from service.errors import ConfigError, LaunchError
from tests.conftest import MODEL


def load(folder: Path, text: str) -> config.Cluster:
    file = folder / "cluster.yaml"
    file.write_text(text)
    return config.load(file)


@pytest.mark.parametrize("name", ["a", "'123'", "'1.5'", "'on'", "'null'", "b-2"])
def test_a_model_has_the_name_that_it_is_given(tmp_path: Path, name: str) -> None:
    cluster = load(tmp_path, f"models:\n  {name}: {{model: {MODEL}, replicas: [1, 2]}}\n")
    (model,) = cluster.models.values()
    assert [cluster.default] == [*cluster.models] == [name.strip("'")] == [model.config.name]
    assert (model.min_replicas, model.max_replicas) == (1, 2)


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("models:\n  a: {model: %s}\ndefalt: a\n", 3, "unknown key; did you mean 'default'?"),
        ("models:\n  a:\n    model: %s\n    replica: 2\n", 4, "did you mean 'replicas'?"),
        (
            "models:\n  a:\n    model: %s\n    replicas: [3, 1]\n",
            2,
            "replicas: the first number is the minimum, the second the maximum",
        ),
        ("models:\n  v1: {model: %s}\n", 2, "is a route of the service; choose another name"),
        ("models:\n  invocations: {model: %s}\n", 2, "is a route of the service"),
        ("models:\n  front: {model: %s}\n", 2, "is the name of the front itself"),
        ("models:\n  模型: {model: %s}\n", 2, "none but ASCII letters"),
        ("models:\n  a: {model: %s1}\n", 2, f"did you mean '{MODEL}'?"),
        (
            "models:\n  a: {model: %s}\n  b:\n    model: %s\n    set: {aliases: [a]}\ndefault: a\n",
            3,
            "a is served as 'a' too",
        ),
        (
            "models:\n  chat: {model: %s}\n  b:\n    model: %s\n"
            "    set: {routes: [/chat/all]}\ndefault: b\n",
            3,
            "chat is served as '/chat/all' too",
        ),
        (
            "models:\n  a: {model: %s}\nsettings:\n  cache_dir: /tmp\n",
            4,
            "unknown setting in a file; set SERVICE_CACHE_DIR",
        ),
    ],
)
def test_a_mistake_is_told_with_its_line(
    tmp_path: Path, text: str, line: int, message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        load(tmp_path, text.replace("%s", MODEL))
    place, _, said = str(error.value).partition(": ")
    assert place == f"{tmp_path / 'cluster.yaml'}:{line}" and message in said


@pytest.mark.parametrize(
    ("default", "message"),
    [("", "name the model that answers requests without `model`"), ("default: c\n", "no such key")],
)
def test_of_several_models_one_is_the_default(tmp_path: Path, default: str, message: str) -> None:
    text = f"models:\n  a: {{model: {MODEL}}}\n  b: {{model: {MODEL}}}\n"
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, text + default)
    assert load(tmp_path, f"{text}default: b\n").default == "b"


@pytest.mark.parametrize(
    ("values", "origins", "routes"),
    [
        ("{}", [], []),
        (
            "{engine.allowed_origins: ['https://page.example'], routes: [/v1/chat]}",
            ["https://page.example"],
            ["/v1/chat"],
        ),
    ],
)
def test_the_front_is_told_what_the_models_say(
    tmp_path: Path, values: str, origins: list[str], routes: list[str]
) -> None:
    from service.cluster import deployments

    cluster = load(tmp_path, f"models:\n  a: {{model: {MODEL}, set: {values}}}\n")
    with mock.patch("ray.nodes", return_value=[{"Alive": True}]):
        front: Any = deployments._front(cluster, None)
    told = front._bound_deployment.user_config
    assert (told["cors"]["allow_origins"], told["routes"]) == (origins, routes)


GIB = 2**30


@pytest.mark.parametrize(
    ("model", "nodes", "message"),
    [
        ("{model: qwen2-7b-instruct}", [{"CPU": 2, "memory": 16 * GIB}], None),
        ("{model: qwen2-7b-instruct}", [{"CPU": 2, "memory": 8 * GIB}], "need 14 GiB or more"),
        (
            "{model: qwen2-7b-instruct, set: {engine.dtype: float32}}",
            [{"CPU": 2, "memory": 16 * GIB}],
            "need 28 GiB or more, and the cluster has 16",
        ),
        (
            "{model: qwen2-7b-instruct, set: {engine.quantization: cpu_int8}}",
            [{"CPU": 2, "memory": 8 * GIB}],
            None,
        ),
        ("{gpus: 1, replicas: 2}", [{"CPU": 2, "GPU": 1}] * 2, None),
        ("{gpus: 2}", [{"CPU": 2, "GPU": 2}, {"CPU": 2}], None),
        ("{gpus: 2}", [{"CPU": 2, "GPU": 1}] * 2, "a replica needs 2 GPUs of one node"),
        ("{gpus: 2}", [{"CPU": 2, "GPU": 1}], "all replicas need 2 GPUs, and the cluster has 1"),
        ("{cpus: 3}", [{"CPU": 2, "memory": GIB}] * 2, "a replica needs 3 cores of one node"),
    ],
)
def test_what_the_nodes_lack_is_told(
    tmp_path: Path, model: str, nodes: list[dict[str, float]], message: str | None
) -> None:
    cluster = load(tmp_path, f"models:\n  smollm2-135m-instruct: {model}\n")
    total = {kind: sum(node.get(kind, 0) for node in nodes) for kind in ("CPU", "GPU", "memory")}
    alive = [{"Alive": True, "Resources": node} for node in nodes]
    dead = {"Alive": False, "Resources": {"CPU": 64, "GPU": 8}}
    with (
        mock.patch("ray.cluster_resources", return_value=total),
        mock.patch("ray.nodes", return_value=[*alive, dead]),
    ):
        problems = placement.lacking(cluster)
    assert len(problems) == (message is not None)
    assert (message or "") in "".join(problems)


@pytest.mark.parametrize(
    ("free", "surging"),
    [([{"CPU": 2}, {}], {"a"}), ([{"CPU": 1}, {"CPU": 1}], set()), ([{"CPU": 1}], set())],
)
def test_a_new_replica_comes_first_where_one_node_has_room_for_it(
    tmp_path: Path, free: list[dict[str, float]], surging: set[str]
) -> None:
    cluster = load(tmp_path, f"models:\n  a: {{model: {MODEL}, cpus: 2}}\n")
    total = {"CPU": sum(node.get("CPU", 0) for node in free)}
    of_nodes = {str(number): node for number, node in enumerate(free)}
    with (
        mock.patch("ray.cluster_resources", return_value={"CPU": 8}),
        mock.patch("ray.available_resources", return_value=total),
        mock.patch("ray._private.state.available_resources_per_node", return_value=of_nodes),
    ):
        assert placement.surging(cluster, cluster) == surging


@pytest.mark.parametrize(
    ("host", "address", "said", "unsaid"),
    [
        ("127.0.0.1", None, ["9101 and 8404", "gRPC", "Ray's own"], ["WARNING", "30000"]),
        ("0.0.0.0", None, ["WARNING: 0.0.0.0", "gRPC", "30000 to 31000"], []),
        ("0.0.0.0", "10.0.0.1:6379", ["WARNING: 0.0.0.0", "30000 to 31000", "Ray's own"], []),
    ],
)
def test_what_listens_beside_the_address_is_told(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    host: str,
    address: str | None,
    said: list[str],
    unsaid: list[str],
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if address:
        monkeypatch.setenv("RAY_ADDRESS", address)
    text = f"models:\n  a: {{model: {MODEL}}}\nsettings: {{host: {host}, port: %d}}\n"
    with socket.create_server((host, 0)) as used:
        port = used.getsockname()[1]
        cluster = load(tmp_path, text % port)
        if address is None:
            with pytest.raises(LaunchError, match=f"cannot listen on .* port {port}"):
                command._warn(cluster)
            used.close()
        command._warn(cluster)  # in a cluster of others, HAProxy may have the port
    printed = capsys.readouterr().err
    assert all(words in printed for words in said), printed
    assert not any(words in printed for words in unsaid), printed


class Serve:
    """What `applications` has been told to do, in place of Ray."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, *, outcome: Callable[[], str | None]
    ) -> None:
        self.done: list[tuple[str, Any]] = []
        self.stop = SimpleNamespace(requested=False)
        monkeypatch.setattr(update, "Stop", lambda: self.stop)
        monkeypatch.setattr(applications, "apply", self.apply)
        monkeypatch.setattr(
            applications, "delete", lambda *names, waits=True: self.note("delete", {*names})
        )
        monkeypatch.setattr(applications, "use_keys", lambda clients: None)
        monkeypatch.setattr(applications, "wait", self.wait)
        monkeypatch.setattr(applications, "statuses", dict)
        monkeypatch.setattr(placement, "refused", lambda cluster: [])
        monkeypatch.setattr(placement, "lacking", lambda cluster: [])
        monkeypatch.setattr(placement, "surging", lambda cluster, before: set())
        self.outcome = outcome

    def note(self, what: str, value: Any) -> None:
        self.done.append((what, value))

    def apply(
        self,
        cluster: config.Cluster,
        surge: Collection[str],
        told: config.Cluster | None = None,
    ) -> None:
        self.note("apply", cluster)
        self.note("tell the front", told or cluster)

    def wait(
        self,
        cluster: config.Cluster,
        progress: applications.Progress,
        stopped: Callable[[], bool],
    ) -> str | None:
        self.note("wait", cluster)
        reason = self.outcome()
        return None if stopped() else reason


@pytest.fixture
def served(tmp_path: Path) -> tuple[config.Cluster, State]:
    """A cluster with keys that runs."""
    keys = tmp_path / "keys"
    keys.write_text("anna key-of-anna\n")
    text = f"models:\n  a: {{model: {MODEL}}}\nsettings: {{api_key_file: {keys}}}\n"
    cluster = load(tmp_path, text)
    state = State(tmp_path)
    state.applied = cluster
    return cluster, state


def test_a_bad_version_is_taken_back_and_the_keys_of_now_hold(
    served: tuple[config.Cluster, State], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster, state = served
    keys = {"0" * 64: Client("bert")}

    def fails() -> str:
        state.keys = tmp_path / "keys", keys  # the owner has read the file again
        return "a: it does not start"

    serve = Serve(monkeypatch, outcome=fails)
    changed = dataclasses.replace(cluster, fronts=1)
    with pytest.raises(LaunchError, match="what was served before is served on"):
        update.update(changed, state)
    restored = dataclasses.replace(cluster, clients=keys)
    assert [value for what, value in serve.done if what == "apply"] == [changed, restored]
    assert (state.applied, state.unfinished) == (restored, False)


def test_a_signal_takes_an_update_back_and_after_a_second_the_owner_does(
    served: tuple[config.Cluster, State], monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster, state = served
    changed = dataclasses.replace(cluster, fronts=1)

    def first() -> None:
        serve.stop.requested = True

    def second() -> None:
        raise KeyboardInterrupt

    serve = Serve(monkeypatch, outcome=first)
    with pytest.raises(LaunchError, match="^interrupted; what was served before is served on$"):
        update.update(changed, state)
    assert [value for what, value in serve.done if what == "apply"] == [changed, cluster]
    assert not state.unfinished

    serve = Serve(monkeypatch, outcome=second)
    with pytest.raises(LaunchError, match="^interrupted; the command that runs takes the update"):
        update.update(changed, state)
    assert state.unfinished
    update.restore(state)
    assert [value for what, value in serve.done if what == "apply"] == [changed, cluster]
    assert (state.applied, state.unfinished) == (cluster, False)


@pytest.mark.parametrize("interrupted", [False, True])
def test_an_update_ends_with_the_command_that_runs(
    served: tuple[config.Cluster, State], monkeypatch: pytest.MonkeyPatch, interrupted: bool
) -> None:
    cluster, state = served

    def owner_ends() -> None:
        state.forget()
        serve.stop.requested = interrupted

    serve = Serve(monkeypatch, outcome=owner_ends)
    with pytest.raises(LaunchError, match="the command that runs has ended"):
        update.update(dataclasses.replace(cluster, fronts=1), state)
    # And nothing is taken back.
    assert [what for what, _ in serve.done] == ["apply", "tell the front", "wait"]
    assert state.applied is None


def test_the_front_sends_to_a_new_default_when_it_has_loaded(
    served: tuple[config.Cluster, State], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster, state = served
    (tmp_path / "keys").write_text("bert key-of-bert\n")
    text = f"models:\n  a: {{model: {MODEL}}}\n  b: {{model: {MODEL}}}\ndefault: b\n"
    changed = load(tmp_path, f"{text}settings: {{api_key_file: {tmp_path / 'keys'}}}\n")
    serve = Serve(monkeypatch, outcome=lambda: None)
    update.update(changed, state)
    done = [value for what, value in serve.done if what in ("tell the front", "wait")]
    first, loaded, last, _, again = done
    assert (first.default, first.owners(), first.clients) == (
        "a",
        cluster.owners(),
        changed.clients,
    )
    assert (loaded, last, again) == (changed, changed, changed)


def test_what_is_deleted_may_be_applied_again_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    there, deleted = {"a"}, []

    def delete(name: str, *, _blocking: bool) -> None:
        deleted.append(name)
        there.clear()
        if len(deleted) == 1:
            there.add("a")

    monkeypatch.setattr("ray.serve.delete", delete)
    monkeypatch.setattr(applications, "statuses", lambda: dict.fromkeys(there))
    applications.delete("a")
    assert deleted == ["chat-service-a"] * 2
