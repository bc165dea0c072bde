"""vLLM's engine without a server, as the measure of what it can do: one JSON line in, one out.

    python -m benchmarks.offline MODEL [key.path=value ...]

It runs with the model's YAML as `serve` does, in the same environment. A line names `seed`,
`prompt_tokens`, `answer_tokens`, `requests` and `concurrency`; the answer has `seconds` and
`tokens`. As `LLM.generate` does, it adds requests and steps until none is left, but keeps no more
than `concurrency` in the engine.
"""

import json
import sys
import time
from typing import Any

from benchmarks import workload
from service import model_config, prompting, settings
from service.launch import server
from service.preflight import check


def main() -> None:
    config, origins = model_config.load(sys.argv[1], sys.argv[2:])
    chosen = settings.load()
    with server.prepared(config, origins, chosen) as (args, _):
        server.fetch_files(args, config, chosen)
        server.choose_compiled(args, config)
        from vllm import LLM, EngineArgs

        llm = LLM.from_engine_args(EngineArgs.from_cli_args(args))
        with check.rendering(args, llm.llm_engine.vllm_config) as (render, _):

            def prompt(request: workload.Ask) -> dict[str, Any]:
                turns = prompting.render(request.prompt, None, config.prompt)
                return {"prompt_token_ids": render(turns, True)}

            print(json.dumps({"ready": True}), flush=True)
            for line in sys.stdin:
                print(json.dumps(_run(llm.llm_engine, prompt, **json.loads(line))), flush=True)
        llm.llm_engine.engine_core.shutdown()


def _run(
    engine: Any,
    prompt: Any,
    *,
    seed: str,
    prompt_tokens: int,
    answer_tokens: int,
    requests: int,
    concurrency: int,
) -> dict[str, float]:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    lengths = workload.Lengths(prompt_tokens, answer_tokens)
    source = workload.requests(f"{seed}-0", lengths)
    waiting = [next(source) for _ in range(requests)]
    prompts = [prompt(request) for request in waiting]
    began = time.perf_counter()
    tokens = added = running = 0
    while added < requests or running:
        while added < requests and running < concurrency:
            params = SamplingParams(
                temperature=0,
                max_tokens=waiting[added].max_tokens,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            engine.add_request(f"{seed}-{added}", prompts[added], params)
            added += 1
            running += 1
        for output in engine.step():
            if output.finished:
                running -= 1
                tokens += len(output.outputs[0].token_ids)
    return {"seconds": time.perf_counter() - began, "tokens": tokens}


if __name__ == "__main__":
    main()
