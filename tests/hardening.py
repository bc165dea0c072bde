"""The table of docs/hardening.md, from the tests that show its rows: `python -m tests.hardening`."""

import ast
import sys
from collections import defaultdict
from pathlib import Path

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "hardening.md"
BEGIN, END = "<!-- rows: begin -->\n", "<!-- rows: end -->\n"

# Of each row: the input or fault, and what becomes of it here.
ROWS: dict[int, tuple[str, str]] = {
    1: (
        "`n` or `best_of` huge; thousands of prompts, turns, keys or wrong items in one body",
        "422 with the limit: `SERVICE_MAX_SEQUENCES`, `n` times prompts, on every generating route of vLLM's; "
        "`POST /` takes one prompt and gives one answer; "
        "what a body may hold stands [below](#what-a-body-may-hold)",
    ),
    2: (
        "A body of hundreds of MB, endless, in chunks of a byte, not JSON, nested deep, or behind `Upgrade`",
        "413 at `SERVICE_MAX_BODY_BYTES` before it is read or while it comes; 400 for what is no JSON, "
        "nested deeper than the parser's 201 levels, or in more than 1,000 parts of under 64 bytes; 422 for what is no object; errors are short and repeat no input; "
        "`Upgrade` is ignored, and the body is the request's",
    ),
    3: (
        "Thousands of headers, one huge header, slow headers, a slow body; thousands of connections or of requests sent ahead",
        "431 above 128 headers or 64 KiB of them; 408 after `SERVICE_BODY_TIMEOUT`; above "
        "`SERVICE_MAX_CONNECTIONS` the longest idle one is closed, or the newcomer gets 503; health checks are answered; of requests sent ahead 16 are answered",
    ),
    4: (
        "A regular expression, grammar or JSON schema that explodes",
        "none in `POST /`; elsewhere at most 16 KiB (tools only where the model must call them), 1,024 characters for an expression, "
        "at most 32 properties where a schema counts them, patterns and bounds that compile in about 0.1 s, and the client's deadline",
    ),
    5: ("A grammar that the engine cannot compile", "that request fails with 400, or with 500 where only the engine finds it out; the next one works"),
    6: (
        "`chat_template` or hostile `chat_template_kwargs` from the client",
        "refused: the template and its own arguments are the server's",
    ),
    7: (
        "`min_tokens`, `stop`, `bad_words`, `allowed_token_ids`, `logit_bias`, ... beyond bounds",
        "refused: by vLLM where a token is not in the vocabulary, by us where a string is too long",
    ),
    8: (
        "NaN, infinity, 1e38, negative numbers, numbers as strings, a float for `top_k`",
        "422 on `POST /`, 400 on vLLM's routes; but those read `\"1\"` as 1, and take any number as a `logit_bias`",
    ),
    9: (
        "A prompt that is empty, whitespace, null, a list, lone surrogates, NUL, control tokens, as "
        "long as the context, a million characters",
        "an answer, or 422 or 400, as the table of tests says for each route; too long is 422",
    ),
    10: ("The same request id twice", "each has its own answer, under that id"),
    11: ("Prompt embeddings, tensors", "refused"),
    12: (
        "Media URLs; an X-Request-Id with a URL, spaces, controls; routes that change the engine",
        "nothing is fetched; the id is replaced; those routes are off, and a server with "
        "`VLLM_SERVER_DEV_MODE`, or another variable of vLLM that undoes a promise, does not start",
    ),
    13: (
        "No key, a wrong key, odd paths and Host headers",
        "401 on every route but `GET /`, the health checks and a browser's question whether it may send the key, decided before routing; "
        "`/metrics` by a setting; a WebSocket is never opened",
    ),
    14: ("Timing of the key's comparison", "the SHA-256 of a key is compared with each that is kept, in constant time, also after the one that fits"),
    15: (
        "`trust_remote_code`, unpinned revisions",
        "remote code is refused, and not downloaded; a YAML may name a revision, and follows `master` when it does not",
    ),
    16: ("Reachable sockets of the engine", "by default all that listens is on loopback, the service and the engine's own ports alike"),
    17: (
        "Paths, addresses or stacks in errors",
        "vLLM's texts are replaced by ours, which name keys and limits and end in the request's id; "
        "patterns run over the first 1,000 characters of a text alone; what nobody foresaw is 500 with the id alone",
    ),
    18: (
        "Timing of the prefix cache between clients",
        "`SERVICE_CACHE_PER_KEY=true` gives each key a cache of its own; off by default",
    ),
    19: (
        "A client that leaves while it is queued or its answer is made, whole or streamed; one that never reads",
        "its place is free within a second, and the engine has dropped it within two; a reader that does not read is dropped "
        "after `SERVICE_WRITE_TIMEOUT`. A client that closes its sending half has left",
    ),
    20: (
        "The engine is killed, dies or hangs",
        "requests in flight get 503 with the reason, /health/ready turns 503, the process exits 1; an API process that hangs ends the service too",
    ),
    21: (
        "SIGTERM under load, twice, or while loading",
        "what was let in has `SERVICE_DRAIN_TIMEOUT` to finish and then gets 503; the rest gets 503 and Retry-After, "
        "exit 0; the second answers everyone with 503 and stops at once; one while loading stops at once",
    ),
    22: (
        "Ten times the load; one key that floods",
        "a bounded queue; 429 at once with a Retry-After from the measured rate; the others keep "
        "their share; a key may have limits by the minute",
    ),
    23: (
        "Disk full, download cut, wrong hash, two downloads at once",
        "one line that says what is wrong; a download resumes, and the second of two waits; nothing half-loaded is served",
    ),
    24: ("A YAML with unknown keys, wrong types, tabs, duplicates", "exit 2: all of them in their order, each with file, line, nearest name"),
    25: (
        "Line breaks, escapes, keys and prompts for logs; paths for metric labels",
        "logs and labels hold nothing of a client's choosing but a harmless request id; with `SERVICE_LOG_PROMPTS=true` a prompt is on one line, its escapes written out",
    ),
}  # fmt: skip


def shown() -> dict[int, list[str]]:
    """Row to the tests that are marked with it, as `file: name`."""
    tests: dict[int, list[str]] = defaultdict(list)
    for file in sorted(TESTS.glob("test_*.py")):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef):
                for mark in node.decorator_list:
                    if isinstance(mark, ast.Call) and getattr(mark.func, "id", "") == "hardening":
                        for row in mark.args:
                            tests[ast.literal_eval(row)].append(f"{file.stem}.{node.name}")
    return tests


def table() -> str:
    tests = shown()
    lines = ["| # | input or fault | what becomes of it | shown by |", "|---|---|---|---|"]
    for number, (fault, result) in ROWS.items():
        names = "<br>".join(f"`{name}`" for name in tests[number])
        lines.append(f"| {number} | {fault} | {result} | {names} |")
    return "\n".join(lines) + "\n"


def page(text: str) -> str:
    """The page with its table made anew."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + table() + END + after


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    sys.exit(0)
