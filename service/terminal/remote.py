"""A client of one running server: its answers and its metrics."""

import json
import math
import re
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from service.errors import ConfigError, ServiceError

# Name -> labels -> value.
Metrics = dict[str, dict[tuple[tuple[str, str], ...], float]]


_PASSWORD = re.compile(r"(?<=://).*@")
# The statuses of requests that were refused because of the load.
REFUSED = ("429", "503")


def full_url(url: str) -> str:
    """Return a URL with its scheme, without a slash at its end."""
    return (url if "://" in url else f"http://{url}").rstrip("/")


def without_password(url: str) -> str:
    """Return a URL as messages may show it, without a user and a password."""
    return _PASSWORD.sub("", url)


def client(url: str, timeout: float) -> httpx.Client:
    """Return a client of a server. No proxy of the environment stands between."""
    context = ssl.create_default_context()  # reads SSL_CERT_FILE
    return httpx.Client(base_url=full_url(url), timeout=timeout, trust_env=False, verify=context)


class Remote:
    """A client of one server, with an optional API key."""

    def __init__(self, url: str, key: str | None) -> None:
        self.url = without_password(full_url(url))
        with self._explained():
            self._client = client(url, timeout=30)
        if key := (key or "").strip():  # the server strips its key too
            if not key.isprintable():
                raise ConfigError(
                    "the API key has a character that no header may hold; correct --key or "
                    "SERVICE_API_KEY"
                )
            self._client.headers.update([(b"authorization", f"Bearer {key}".encode())])

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn errors into a ServiceError: the server does not answer, or is another program."""
        try:
            yield
        except httpx.HTTPError as e:
            if "CERTIFICATE_VERIFY_FAILED" in str(e):
                raise ServiceError(
                    f"{self.url}: its certificate is not trusted; name it in SSL_CERT_FILE"
                ) from None
            raise ServiceError(f"{self.url}: {e}; is the server running? (--url)") from None
        except UnicodeEncodeError as e:
            raise ServiceError(f"this cannot be sent: {e.reason}") from None
        except (httpx.InvalidURL, UnicodeError):  # which may quote a password
            raise ServiceError(f"{self.url}: this is no address of a server (--url)") from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ServiceError(
                f"{self.url}: this is not the answer of chat-service (--url)"
            ) from None

    def has_history(self) -> bool:
        """Whether the model supports a history of turns. Raises ServiceError."""
        with self._explained():
            return bool(self._get("/").json()["style"] == "chat")

    def models(self) -> list[str]:
        """Return the names that a request may have as `model`. Raises ServiceError."""
        with self._explained():
            return [str(model["id"]) for model in self._get("/v1/models").json()["data"]]

    def _get(self, path: str) -> httpx.Response:
        response = self._client.get(path, headers={"accept": "application/json"})
        if response.status_code != 200:
            raise ServiceError(_reason(response))
        return response

    def answer(
        self, prompt: str, history: list[Any], options: dict[str, Any]
    ) -> Iterator[str | dict[str, Any]]:
        """Yield new text as it comes, then the whole response object. Raises ServiceError."""
        body = {"prompt": prompt, "history": history, "stream": True, "details": True, **options}
        with self._explained():
            with self._client.stream("POST", "/", json=body, timeout=None) as response:
                if response.status_code != 200:
                    response.read()
                    raise ServiceError(_reason(response))
                for event in map(json.loads, _data(response)):
                    if "error" in event:
                        raise ServiceError(event["error"]["message"])
                    if "delta" in event:
                        yield event["delta"]
                        continue
                    if not {"response", "history"} <= event.keys():
                        raise ValueError
                    yield event
                    return
            raise ServiceError(f"{self.url}: the answer broke off")

    def metrics(self) -> Metrics:
        """Return all samples by name and labels. Raises ServiceError."""
        samples: Metrics = {}
        with self._explained():
            for family in text_string_to_metric_families(self._get("/metrics").text):
                for sample in family.samples:
                    if math.isnan(sample.value):
                        continue
                    labels = tuple(sorted(sample.labels.items()))
                    samples.setdefault(sample.name, {})[labels] = sample.value
            if "service_requests_in_flight" not in samples:
                raise ValueError
        return samples


def _data(response: httpx.Response) -> Iterator[bytes]:
    """Yield the data of each server-sent event.

    Lines end at CR or LF alone. `iter_lines` of httpx ends them also at U+2028, U+2029 and U+0085,
    which may stand in JSON.
    """
    line = b""
    for chunk in response.iter_bytes():
        *lines, line = re.split(rb"[\r\n]", line + chunk)
        for each in lines:
            if each.startswith(b"data: "):
                yield each.removeprefix(b"data: ")


def _reason(response: httpx.Response) -> str:
    try:
        message = str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        message = response.reason_phrase
    if response.status_code == 401:
        message += " (--key, or SERVICE_API_KEY)"
    retry = response.headers.get("retry-after")
    return f"{response.status_code}: {message}" + (f"; try again in {retry} s" if retry else "")
