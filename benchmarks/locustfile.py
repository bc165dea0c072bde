"""Load for POST / and for /v1/chat/completions, plain and streamed.

    locust -f benchmarks/locustfile.py --host http://127.0.0.1:6006

opens locust's page; `--headless -u 64 -r 64 -t 60s Stream` runs without it, and `--processes 2`
uses two processes. Beside locust's own figures there are events for the time to the first token
(TTFT), the time between tokens (ITL) and tokens per second of one answer.

Users are closed loops: each waits for its answer, and asks again. With `--arrival-rate R` each user
asks R times a second on average, by a Poisson process, and does not wait for answers.
"""

import json
import random
import time
from abc import abstractmethod
from collections.abc import Iterator
from http.client import HTTPException
from itertools import pairwise
from pathlib import Path
from typing import IO, Any, ClassVar

import gevent
from locust import events, task
from locust.argument_parser import LocustArgumentParser
from locust.contrib.fasthttp import FastHttpUser
from locust.env import Environment
from locust.exception import StopUser

from benchmarks import workload


@events.init_command_line_parser.add_listener
def _add_options(parser: LocustArgumentParser) -> None:
    lengths = workload.Lengths()
    ours = parser.add_argument_group("Requests")
    ours.add_argument("--model-name", default="smollm2-135m-instruct", help="that /v1 is asked for")
    ours.add_argument("--seed", default="1", help="of prompts, lengths and arrivals")
    ours.add_argument("--prompt-tokens", type=int, default=lengths.prompt, help="median")
    ours.add_argument("--answer-tokens", type=int, default=lengths.answer, help="median")
    ours.add_argument("--arrival-rate", type=float, default=0, help="per second and user; 0: wait")
    ours.add_argument("--requests", type=int, default=0, help="in all per process; 0: no limit")
    ours.add_argument("--answers", type=int, default=0, help="end after so many; 0: no limit")
    parser.add_argument(
        "--api-key", default="", env_var="SERVICE_API_KEY", is_secret=True, help="if one is asked"
    )
    ours.add_argument("--raw", default="", help="write a JSON line for each request to this file")


class Run:
    """What the users of one process share: the requests, and how many are asked and answered."""

    requests: Iterator[workload.Ask]
    chance: random.Random
    left: int
    unanswered: int
    raw: IO[str] | None = None


@events.test_start.add_listener
def _begin(environment: Environment, **_: object) -> None:
    options: Any = environment.parsed_options
    index = getattr(environment.runner, "worker_index", 0)
    lengths = workload.Lengths(options.prompt_tokens, options.answer_tokens)
    Run.requests = workload.requests(f"{options.seed}-{index}", lengths)
    Run.chance = random.Random(f"arrivals-{options.seed}-{index}")
    Run.left = options.requests or 1 << 60
    Run.unanswered = options.answers or options.requests or 1 << 60
    if options.raw:
        path = Path(options.raw)
        Run.raw = path.with_name(f"{path.stem}-{index}{path.suffix}" if index else path.name).open(
            "w", encoding="utf-8"
        )


@events.test_stop.add_listener
def _end(**_: object) -> None:
    if Run.raw:
        Run.raw.close()
        Run.raw = None


class _Client(FastHttpUser):
    abstract = True
    concurrency = 4096  # requests in flight of a user that does not wait
    connection_timeout = 60.0
    network_timeout = 900.0
    path: ClassVar[str]
    streams: ClassVar[bool]
    more_headers: ClassVar[dict[str, str]] = {}

    @abstractmethod
    def body(self, request: workload.Ask) -> dict[str, object]:
        """The request's JSON."""

    @abstractmethod
    def tokens(self, answer: dict[str, Any]) -> int | None:
        """How many tokens an answer has, by its only or last object; None: it does not say."""

    @abstractmethod
    def brings_text(self, event: bytes) -> bool:
        """Whether a streamed event carries a part of the answer."""

    @task
    def ask(self) -> None:
        """One request of the shared sequence."""
        options: Any = self.environment.parsed_options
        if options.arrival_rate:
            gevent.sleep(Run.chance.expovariate(options.arrival_rate))
        if not Run.left:
            raise StopUser
        Run.left -= 1
        request = next(Run.requests)
        if options.arrival_rate:
            gevent.spawn(self._send, request)
        else:
            self._send(request)

    def _send(self, request: workload.Ask) -> None:
        began = time.perf_counter()
        arrivals: list[float] = []
        key = self.environment.parsed_options.api_key
        with self.client.post(
            self.path,
            json=self.body(request),
            headers=self.more_headers | ({"authorization": f"Bearer {key}"} if key else {}),
            stream=True,
            catch_response=True,
        ) as response:
            record: dict[str, Any] = {"start": response.request_meta["start_time"]}
            # The status of a connection that broke is 0.
            ended: dict[str, Any] = {"error": response.status_code or repr(response.error)}
            if response.status_code == 200:
                try:
                    ended = json.loads(self._read(response, began, arrivals))
                except (OSError, ValueError, HTTPException) as e:  # it broke off
                    ended = {"error": repr(e)}
            if error := ended.get("error"):  # a stream may end with one
                record["error"] = str(error)
                response.failure(record["error"])
            else:
                record["tokens"] = self.tokens(ended)
                if record["tokens"] is None:
                    record["text"] = ended["response"]
                response.success()
            record["seconds"] = time.perf_counter() - began
            response.request_meta["response_time"] = record["seconds"] * 1000
        if arrivals:
            record["arrivals"] = [round(arrival, 5) for arrival in arrivals]
            self._report("TTFT", arrivals[0] * 1000)
            for before, after in pairwise(arrivals):
                self._report("ITL", (after - before) * 1000)
        if record.get("tokens"):
            self._report("tokens/s", record["tokens"] / record["seconds"])
        if Run.raw:
            Run.raw.write(json.dumps(record) + "\n")
        Run.unanswered -= 1
        if not Run.unanswered:
            gevent.spawn(self.environment.runner.quit)

    def _read(self, response: Any, began: float, arrivals: list[float]) -> bytes:
        """The only object of an answer, or the last of a stream."""
        if not self.streams:
            content: bytes = response.stream.read()
            return content
        last = b""
        while event := response.stream.readline(b"\n\n"):
            if event == b"data: [DONE]\n\n":
                continue
            if self.brings_text(event):
                arrivals.append(time.perf_counter() - began)
            last = event
        return last.removeprefix(b"data: ")

    def _report(self, kind: str, value: float) -> None:
        self.environment.events.request.fire(
            request_type=kind,
            name=self.path,
            response_time=value,
            response_length=0,
            exception=None,
            context={},
        )


class Plain(_Client):
    """POST /, the whole answer at once."""

    path = "/"
    streams = False

    def body(self, request: workload.Ask) -> dict[str, object]:
        return {
            "prompt": request.prompt,
            "max_new_tokens": request.max_tokens,
            "temperature": 0,
            "repetition_penalty": 1,
            "details": True,
            "stream": self.streams,
        }

    def tokens(self, answer: dict[str, Any]) -> int | None:
        details = answer.get("details")
        return details and int(details["completion_tokens"])

    def brings_text(self, event: bytes) -> bool:
        return event.startswith(b'data: {"delta"')


class Stream(Plain):
    """POST /, streamed."""

    streams = True


class Chat(_Client):
    """/v1/chat/completions, the whole answer at once."""

    path = "/v1/chat/completions"
    streams = False

    def body(self, request: workload.Ask) -> dict[str, object]:
        options: Any = self.environment.parsed_options
        body: dict[str, object] = {
            "model": options.model_name,
            "messages": [{"role": "user", "content": request.prompt}],
            "max_completion_tokens": request.max_tokens,
            "temperature": 0,
            "repetition_penalty": 1,
            "stream": self.streams,
        }
        return body | ({"stream_options": {"include_usage": True}} if self.streams else {})

    def tokens(self, answer: dict[str, Any]) -> int | None:
        return int(answer["usage"]["completion_tokens"])

    def brings_text(self, event: bytes) -> bool:
        return b'"content":""' not in event and b'"choices":[]' not in event


class ChatStream(Chat):
    """/v1/chat/completions, streamed."""

    streams = True


class LlamaCppStream(ChatStream):
    """The same of llama.cpp's server, which closes after a stream although it says keep-alive."""

    more_headers: ClassVar[dict[str, str]] = {"connection": "close"}
