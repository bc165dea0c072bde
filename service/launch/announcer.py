"""Prints the ready message of `chat-service serve`."""

import http.client
import json
import os
import signal
import ssl
import threading
import time
import urllib.error
import urllib.request

from service.model_config import ModelConfig
from service.settings import Settings


class Announcer(threading.Thread):
    """A thread that polls /health/ready like a client, and prints a message when it succeeds."""

    def __init__(
        self, config: ModelConfig, settings: Settings, instance: str, *, tls: bool, key: bool
    ) -> None:
        super().__init__(name="announcer", daemon=True)
        self.url = settings.url(tls=tls)
        self.model = config.name
        self.instance = instance
        self.key = key
        self.failure: str | None = None

    def run(self) -> None:
        # Do not verify the certificate: it may not be for this address, and the server is ours.
        tls_context = ssl.create_default_context()
        tls_context.check_hostname = False
        tls_context.verify_mode = ssl.CERT_NONE
        opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=tls_context)
        )
        while True:
            try:
                with opener.open(f"{self.url}/health/ready", timeout=5) as response:
                    if json.load(response).get("instance") == self.instance:
                        break
            except urllib.error.HTTPError as e:
                if e.code in (404, 500):  # vLLM's app, without our plugin
                    self.failure = "this model does not generate text, so POST / cannot serve it"
                    os.kill(os.getpid(), signal.SIGTERM)
                    return
            except (OSError, ValueError, http.client.HTTPException):
                pass
            time.sleep(0.2)
        key = '  -H "Authorization: Bearer <the API key>" \\\n' if self.key else ""
        print(
            f"\nReady: {self.model} answers at {self.url}. Try:\n\n"
            f"curl -X POST {self.url} \\\n{key}"
            '  -d \'{"prompt": "What is the capital of France?"}\'\n\n'
            f"OpenAI clients: base_url {self.url}/v1   Metrics: {self.url}/metrics\n",
            flush=True,
        )
