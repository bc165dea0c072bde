"""`chat-service chat`: one question, or a conversation with commands."""

import json
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from service.errors import ConfigError, ServiceError
from service.model_config import nearest
from service.prompting import messages_of
from service.terminal import output
from service.terminal.remote import Remote

# Command -> (what follows it, what it does).
_COMMANDS = {
    "/help": ("", "shows this"),
    "/model": ("NAME", "asks this model from now on"),
    "/regenerate": ("", "answers the last question again"),
    "/save": ("FILE", "writes the conversation as JSON"),
    "/system": ("TEXT", "sets the system message; without a text, takes it out"),
}
_LITERAL = "a question that begins with / is typed with //, and Ctrl-D ends"


def chat(remote: Remote, prompt: str | None, options: dict[str, Any], *, as_json: bool) -> None:
    """Answer one prompt, or each line of stdin.

    Raises ServiceError. At a terminal a refusal is printed, and the conversation goes on.
    """
    conversation = _Conversation(remote, dict(options), as_json)
    if prompt is not None:
        conversation.ask(output.typed(prompt))
        return
    if sys.stdin is None:
        return
    at_terminal = sys.stdin.isatty()
    conversation.has_history = remote.has_history()
    if at_terminal:
        with suppress(ImportError):  # some builds of Python have no readline
            import readline  # `input` uses it, for arrow keys

            # In the locale C it would take bytes of UTF-8 for keys with Meta.
            for setting in ("convert-meta off", "input-meta on", "output-meta on"):
                readline.parse_and_bind(f"set {setting}")
        _note("/help lists the commands; Ctrl-D ends.")
    while True:
        try:
            line = output.typed(_read(at_terminal))
        except EOFError:
            return
        except KeyboardInterrupt:
            if not at_terminal:
                raise
            _note("")
            continue
        if not line.strip():
            continue
        try:
            conversation.take(line)
        except KeyboardInterrupt:  # closes the connection, which cancels the request
            _note("")
        except ServiceError as e:
            if not at_terminal:
                raise
            _note(e.lines())


def _read(at_terminal: bool) -> str:
    """Return the next line of stdin. The prompt is on stdout only if that is a terminal."""
    prompt = "> " if at_terminal else ""
    if output.is_terminal():
        return input(prompt)
    print(prompt, end="", file=sys.stderr, flush=True)
    return input()


@dataclass
class _Conversation:
    """The turns so far, and what the next request says beside its prompt."""

    remote: Remote
    options: dict[str, Any]
    as_json: bool
    has_history: bool = True
    history: list[Any] = field(default_factory=list)  # as the server returned it
    unanswered: str | None = None  # the last question, if it was refused or interrupted
    model: str = ""  # that answered last
    files: set[Path] = field(default_factory=set)

    def take(self, line: str) -> None:
        """Do what a line says. Raises ServiceError."""
        word, *rest = line.split(maxsplit=1)
        argument = rest[0].strip() if rest else ""
        if not word.startswith("/") or word.startswith("//"):
            self.ask(line.replace("//", "/", 1) if word.startswith("//") else line)
            return
        if word not in _COMMANDS:
            known = ", ".join(_with_argument(command) for command in _COMMANDS)
            near = nearest(word, _COMMANDS)
            raise ConfigError(f"there is no such command{near}; there are {known}; {_LITERAL}")
        match word:
            case "/help":
                width = max(len(_with_argument(command)) for command in _COMMANDS)
                for command, (_, meaning) in _COMMANDS.items():
                    _note(f"{_with_argument(command):{width}}  {meaning}")
                _note(f"{_LITERAL}; Ctrl-C ends an answer")
            case "/model":
                self._choose(argument)
            case "/regenerate":
                self._regenerate()
            case "/save":
                self._save(argument)
            case "/system":
                self._set_system(argument)

    def ask(self, prompt: str) -> None:
        """Print the answer to a prompt, and remember both. Raises ServiceError."""
        self.unanswered = prompt
        sent = self.history if self.has_history else []
        for part in self.remote.answer(prompt, sent, self.options):
            if isinstance(part, str):
                if not self.as_json:
                    shown = output.visible(part, "\n\t") if output.is_terminal() else part
                    print(shown, end="", flush=True)
                continue
            print(output.json_line(part) if self.as_json else "", flush=True)
            self.history = [*self.history, *part["history"][len(sent) :]]
            self.model = str((part.get("details") or {}).get("model", ""))
            self.unanswered = None

    def _choose(self, name: str) -> None:
        models = self.remote.models()
        if name not in models:
            near = nearest(name, models)
            problem = f"no model has this name{near}" if name else "the name is missing"
            raise ConfigError(f"/model NAME: {problem}; there are {', '.join(models)}")
        self.options["model"] = name
        _note(f"{name} answers from now on")

    def _regenerate(self) -> None:
        before = self.history
        question = self.unanswered
        if question is None:
            messages = messages_of(before)
            if not messages or messages[-1]["role"] != "assistant":
                raise ConfigError("/regenerate: there is no question yet")
            question = messages[-2]["content"]
            self.history = before[: -2 if isinstance(before[-1], dict) else -1]
        try:
            self.ask(question)
        except (KeyboardInterrupt, ServiceError):
            if self.history is not before:  # the earlier answer stays
                self.history, self.unanswered = before, None
            raise

    def _save(self, name: str) -> None:
        if not name:
            raise ConfigError("/save FILE: the name of the file is missing")
        if not self.history:
            raise ConfigError("/save FILE: there is no conversation yet")
        # The keys of POST /, so that the conversation can go on.
        document = {"model": self.model, "history": messages_of(self.history)}
        text = json.dumps(document, ensure_ascii=False, indent=2) + "\n"
        try:
            file = Path(name).expanduser().absolute()
            # One's own file stays until the new one is whole.
            part = file.with_name(f"{file.name}.part") if file in self.files else file
            with part.open("x", encoding="utf-8", errors="backslashreplace") as out:
                try:
                    out.write(text)
                    out.flush()
                except OSError:  # such as a full disk
                    part.unlink()
                    raise
            part.replace(file)
            self.files.add(file)
        except FileExistsError:
            raise ConfigError("/save FILE: there is such a file; choose another name") from None
        except OSError as e:
            raise ServiceError(f"/save FILE: it cannot be written: {e.strerror}") from None
        except (ValueError, RuntimeError) as e:  # a NUL in the name; no home of such a user
            raise ConfigError(f"/save FILE: {e}") from None
        _note("saved")

    def _set_system(self, text: str) -> None:
        if not self.has_history:
            raise ConfigError("/system TEXT: this model completes text; it has no system message")
        turns = [turn for turn in messages_of(self.history) if turn["role"] != "system"]
        self.history = [{"role": "system", "content": text}, *turns] if text else turns
        _note(f"the system message is {'set' if text else 'out'}")


def _with_argument(command: str) -> str:
    return f"{command} {_COMMANDS[command][0]}".rstrip()


def _note(text: str) -> None:
    """Say something that is no answer."""
    print(text, file=sys.stderr, flush=True)
