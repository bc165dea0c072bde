"""What the pages say exists, and what is made from the schemas is as they are."""

import ast
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from service import errors
from service.api import body_budget, grammar_limits
from service.cluster import config, deployments
from service.launch import start_errors
from service.phase import PATIENCE, Phase
from service.settings import Settings
from tests import configuration, hardening

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
CHINESE = sorted(ROOT.glob("docs/zh/*.md"))
TROUBLESHOOTING = ROOT / "docs" / "troubleshooting.md"


def path_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=path_of)
def test_every_link_leads_to_a_file_and_its_heading(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"https?:", target):
            continue
        name, _, heading = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{page.name}: {target}"
        if heading:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.M)
            anchors = [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings]
            assert heading in anchors, f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=path_of)
def test_every_file_of_the_code_that_is_named_exists(page: Path) -> None:
    for name in re.findall(r"`([a-z_]+/[\w/]+\.py)`", page.read_text(encoding="utf-8")):
        assert (ROOT / name).exists() or (ROOT / "service" / name).exists(), f"{page.name}: {name}"


def test_the_configuration_page_is_made_from_the_schemas() -> None:
    text = configuration.PAGE.read_text(encoding="utf-8")
    assert text == configuration.page(), "run `python -m tests.configuration`"


def test_the_limits_of_the_hardening_page_are_those_of_the_code() -> None:
    page = " ".join(hardening.PAGE.read_text(encoding="utf-8").split())
    default = {name: field.default for name, field in Settings.model_fields.items()}
    small, few = body_budget._SMALL_BYTES, body_budget._SMALL_CONTAINERS
    grammar = grammar_limits.MAX_GRAMMAR_BYTES
    for says in (
        f"`SERVICE_MAX_BODY_BYTES`, {default['max_body_bytes'] / 2**20:.0f} MiB |",
        f"keys of an object | `SERVICE_MAX_ITEMS`, {default['max_items']} |",
        f"objects, arrays, keys and strings | {body_budget.MAX_VALUES:,} |",
        f"| {body_budget.MAX_NUMBERS:,}; {body_budget.MAX_ARRAY:,} in one array, or the context |",
        f"bytes of a key | {body_budget.MAX_KEY_BYTES} |",
        f"must call | {grammar // 1024} KiB |",
        f"a body of more than {small // 1024} KiB, or of more than {few} ",
        f"at most {grammar // 1024} KiB (tools only where the model must call them), "
        f"{grammar_limits.MAX_REGEX:,} characters for an expression, "
        f"at most {grammar_limits.MAX_COUNTED_PROPERTIES} properties",
    ):
        assert says in page, says
    assert (PATIENCE, page.count("six times")) == (6, 2)
    rest = page.partition("otherwise 503, and `status` says ")[2].partition(" |")[0]
    assert set(re.findall(r"`([a-z]+)`", rest)) - {"percent"} == {*Phase} - {Phase.READY}


def test_every_command_of_the_pages_exists() -> None:
    commands = subprocess.run(
        [sys.executable, "-m", "service", "--help"], capture_output=True, text=True, check=True
    ).stdout
    makefile = (ROOT / "Makefile").read_text()
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.S):
            for name in re.findall(r"chat-service ([a-z]+)", block):
                assert re.search(rf"\b{name}\b", commands), f"{page.name}: chat-service {name}"
            for verb in re.findall(r"(?:^|\s)make ([a-z]+)", block):
                assert re.search(rf"^{verb}:", makefile, re.M), f"{page.name}: make {verb}"
            for module in re.findall(r"python -m ([\w.]+)", block):
                path = ROOT / module.replace(".", "/")
                assert path.exists() or path.with_suffix(".py").exists(), f"{page.name}: {module}"


def test_the_chinese_readme_has_the_same_commands() -> None:
    def blocks(name: str) -> list[str]:
        return re.findall(r"```bash\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.S)

    chinese = blocks("README.zh.md")
    assert len(chinese) > 5
    assert set(chinese) <= set(blocks("README.md"))


class Page:
    """The parts of a page that do not depend on its language."""

    def __init__(self, file: Path) -> None:
        text = file.read_text(encoding="utf-8")
        fences = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.M | re.S)
        comments = re.compile(r"(^|\s+)#.*$", re.M)
        self.blocks = [(kind, comments.sub("", body)) for _, kind, body in fences.findall(text)]
        prose = fences.sub("", text)
        self.headings = [len(marks) for marks in re.findall(r"^(#+) ", prose, re.M)]
        # Of each row of each table, the number of cells and what is code in them.
        self.tables = [
            [
                (len(re.findall(r"(?<!\\)\|", row)), sorted(code_in(row)))
                for row in rows.splitlines()
            ]
            for rows in re.findall(r"(?:^\|.*\n)+", prose, re.M)
        ]


def code_in(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


@pytest.mark.parametrize("page", CHINESE, ids=path_of)
def test_a_chinese_page_has_what_the_english_one_has(page: Path) -> None:
    chinese, english = Page(page), Page(ROOT / "docs" / page.name)
    assert chinese.headings == english.headings
    assert chinese.blocks == english.blocks
    assert chinese.tables == english.tables


@pytest.mark.parametrize("page", [ROOT / "README.zh.md", *CHINESE], ids=path_of)
def test_a_chinese_page_leads_to_chinese_ones(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s#]+\.md)", page.read_text(encoding="utf-8")):
        file = (page.parent / target).resolve()
        if file.parent == ROOT / "docs" and file.name != page.name:
            assert ROOT / "docs" / "zh" / file.name not in CHINESE, target


def nodes() -> Iterator[list[ast.AST]]:
    """Yield the nodes of each file of the code."""
    for file in (ROOT / "service").rglob("*.py"):
        yield [*ast.walk(ast.parse(file.read_text(encoding="utf-8")))]


def text_of(node: ast.AST) -> str | None:
    """The text that an expression is, with `...` for an f-string's values."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        parts = (part.value if isinstance(part, ast.Constant) else "..." for part in node.values)
        return "".join(map(str, parts))
    return None


def messages() -> Iterator[str]:
    """Yield the texts in the code, but for docstrings."""
    for file in nodes():
        docstrings = {node.value for node in file if isinstance(node, ast.Expr)}
        yield from (text for node in file if node not in docstrings and (text := text_of(node)))


def errors_of_the_command_line() -> Iterator[str]:
    """Yield the texts with which ServiceError and its kinds are made, where they are written."""
    kinds = {
        name
        for name, each in vars(errors).items()
        if isinstance(each, type)
        and issubclass(each, errors.ServiceError)
        and not issubclass(each, errors.RequestError)
    }
    for file in nodes():
        for node in file:
            if isinstance(node, ast.Call) and node.args and isinstance(node.func, ast.Name):
                if node.func.id in kinds and (text := text_of(node.args[0])):
                    yield text


@pytest.fixture(scope="module")
def quotes() -> dict[str, re.Pattern[str]]:
    """What stands in the first column of the troubleshooting page, and what it matches."""
    text = TROUBLESHOOTING.read_text(encoding="utf-8")
    quoted = [q for cell in re.findall(r"^\| ([^|]*) \|", text, re.M) for q in code_in(cell)]
    return {q: re.compile(".*".join(map(re.escape, q.split("...")))) for q in quoted}


def test_the_troubleshooting_page_quotes_what_the_code_says(
    quotes: dict[str, re.Pattern[str]],
) -> None:
    said = [*messages()]
    unknown = [q for q, pattern in quotes.items() if not any(map(pattern.search, said))]
    assert not unknown
    for _, advice in start_errors._ADVICE:
        assert any(pattern.search(advice) for pattern in quotes.values()), advice
    kinds = {
        each.type
        for each in vars(errors).values()
        if isinstance(each, type) and issubclass(each, errors.RequestError)
    }
    assert kinds <= quotes.keys()


def test_the_troubleshooting_page_has_every_error_of_the_command_line(
    quotes: dict[str, re.Pattern[str]],
) -> None:
    said = [*errors_of_the_command_line()]
    assert len(said) > 100
    # Where next to nothing is fixed, the text is another error's or the system's.
    fixed = [text for text in said if len(re.findall(r"[A-Za-z]{2,}", text)) > 2]
    missing = [text for text in fixed if not any(p.search(text) for p in quotes.values())]
    assert not missing


def test_the_applications_of_the_ray_service_are_the_cluster_of_its_file(tmp_path: Path) -> None:
    text = (ROOT / "kubernetes" / "ray-service.yaml").read_text()
    documents = {d["metadata"]["name"]: d for d in yaml.safe_load_all(text)}
    keys, file = tmp_path / "keys", tmp_path / "cluster.yaml"
    keys.write_text("anna key-of-anna\n")
    content = documents["chat-service-cluster"]["data"]["cluster.yaml"]
    file.write_text(content.replace("/etc/chat-service/keys", str(keys)))
    cluster = config.load(file)
    applications = yaml.safe_load(documents["chat-service"]["spec"]["serveConfigV2"])[
        "applications"
    ]
    *models, front = [(a["name"], a["route_prefix"], a["args"].get("name")) for a in applications]
    assert models == [(f"{config.PREFIX}-{name}", f"/{name}", name) for name in cluster.models]
    assert front == (config.PREFIX, "/", None)
    for application in applications:
        given = application["args"]
        assert given["file"] == "/etc/chat-service-cluster/cluster.yaml"
        arguments = deployments.Arguments(**{**given, "file": file})
        build = pkgutil.resolve_name(application["import_path"])
        if arguments.name:  # the front's asks Ray how many nodes there are
            assert build(arguments)
        else:
            assert build is deployments.front


def test_the_manifests_and_compose_give_the_service_time_to_drain() -> None:
    manifests = yaml.safe_load_all((ROOT / "kubernetes" / "chat-service.yaml").read_text())
    pod = next(m for m in manifests if m["kind"] == "Deployment")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    env = {each["name"]: each.get("value") for each in container["env"]}
    pre_stop = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    # The supervisor ends the rest 20 s after SERVICE_DRAIN_TIMEOUT.
    needed = pre_stop + int(env["SERVICE_DRAIN_TIMEOUT"]) + 20
    assert pod["terminationGracePeriodSeconds"] > needed
    assert container["livenessProbe"]["httpGet"]["path"] == "/health/live"
    assert container["startupProbe"]["httpGet"]["path"] == "/health/ready"
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    assert compose["services"]["chat"]["stop_grace_period"] == "55s"
    assert Settings.model_fields["drain_timeout"].default + 20 < 55
    assert "before it kills: 55 s for the default" in hardening.PAGE.read_text(encoding="utf-8")
