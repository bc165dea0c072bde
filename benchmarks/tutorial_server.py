"""The server that the tutorials teach, as the baseline: transformers, one request at a time.

    python -m benchmarks.tutorial_server FOLDER --port 6007

What it does, and what it does badly, is the tutorials': the model is a global, the handler is
`async` and generates on the event loop, so that everybody else waits, and the accelerator's cache
is emptied after each request. How long an answer may be is read from the body, which in the
tutorials is a constant, so that this and other servers can be asked for the same.
"""

import argparse
import datetime
import json
from pathlib import Path
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI, Request

app = FastAPI()
tokenizer: Any = None
model: Any = None


def torch_gc() -> None:
    """Empty the GPU's cache, as the tutorials do after each answer."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.ipc_collect()  # type: ignore[no-untyped-call]


@app.get("/health")
async def health() -> None:
    """Not the tutorials': says when the model is loaded."""


@app.post("/")
async def create_item(request: Request) -> dict[str, Any]:
    """`{"prompt": ...}` in, `{"response", "status", "time"}` out."""
    body = json.loads(await request.body())
    messages = [{"role": "user", "content": body["prompt"]}]
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).to(model.device)
    with torch.no_grad():
        ids = model.generate(
            **inputs, max_new_tokens=body.get("max_new_tokens", 512), do_sample=False
        )
    answer = ids[0, inputs["input_ids"].shape[1] :]
    response = tokenizer.decode(answer, skip_special_tokens=True)
    time = datetime.datetime.now().strftime("%Y-%m-%d %H:%M:%S")
    print(f'[{time}], prompt:"{body["prompt"]}", response:"{response!r}"')
    torch_gc()
    return {"response": response, "status": 200, "time": time}


def main() -> None:
    global tokenizer, model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("folder", type=Path, help="of the checkpoint")
    parser.add_argument("--template", help="chat template, where not the checkpoint's own")
    parser.add_argument("--port", type=int, default=6007)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.folder)
    if options.template:
        tokenizer.chat_template = options.template
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(options.folder, dtype=torch.bfloat16).to(device)
    model.eval()
    uvicorn.run(app, host="127.0.0.1", port=options.port, workers=1, log_level="warning")


if __name__ == "__main__":
    main()
