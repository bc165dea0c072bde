"""LoRA adapters: what does not fit is told before loading, and what fits answers as if merged."""

import json
import shutil
from collections.abc import Iterator
from inspect import getsource, signature
from pathlib import Path
from typing import Any, get_args

import httpx
import openai
import pytest
import torch
from playwright.sync_api import Browser, expect
from safetensors.torch import load_file, save_file
from vllm.lora.ops.torch_ops import lora_ops
from vllm.plugins import load_general_plugins

from service import model_config, own_model, vllm_arguments, weights
from service.errors import ConfigError, WeightsError
from service.model_config.schema import AdapterSource
from service.models import vllm_private
from service.preflight import reference
from service.weights import adapter
from testing import checkpoints
from testing.server import Server, free_port
from tests import warm
from tests.conftest import MODEL, PATIENCE, logged
from tests.engine import FORKED, PROMPTS, Answer, ask, engine, read
from tests.test_chat_page import browser as browser

BASE = "qwen2-7b-instruct"
# As people name them.
FOLDERS = {
    "文档": "我的 模型",
    "my": "output/checkpoint-30",
    "scaled": "scaled",
    "peft": "peft/checkpoint-500",
    "ranks": "ranks",
}
SERVED = [BASE, "Qwen2-7B-Instruct", *FOLDERS]  # with its alias
NAMES = ", ".join(SERVED)
SEVEN = [*(f"{name}_proj" for name in "qkvo"), "gate_proj", "up_proj", "down_proj"]
# As the book trains most of its models; and Yi's list, which names a module that is not there, with
# what else peft can do.
PEFT: dict[str, dict[str, Any]] = {
    "peft": {"target_modules": SEVEN, "r": 8, "lora_alpha": 32, "lora_dropout": 0.1},
    "ranks": {
        "target_modules": ["q_attn", *SEVEN[1:]],
        "r": 16,
        "rank_pattern": {"down_proj": 4, "1.self_attn.k_proj": 24},
        "lora_alpha": 8,
        "alpha_pattern": {"o_proj": 40},
        "use_rslora": True,
    },
}
# What a Trainer, LLaMA-Factory and ms-swift leave beside.
BESIDE = (
    "optimizer.pt",
    "rng_state.pth",
    "scheduler.pt",
    "training_args.bin",
    "trainer_state.json",
    "args.json",
    "README.md",
    "Modelfile",
    "latest",
    "zero_to_fp32.py",
)
QUIET = ("engine.dtype=float32", "engine.enforce_eager=true", "engine.max_model_len=512")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, adapters of it, and the base with each of them merged."""
    folder = tmp_path_factory.mktemp("own")
    base = checkpoints.write("qwen2", folder / "base")
    kinds: dict[str, dict[str, Any]] = {
        "文档": {"seed": 1, "rank": 4},
        "my": {"seed": 2, "rank": 12, "binary": True, "modules": "[qv]_proj"},
        "scaled": {"seed": 3, "rank": 8, "use_rslora": True},
    }
    for name, kind in kinds.items():
        checkpoints.write_adapter(folder / FOLDERS[name], base, folder / f"merged {name}", **kind)
    for name, options in PEFT.items():
        write_with_peft(folder / FOLDERS[name], base, folder / f"merged {name}", **options)
    for name in BESIDE:
        (folder / FOLDERS["my"] / name).write_text("{}")
        (folder / "merged peft" / name).write_text("{}")
    shutil.copy(base / "tokenizer.json", folder / FOLDERS["my"])
    return folder


def write_with_peft(folder: Path, base: Path, merged: Path, **options: Any) -> None:
    """Write an adapter, and the base with it merged, as docs/your-own-model.md says."""
    from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))
    for name, parameter in adapted.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(folder)
    trained = AutoPeftModelForCausalLM.from_pretrained(folder, torch_dtype="auto")
    trained.merge_and_unload().save_pretrained(merged)
    AutoTokenizer.from_pretrained(base).save_pretrained(merged)


def sets(files: Path) -> list[str]:
    return checkpoints.arguments("qwen2", files / "base", *QUIET)


def words(option: str, values: list[str]) -> list[str]:
    return [word for value in values for word in (option, value)]


@pytest.fixture(scope="module")
def server(files: Path) -> Iterator[Server]:
    asked = [*words("--set", [*sets(files), "default_adapter=my"])]
    named = words("--adapter", [f"{name}={files / folder}" for name, folder in FOLDERS.items()])
    with warm.Server.service(files / "log", BASE, *asked, *named) as server:
        yield server


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=PATIENCE, trust_env=False) as client:
        yield client


# vLLM takes no adapter in their table of tokens. In the others it is adapted too, as OpenELM's
# chapter does.
NO_TABLE = {"qwen2", "internlm2", "chatglm3", "characterglm", "glm4"}
# The first is BlueLM; the second has experts.
NOT_HERE = {"bluelm_32k", "deepseek_moe"}


@pytest.mark.parametrize("name", [n for n in checkpoints.BUILDERS if n not in NOT_HERE])
def test_an_adapter_of_all_matrices_acts_as_if_merged(name: str, tmp_path: Path) -> None:
    base = checkpoints.write(name, tmp_path / "base")
    keys: dict[str, Any] = {"rank": 12, "embeddings": name not in NO_TABLE}
    lora = checkpoints.write_adapter(tmp_path / "lora", base, tmp_path / "merged", **keys)
    found = inspect(lora, base, known_as=[str(base)])
    assert (found.rank, found.problems, found.warnings) == (12, [], [])
    rank = adapter.largest_rank([found])
    with engine(base, enable_lora=True, max_lora_rank=rank) as llm:
        plain, adapted = ask(llm), ask(llm, lora=str(lora))
    assert [answer.tokens for answer in plain] != [answer.tokens for answer in adapted]
    compare(adapted, tmp_path / "merged")
    sequences = [p + answer.tokens for p, answer in zip(PROMPTS, adapted, strict=True)]
    merged = reference.logits(tmp_path / "merged", sequences)
    for rows, same in zip(merged, reference.logits(base, sequences, lora), strict=True):
        torch.testing.assert_close(rows, same, atol=1e-3, rtol=1e-3)


def compare(answers: list[Answer], merged: Path) -> None:
    """Answers to PROMPTS, with the reference's on merged weights."""
    sequences = [p + answer.tokens for p, answer in zip(PROMPTS, answers, strict=True)]
    logits = reference.logits(merged, sequences)
    for prompt, answer, rows in zip(PROMPTS, answers, logits, strict=True):
        rows = rows[len(prompt) - 1 : -1].log_softmax(-1)
        assert rows.argmax(-1).tolist() == answer.tokens
        for row, place in zip(rows, answer.logprobs, strict=True):
            assert all(abs(float(row[int(id)]) - v) < 1e-3 for id, v in place.items())


# OpenELM's with KV heads that need not be repeated for two workers.
ON_TWO: dict[str, dict[str, Any]] = {
    "baichuan2": {},
    "qwen2": {},
    "openelm": {"num_query_heads": [8, 8, 12], "num_kv_heads": [2, 2, 4]},
}


def test_two_tensor_parallel_workers_act_as_if_merged(tmp_path: Path) -> None:
    arguments = {"tensor_parallel_size": 2, "enable_lora": True, "max_lora_rank": 16}
    runs = []
    for name, changes in ON_TWO.items():
        base = checkpoints.write(name, tmp_path / name, **changes)
        keys: dict[str, Any] = {"rank": 12, "embeddings": name not in NO_TABLE}
        lora = checkpoints.write_adapter(
            tmp_path / f"{name}-a", base, tmp_path / f"{name}-m", **keys
        )
        runs.append((arguments, str(base), str(lora)))
    for name, answers in zip(ON_TWO, read(warm.run(*FORKED, json.dumps(runs))), strict=True):
        compare(answers, tmp_path / f"{name}-m")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("bgmv_shrink", [0.5]),
        ("bgmv_expand", [True]),
        ("bgmv_expand", [False]),
        ("bgmv_expand_slice", [3, 16, True]),
        ("bgmv_expand_slice", [3, 16, False]),
    ],
)
def test_products_are_those_of_vllm_and_the_base_has_none(
    name: str, arguments: list[Any], dtype: torch.dtype
) -> None:
    vllms: dict[str, Any] = {}
    exec(getsource(lora_ops), vllms)  # in this process its functions may be ours by now
    ours, theirs = getattr(vllm_private, name), vllms[name]
    assert list(signature(ours).parameters) == list(signature(theirs).parameters)
    torch.manual_seed(0)
    adapters = torch.tensor([0, 2, -1, 1, 0, 2])
    inputs, weights = torch.randn(6, 32, dtype=dtype), torch.randn(4, 1, 16, 32, dtype=dtype)
    weights[3] = torch.nan  # of an adapter that is in no token
    before = torch.randn(6, 20, dtype=dtype)
    output, expected = before.clone(), before.clone()
    ours(inputs, weights, output, adapters, *arguments)
    theirs(inputs, weights, expected, adapters, *arguments)
    torch.testing.assert_close(output[adapters >= 0], expected[adapters >= 0])
    if arguments[-1] is True:
        assert torch.equal(output[2], before[2])


def test_ranks_are_those_of_vllm() -> None:
    from vllm.config.lora import MaxLoRARanks

    assert adapter.RANKS == get_args(MaxLoRARanks)


def test_v1_answers_as_the_merged_weights_do(http: httpx.Client, files: Path) -> None:
    prompt = PROMPTS[1]
    answers = set()
    for name in (*FOLDERS, BASE):
        body = {"model": name, "prompt": prompt, "max_tokens": 12, "temperature": 0}
        body |= {"logprobs": 5, "ignore_eos": True, "return_tokens_as_token_ids": True}
        (choice,) = http.post("/v1/completions", json=body).json()["choices"]
        given = choice["logprobs"]
        tokens = [int(token.partition(":")[2]) for token in given["tokens"]]
        merged = files / ("base" if name == BASE else f"merged {name}")
        (rows,) = reference.logits(merged, [prompt + tokens])
        rows = rows[len(prompt) - 1 : -1].log_softmax(-1)
        assert rows.argmax(-1).tolist() == tokens
        for row, place in zip(rows, given["top_logprobs"], strict=True):
            for token, value in place.items():
                assert abs(float(row[int(token.partition(":")[2])]) - value) < 1e-3
        answers.add(tuple(tokens))
    assert len(answers) == 1 + len(FOLDERS)


def test_the_contract_answers_as_the_merged_model_does(http: httpx.Client, files: Path) -> None:
    body = {"prompt": "山东省最高的山", "temperature": 0, "max_new_tokens": 16, "details": True}
    # A folder with a merged model, given as the model itself.
    asked = words("--set", ["engine.kv_cache_memory_bytes=64M", *QUIET])
    with warm.Server.service(files / "log-merged", str(files / "merged peft"), *asked) as merged:
        expected = httpx.post(merged.url, json=body, timeout=PATIENCE, trust_env=False).json()
        assert "is a model: it is served as 'merged-peft' with its own" in merged.log.read_text()
    assert expected["details"]["model"] == "merged-peft"
    answer = http.post("/", json={**body, "model": "peft"}).json()
    assert answer["response"] == expected["response"]
    assert answer["details"]["model"] == "peft"
    answer = http.post("/", json={**body, "model": "my"}).json()
    by_default = http.post("/", json=body).json()
    assert by_default["response"] == answer["response"] != expected["response"]
    assert by_default["details"]["model"] == "my"
    of_base = http.post("/", json={**body, "model": BASE}).json()
    assert of_base["response"] != answer["response"]
    assert of_base["details"]["model"] == BASE
    stream = http.post("/", json={**body, "model": "文档", "stream": True}).text
    last = json.loads(stream.strip().split("\n\n")[-1].removeprefix("data: "))
    assert last["details"]["model"] == "文档"
    assert last["response"] == http.post("/", json={**body, "model": "文档"}).json()["response"]


def test_each_of_two_api_processes_knows_them(
    http: httpx.Client, files: Path, tmp_path: Path
) -> None:
    two = ("engine.api_server_count=2", "default_adapter=ranks")
    names = ("my", "ranks")
    asked = words("--set", [*sets(files), *two])
    asked += words("--adapter", [f"{name}={files / FOLDERS[name]}" for name in names])
    body = {"prompt": "山东省最高的山", "temperature": 0, "max_new_tokens": 8}
    expected = {name: http.post("/", json={**body, "model": name}).json() for name in names}
    with warm.Server.service(tmp_path / "log", BASE, *asked) as server:
        for number in range(12):  # by connections of their own, which both processes accept
            name = names[number % 2]
            told = {"model": name} if number < 11 else {}
            answer = httpx.post(server.url, json=body | told, timeout=PATIENCE, trust_env=False)
            assert answer.json()["response"] == expected[name]["response"]


def test_an_unknown_model_is_404_with_the_names(http: httpx.Client) -> None:
    for body in ({"prompt": "hi", "model": "secret"}, {"prompt": "hi", "model": ""}):
        answer = http.post("/", json=body)
        assert answer.status_code == 404
        assert (answer.json()["response"], answer.json()["status"]) == ("", 404)
        error = answer.json()["error"]
        assert (error["type"], error["param"]) == ("not_found", "model")
        assert f"this server has {NAMES} (" in error["message"]
        assert "secret" not in answer.text
    assert http.post("/", json={"prompt": "hi", "model": 1}).status_code == 422


def test_v1_takes_the_same_names_and_shows_no_paths(server: Server, files: Path) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="EMPTY") as client:
        assert [model.id for model in client.models.list()] == SERVED
        assert str(files) not in client.models.list().to_json()
        turns: Any = [{"role": "user", "content": "你好"}]
        answer = client.chat.completions.create(model="my", messages=turns, max_tokens=2)
        assert answer.model == "my"
        with pytest.raises(openai.NotFoundError) as error:
            client.chat.completions.create(model="secret", messages=turns)
    assert f"this server has {NAMES}" in str(error.value)


def test_the_log_line_and_the_metrics_carry_the_served_name(
    server: Server, http: httpx.Client
) -> None:
    body = {"prompt": "hi", "max_new_tokens": 2}
    http.post("/", json=body, headers={"X-Request-Id": "of-default"})
    http.post("/", json={**body, "model": "文档"}, headers={"X-Request-Id": "of-named"})
    chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    url = "/v1/chat/completions"
    http.post(url, json={**chat, "model": "scaled"}, headers={"X-Request-Id": "of-v1"})
    http.post(url, json={**chat, "model": "secret"}, headers={"X-Request-Id": "of-unknown"})
    for id, name in (("of-default", "my"), ("of-named", "文档"), ("of-v1", "scaled")):
        assert logged(server, f"id={id} ")
        (line,) = [line for line in server.log.read_text().splitlines() if f"id={id} " in line]
        assert f" model={name} " in line
    assert logged(server, "id=of-unknown ") and "secret" not in server.log.read_text()
    assert logged(server, f"Ready: my, on {BASE}, answers at {server.url}")
    metrics = http.get("/metrics").text
    for name in ("文档", "my", "scaled"):
        counted = f'service_tokens_total{{client="anonymous",kind="generation",model="{name}"}} '
        assert float(metrics.partition(counted)[2].partition("\n")[0]) >= 2
    assert "secret" not in metrics


def test_the_index_names_the_model_that_answers(http: httpx.Client) -> None:
    assert http.get("/").json()["model"] == "my"


def test_the_page_lets_one_choose(server: Server, browser: Browser) -> None:
    page = browser.new_page(locale="en-US")
    page.goto(server.url)
    chooser = page.get_by_label("model")
    expect(chooser).to_have_value("my", timeout=PATIENCE * 1000)
    assert chooser.locator("option").all_inner_texts() == [BASE, *FOLDERS]  # no alias
    chooser.select_option("文档")
    page.locator("#prompt").fill("hi")
    with page.expect_request(lambda request: request.method == "POST") as asked:
        page.keyboard.press("Enter")
    assert json.loads(asked.value.post_data or "")["model"] == "文档"
    page.close()


def test_check_and_verify_know_adapters(files: Path) -> None:
    named = words("--adapter", [f"my={files / FOLDERS['my']}", f"no={files / 'bad'}"])
    asked = words("--set", sets(files))
    checkpoints.write_adapter(files / "bad", files / "base", use_dora=True)
    done = warm.run("check", BASE, *asked, *named)
    assert done.returncode == 1, done.stderr
    assert "problem: adapter no: it was trained with DoRA; merge it" in done.stdout
    assert "engine.max_lora_rank  " in done.stdout and " 16 " in done.stdout
    done = warm.run("check", BASE, *asked, *named[:2])
    assert done.returncode == 0, done.stdout + done.stderr
    done = warm.run("verify", BASE, *asked, *named[:2], "--prompt", "你好", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    compared = json.loads(done.stdout)["comparisons"]
    assert [c["adapter"] for c in compared] == [None, "my"]
    assert compared[0]["token_ids"] == compared[1]["token_ids"]


def test_serve_refuses_in_one_sentence_before_it_loads(files: Path, tmp_path: Path) -> None:
    bad = checkpoints.write_adapter(tmp_path / "bad", files / "base", modules_to_save=["lm_head"])
    done = warm.run(
        "serve",
        BASE,
        *words("--set", sets(files)),
        "--adapter",
        f"bad={bad}",
        "--port",
        str(free_port()),
    )
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "adapter bad: it holds whole matrices beside LoRA's (modules_to_save); merge" in line
    assert "Traceback" not in done.stderr


PROBLEMS: dict[str, tuple[dict[str, Any], str]] = {
    "DoRA": ({"use_dora": True}, "trained with DoRA; merge it into its base"),
    "modules": ({"modules_to_save": ["embed_tokens"]}, "(modules_to_save); merge it"),
    "biases": ({"bias": "all"}, "it has biases (bias: all); merge it"),
    "experts": (
        {"target_modules": None, "target_parameters": ["mlp.experts.down_proj"]},
        "it changes experts as parameters (target_parameters); merge it",
    ),
    "rank": ({"rank": 600, "modules": "0.self_attn.q"}, "rank is 600, and vLLM takes 512 at most"),
    "kind": ({"peft_type": "PREFIX_TUNING"}, "of the kind PREFIX_TUNING, and vLLM takes LoRA"),
    "PiSSA": ({"init_lora_weights": "pissa_niter_4"}, "began by changing its base"),
}


@pytest.mark.parametrize("case", PROBLEMS)
def test_what_does_not_fit_is_told(files: Path, tmp_path: Path, case: str) -> None:
    keys, message = PROBLEMS[case]
    checkpoints.write_adapter(tmp_path, files / "base", **keys)
    (problem,) = adapter.inspect("a", tmp_path).problems
    assert problem.startswith("adapter a: ") and message in problem


def inspect(folder: Path, base: Path, *, for_gpu: bool = False, **options: Any) -> adapter.Adapter:
    """As `server.inspect_adapters` does."""
    load_general_plugins()
    options |= {
        "tensors": adapter.base_tensors(base),
        "limits": vllm_arguments.adapter_limits(base, for_gpu=for_gpu),
    }
    return adapter.inspect("a", folder, base=base, **options)


def test_a_table_or_a_head_that_vllm_leaves_alone_is_told(files: Path, tmp_path: Path) -> None:
    lora = checkpoints.write_adapter(tmp_path / "table", files / "base", embeddings=True)
    (problem,) = inspect(lora, files / "base").problems
    assert "it changes embed_tokens, which no adapter can change in this architecture" in problem
    # NormHead is of a whole head.
    base = checkpoints.write("baichuan2", tmp_path / "baichuan")
    lora = checkpoints.write_adapter(tmp_path / "head", base)
    file = lora / "adapter_model.safetensors"
    head = {
        f"base_model.model.lm_head.lora_{name}.weight": torch.ones(shape)
        for name, shape in (("A", (4, checkpoints.HIDDEN)), ("B", (checkpoints.VOCABULARY, 4)))
    }
    save_file(load_file(file) | head, file)
    (problem,) = inspect(lora, base).problems
    assert "it changes lm_head, which no adapter can change" in problem


def test_experts_on_a_cpu_and_what_mla_folds_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = checkpoints.write("deepseek_moe", tmp_path / "experts")
    lora = checkpoints.write_adapter(tmp_path / "lora", base, modules="self_attn")
    (problem,) = inspect(lora, base).problems
    assert "on a CPU vLLM takes no adapter for a model with experts; merge it" in problem
    assert inspect(lora, base, for_gpu=True).problems == []
    lora = checkpoints.write_adapter(tmp_path / "lora-experts", base, modules=r"\.experts")
    assert inspect(lora, base, for_gpu=True).problems == []
    dense = checkpoints.write("qwen2", tmp_path / "dense")
    (problem,) = inspect(lora, dense, for_gpu=True).problems
    assert "its base has no model.layers.1.mlp.experts." in problem
    # As DeepSeek-Coder-V2's chapter trains it, among others.
    base = tmp_path / "mla"
    base.mkdir()
    config = {"architectures": ["DeepseekV2ForCausalLM"], "kv_lora_rank": 16}
    (base / "config.json").write_text(json.dumps(config))
    matrix = {"model.layers.0.self_attn.kv_b_proj.weight": torch.ones(64, 16)}
    save_file(matrix, base / "model.safetensors")
    lora = checkpoints.write_adapter(tmp_path / "lora-mla", base)
    (problem,) = inspect(lora, base).problems
    assert "it changes kv_b_proj, which vLLM folds into other matrices" in problem
    monkeypatch.setenv("VLLM_MLA_DISABLE", "1")
    assert inspect(lora, base).problems == []


def test_an_adapter_of_another_model_is_told(files: Path, tmp_path: Path) -> None:
    other = checkpoints.write("baichuan2", tmp_path / "baichuan")
    lora = checkpoints.write_adapter(tmp_path / "lora", other, modules="self_attn")
    (problem,) = inspect(lora, files / "base").problems
    assert "this architecture has no W_pack, which it changes (target_modules)" in problem
    assert "some of: down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj" in problem
    wide = checkpoints.write("qwen2", tmp_path / "wide", intermediate_size=256)
    lora = checkpoints.write_adapter(tmp_path / "lora-wide", wide, modules="mlp")
    (problem,) = inspect(lora, files / "base").problems
    assert "trained for a side of 256, and the base's has 192" in problem
    deep = checkpoints.write("qwen2", tmp_path / "deep", num_hidden_layers=4)
    lora = checkpoints.write_adapter(tmp_path / "lora-deep", deep, modules="3.self_attn")
    (problem,) = inspect(lora, files / "base").problems
    assert "its base has no model.layers.3.self_attn" in problem


def test_names_that_vllm_would_leave_out_are_told(files: Path, tmp_path: Path) -> None:
    checkpoints.write_adapter(tmp_path, files / "base")
    file = tmp_path / "adapter_model.safetensors"
    moved = {name.replace("model.model.", "model."): t for name, t in load_file(file).items()}
    save_file(moved, file)
    (warning,) = inspect(tmp_path, files / "base").warnings
    assert "it names a matrix layers.0" in warning and "vLLM may leave it out" in warning


def test_a_base_of_another_name_or_in_4_bits_is_told(files: Path, tmp_path: Path) -> None:
    def warnings(trained_on: str, *known_as: str) -> list[str]:
        checkpoints.write_adapter(tmp_path, files / "base", base_model_name_or_path=trained_on)
        found = adapter.inspect("a", tmp_path, known_as=[BASE, *known_as])
        assert found.problems == []
        return found.warnings

    for same in (
        "Qwen/Qwen2-7B-Instruct",
        "/root/autodl-tmp/qwen/Qwen2-7B-Instruct/",
        "D:\\models\\Qwen2-7B-Instruct",
        "/root/.cache/huggingface/hub/models--Qwen--Qwen2-7B-Instruct/snapshots/f2826a00",
        "/root/.cache/modelscope/hub/models/Qwen--Qwen2-7B-Instruct/snapshots/master",
    ):
        assert warnings(same) == []
    assert warnings("/models/Qwen2___5-7B-Instruct", "qwen/Qwen2.5-7B-Instruct") == []
    for no_cache in (
        "/my-models--Qwen--Qwen2-7B-Instruct/z",
        "/models/a--Qwen2-7B-Instruct/snapshots-old/c",
    ):
        assert len(warnings(no_cache)) == 1
    for other_floats in ("OpenBMB/MiniCPM-2B-sft-bf16", "OpenBMB/MiniCPM-2B-sft-fp32"):
        assert warnings(other_floats, "minicpm-2b-sft") == []
    # The owner, or a folder around both, is no name.
    (warning,) = warnings("Qwen/Qwen2.5-7B-Instruct", "qwen/Qwen2-7B-Instruct")
    assert "see that this is the model it is served on" in warning
    (warning,) = warnings("/root/autodl-tmp/other", "/root/autodl-tmp/qwen/Qwen2-7B-Instruct")
    (warning,) = warnings("Qwen/Qwen2-1.5B")
    assert "it was trained on Qwen/Qwen2-1.5B; see that this is the model" in warning
    for kind in ("bnb-4bit", "bnb-8bit", "GPTQ-Int8", "AWQ", "FP8", "FP8-dynamic", "w8a8"):
        (warning,) = warnings(f"unsloth/Qwen2-7B-Instruct-{kind}")
        assert "it was trained on a quantised base" in warning
    four = tmp_path / "four"
    config = json.loads((files / "base" / "config.json").read_text())
    four.mkdir()
    quantization = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (four / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    (problem,) = adapter.inspect("a", tmp_path, base=four).problems
    assert "its base is stored in 4 bits by bitsandbytes" in problem


def test_a_folder_that_is_no_whole_adapter_says_what_to_do(files: Path, tmp_path: Path) -> None:
    def problem(folder: Path, **options: Any) -> str:
        (found,) = adapter.inspect("a", folder, **options).problems
        return found

    assert "no such folder; correct its path" in problem(tmp_path / "nowhere")
    assert "give the folder inside it, such as checkpoint-30" in problem(files / "output")
    assert "it is a whole model: serve it itself" in problem(files / "base")
    lora = checkpoints.write_adapter(tmp_path / "lora", files / "base")
    assert "its rank is 4, above engine.max_lora_rank 1; leave" in problem(lora, max_rank=1)
    weights = lora / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:1000])
    assert "is damaged or cut short" in problem(lora)
    tensors = load_file(files / "scaled" / "adapter_model.safetensors")
    save_file({**tensors, "base_model.model.lm_head.weight": torch.ones(2, 2)}, weights)
    assert "whole tensors beside LoRA's, such as lm_head.weight; merge it" in problem(lora)
    save_file(tensors | dict.fromkeys(list(tensors)[:1], torch.ones(0)), weights)
    assert "is empty, as DeepSpeed ZeRO-3 leaves it" in problem(lora)
    first = next(iter(tensors))
    diverged = tensors | {first: tensors[first].clone().fill_(torch.nan)}
    save_file(diverged, weights)
    assert "lora_A.weight has values that are no numbers" in problem(lora, base=files / "base")
    torch.save(diverged, lora / "adapter_model.bin")
    weights.unlink()
    assert "has values that are no numbers" in problem(lora, base=files / "base")
    (lora / "adapter_model.bin").unlink()
    save_file(tensors, weights)
    weights.unlink()
    assert "has no adapter_model.safetensors or adapter_model.bin; copy it" in problem(lora)
    (lora / "adapter_config.json").write_text("{")
    assert "is not readable JSON" in problem(lora)


YAML = """\
name: mine
source: {path: /models/mine}
adapters:
  a: /folder/a
  b:
    path: /folder/我的 模型
  c: {modelscope: me/mine, revision: v1}
default_adapter: b
"""


def load(tmp_path: Path, text: str) -> model_config.ModelConfig:
    file = tmp_path / "mine.yaml"
    file.write_text(text, encoding="utf-8")
    return model_config.load(str(file))[0]


def test_the_yaml_names_adapters(tmp_path: Path) -> None:
    config = load(tmp_path, YAML)
    assert {name: a.path or a.modelscope for name, a in config.adapters.items()} == {
        "a": "/folder/a",
        "b": "/folder/我的 模型",
        "c": "me/mine",
    }
    assert (config.default_adapter, config.adapters["c"].revision) == ("b", "v1")
    again = model_config.ModelConfig.model_validate_json(config.model_dump_json())
    assert again == config  # as the processes hand it on


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "path: /folder/我",
            "pth: /folder/我",
            ":6: adapters.b.pth: unknown key; did you mean 'path'",
        ),
        (
            "me/mine,",
            "me/mine, path: /x,",
            ":7: adapters.c: give exactly one of path and modelscope",
        ),
        ("default_adapter: b", "default_adapter: bb", ":8: default_adapter: adapters has no 'bb'"),
        ("  a: ", "  mine: ", ":3: adapters: the name mine is the base's"),
        ("  a: /folder/a", "  a b: /folder/a", ":4: adapters.a b"),
        ("  a: /folder/a", "  a: 1", ":4: adapters.a: input should be"),
    ],
)
def test_a_mistake_in_adapters_has_its_line(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    assert old in YAML
    with pytest.raises(ConfigError) as error:
        load(tmp_path, YAML.replace(old, new))
    assert message in str(error.value)


def test_an_adapter_given_as_the_model_finds_its_base(
    files: Path, tmp_path: Path, embedded_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "我的 模型"
    trained_on = "/root/autodl-tmp/qwen/Qwen2-7B-Instruct"
    checkpoints.write_adapter(folder, files / "base", base_model_name_or_path=trained_on)
    config, _ = own_model.load(str(folder), ["engine.max_model_len=64"])
    assert (config.name, config.default_adapter) == (BASE, "我的-模型")
    assert config.source.modelscope == "qwen/Qwen2-7B-Instruct"
    assert config.adapters["我的-模型"].path == str(folder)
    assert config.engine["max_model_len"] == 64
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"{folder} is an adapter: it is served as '我的-模型' on {BASE}, the base that its "
        "adapter_config.json names."
    )
    # The base may be a folder here, and of the catalogue too.
    named = files / "Qwen2-7B-Instruct"
    shutil.copytree(files / "base", named)
    checkpoints.write_adapter(folder, files / "base", base_model_name_or_path=str(named))
    config, _ = own_model.load(str(folder))
    assert (config.name, config.source.path) == (BASE, str(named))
    config, _ = own_model.load(str(files / FOLDERS["my"]))
    assert (config.name, config.source.path) == ("base", str(files / "base"))
    assert config.default_adapter == "output-checkpoint-30"
    checkpoints.write_adapter(folder, files / "base", base_model_name_or_path=str(embedded_model))
    config, _ = own_model.load(str(folder))
    assert (config.name, config.source.path) == (MODEL, str(embedded_model))
    for gone in ("/gone/Other-9B", "~nosuchuser/Other-9B"):
        checkpoints.write_adapter(folder, files / "base", base_model_name_or_path=gone)
        with pytest.raises(ConfigError, match=f"is an adapter for {gone}, which is neither in"):
            own_model.load(str(folder))


def test_an_adapter_on_a_merged_model_has_the_format_of_the_entry_behind_it(
    files: Path, tmp_path: Path
) -> None:
    merged = tmp_path / "my-merge"
    shutil.copytree(files / "base", merged)
    config = json.loads((merged / "config.json").read_text())
    config["_name_or_path"] = "qwen/Qwen2-7B-Instruct"
    (merged / "config.json").write_text(json.dumps(config))
    folder = tmp_path / "lora"
    checkpoints.write_adapter(folder, files / "base", base_model_name_or_path=str(merged))
    loaded, _ = own_model.load(str(folder))
    assert (loaded.name, loaded.source.path) == ("my-merge", str(merged))
    assert loaded.engine == model_config.load(BASE)[0].engine


def test_an_adapter_called_like_its_base_gets_another_name(files: Path, tmp_path: Path) -> None:
    for name in (BASE, "Qwen2-7B-Instruct"):  # the last is an alias
        folder = tmp_path / name
        checkpoints.write_adapter(
            folder, files / "base", base_model_name_or_path="qwen/Qwen2-7B-Instruct"
        )
        assert own_model.load(str(folder))[0].default_adapter == f"{name}-adapter"


def test_a_merged_model_is_served_by_the_entry_that_it_was_trained_from(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(files / "base", tmp_path / "导出")
    config = json.loads((files / "base" / "config.json").read_text())
    config["_name_or_path"] = "/root/autodl-tmp/qwen/Qwen2-7B-Instruct"
    (tmp_path / "导出" / "config.json").write_text(json.dumps(config))
    loaded, _ = own_model.load(str(tmp_path / "导出"))
    assert (loaded.name, loaded.source.path) == ("导出", str(tmp_path / "导出"))
    assert loaded.engine == model_config.load(BASE)[0].engine
    assert f"with the prompt format and sampling of {BASE}." in capsys.readouterr().err
    assert loaded.aliases == []  # it is not the published model
    # Where `download` puts the published one.
    folder = tmp_path / "hub" / "models" / "Qwen--Qwen2-7B-Instruct" / "snapshots" / "master"
    shutil.copytree(files / "base", folder)
    loaded, _ = own_model.load(str(folder))
    assert (loaded.name, loaded.aliases) == ("Qwen2-7B-Instruct", [])
    assert f"with the prompt format and sampling of {BASE}." in capsys.readouterr().err
    with pytest.raises(ConfigError, match="give the folder inside it, such as 导出"):
        own_model.load(str(tmp_path))


def test_an_option_that_names_no_adapter_is_told(files: Path) -> None:
    with pytest.raises(ConfigError, match="no such folder; correct its path, or give NAME=FOLDER"):
        own_model.load(BASE, (), ["/folder/my"])
    for model, adapters in (("~nosuchuser/x", ()), (BASE, ("~nosuchuser/x",))):
        with pytest.raises(ConfigError, match=r"~nosuchuser/x: no such user; write the whole path"):
            own_model.load(model, (), adapters)
    source = own_model.load(BASE, (), ["my=~nosuchuser/x"])[0].adapters["my"]
    for find in (weights.fetch_adapter, weights.present_adapter):
        with pytest.raises(ConfigError, match="adapter my: ~nosuchuser/x: no such user"):
            find("my", source)
    with pytest.raises(ConfigError, match="two adapters have this name"):
        own_model.load(BASE, (), ["my=/a", "my=/b"])
    config, _ = own_model.load(BASE, (), [str(files / "scaled")])
    assert list(config.adapters) == ["scaled"]


def test_a_modelscope_adapter_that_cannot_be_fetched_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*args: Any, **options: Any) -> Path:
        raise WeightsError("no such repository")

    monkeypatch.setattr(weights.modelscope, "fetch", fail)
    source = AdapterSource(modelscope="me/mine")
    with pytest.raises(WeightsError, match="adapter my: no such repository"):
        weights.fetch_adapter("my", source)
