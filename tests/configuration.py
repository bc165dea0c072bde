"""Tables made from the schemas and the catalogue: `python -m tests.configuration` writes them."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from service import model_config
from service.api.schema import ContractRequest
from service.cluster.config import ClusterFile, Replicas
from service.model_config import ModelConfig
from service.settings import PREFIX, Settings

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "configuration.md"


def page() -> str:
    """The whole page."""
    return "\n".join(
        [
            "# Configuration reference",
            "",
            "Made from the schemas by `python -m tests.configuration`; do not edit it.",
            "",
            "## A model's YAML",
            "",
            "One value for one run: `--set key.path=value`. Other keys are errors.",
            "",
            "| key | default | meaning |",
            "|---|---|---|",
            *_rows(ModelConfig, ""),
            "",
            "## The service's environment",
            "",
            "| variable | default | meaning |",
            "|---|---|---|",
            *(
                _row(f"{PREFIX}{name.upper()}", field)
                for name, field in Settings.model_fields.items()
            ),
            "",
            "## The file of `chat-service cluster`",
            "",
            "[More than one machine](cluster.md) says when to use it.",
            "",
            "| key | default | meaning |",
            "|---|---|---|",
            *_rows(ClusterFile, ""),
            *_rows(Replicas, "models.NAME."),
            "",
            "## The body of `POST /`",
            "",
            "Other keys are ignored. What is not given comes from the YAML, then from the model's",
            "generation_config.json.",
            "",
            "| key | default | meaning |",
            "|---|---|---|",
            *_rows(ContractRequest, ""),
            "",
        ]
    )


def _rows(section: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield _row(prefix + name, field)
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from _rows(inner, f"{prefix}{name}.")


def _row(name: str, field: FieldInfo) -> str:
    default: Any = field.default
    if field.is_required():
        shown = "required"
    elif field.default_factory is not None or default in (None, ""):
        shown = ""
    else:
        text = str(default).lower() if isinstance(default, bool) else str(default)
        shown = f"`{text.replace(str(Path.home()), '~')}`"
    meaning = re.sub(r"\s+", " ", field.description or "")
    return f"| `{name}` | {shown} | {meaning} |"


def tables() -> dict[Path, str]:
    """The tables of the catalogue, by the page that holds them: the table of that header."""
    rows = model_config.listing()
    families: dict[str, list[str]] = {}
    for row in rows:
        families.setdefault(row["family"], []).append(f"`{row['model']}`")
    short = "".join(f"| {family} | {', '.join(names)} |\n" for family, names in families.items())
    columns = ("model", "chapter", "parameters", "weights", "24 GiB card", "source")
    long = "".join(f"| {' | '.join(row[column] for column in columns)} |\n" for row in rows)
    return {
        ROOT / "README.md": f"| family | models |\n|---|---|\n{short}",
        ROOT / "README.zh.md": f"| 系列 | 模型 |\n|---|---|\n{short}",
        ROOT / "docs" / "models.md": f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|\n{long}",
    }


def with_table(text: str, table: str) -> str:
    """A page in which the table with the same header is this one."""
    header = re.escape(table[: table.index("\n")])
    return re.sub(rf"^{header}\n(\|.*\n)+", lambda _: table, text, count=1, flags=re.M)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    for file, table in tables().items():
        file.write_text(with_table(file.read_text(encoding="utf-8"), table), encoding="utf-8")
