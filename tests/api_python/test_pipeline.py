"""`numbatch.pipeline`: calls, batches, streams, conversations; from scripts, threads and running event loops."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from config.errors import ConfigError
from formats.errors import FormatError
from numbatch import ChatTemplateConfig, EngineConfig, GenerationConfig, Pipeline, Response, pipeline
from tests.api.harness import serving

SHORT = GenerationConfig(max_new_tokens=6, ignore_eos=True)


def settled(pipe: Pipeline) -> None:
    """Nothing runs any more."""
    engine = pipe.model.loaded.engine
    end = time.monotonic() + 5
    while (s := engine.snapshot()).num_running or s.num_waiting or s.active:
        assert time.monotonic() < end, s
        time.sleep(0.01)


def test_one_prompt_one_response(pipe: Pipeline) -> None:
    response = pipe("hello", SHORT)
    assert isinstance(response, Response)
    assert response.finish_reason == "length"
    assert response.generate_token_len == len(response.token_ids) == 6
    assert response.text == pipe.tokenizer.decode(response.token_ids, continuation=True)
    assert response.input_token_len == 3 + len("user\nhello\nassistant\n")  # three markers, bytes


def test_a_text_is_asked_through_the_template_and_messages_are_the_same(pipe: Pipeline) -> None:
    asked = pipe("hello", SHORT)
    assert pipe([{"role": "user", "content": "hello"}], SHORT) == asked
    assert pipe("hello", SHORT, do_preprocess=False).input_token_len == 5  # five bytes
    ids = pipe.model.loaded.template.render([{"role": "user", "content": "hello"}])  # type: ignore[union-attr]
    assert pipe(ids, SHORT) == asked


def test_a_batch_answers_each_prompt_in_its_place(pipe: Pipeline) -> None:
    prompts = [f"prompt {i}" for i in range(50)]  # more than the engine takes at a time
    batch = pipe(prompts, SHORT)
    assert [response.index for response in batch] == list(range(50))
    for i in (0, 17, 49):
        alone = pipe(prompts[i], SHORT)
        assert (alone.text, alone.token_ids) == (batch[i].text, batch[i].token_ids)
    assert pipe([], SHORT) == []
    conversations = [[{"role": "user", "content": text}] for text in prompts[:3]]
    assert [r.text for r in pipe(conversations, SHORT)] == [r.text for r in batch[:3]]


def test_each_prompt_may_have_its_own_config(pipe: Pipeline) -> None:
    lengths = [1, 5, 3]
    configs = [GenerationConfig(max_new_tokens=n, ignore_eos=True) for n in lengths]
    assert [r.generate_token_len for r in pipe(["a", "b", "c"], configs)] == lengths
    with pytest.raises(ValueError, match="3 prompts and 2 GenerationConfigs"):
        pipe(["a", "b", "c"], configs[:2])


def test_a_stream_adds_up_to_the_answer(pipe: Pipeline) -> None:
    config = GenerationConfig(max_new_tokens=9, ignore_eos=True, logprobs=2)
    whole = pipe(["one", "two"], config)
    folded: dict[int, Response] = {}
    for piece in pipe.stream_infer(["one", "two"], config):
        if piece.index in folded:
            folded[piece.index].extend(piece)
        else:
            folded[piece.index] = piece
    assert [folded[0], folded[1]] == whole
    assert whole[0].logprobs is not None
    assert [len(item) for item in whole[0].logprobs] == [2] * 9
    assert all(token in item for token, item in zip(whole[0].token_ids, whole[0].logprobs, strict=True))


def test_leaving_a_stream_ends_it(pipe: Pipeline) -> None:
    stream = pipe.stream_infer(["a", "b"], GenerationConfig(max_new_tokens=400, ignore_eos=True))
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    settled(pipe)


def test_stop_words_end_the_answer_outside_of_it(pipe: Pipeline) -> None:
    full = pipe("stop here", GenerationConfig(max_new_tokens=40, ignore_eos=True)).text
    stop = next(c for c in full[5:] if c not in full[:5])
    cut = pipe("stop here", GenerationConfig(max_new_tokens=40, ignore_eos=True, stop_words=[stop]))
    assert cut.text == full[: full.index(stop)]
    assert cut.finish_reason == "stop"
    kept = pipe("stop here", GenerationConfig(max_new_tokens=40, ignore_eos=True, stop_words=[stop], include_stop_str_in_output=True))
    assert kept.text == cut.text + stop


def test_a_seed_repeats_an_answer(pipe: Pipeline) -> None:
    config = GenerationConfig(max_new_tokens=20, temperature=1.0, random_seed=7, ignore_eos=True)
    assert pipe("x", config) == pipe("x", config)


@pytest.mark.parametrize(
    ("config", "fields"),
    [
        (GenerationConfig(), {"temperature": 0.0}),
        (GenerationConfig(do_sample=False), {"temperature": 0.0}),
        (GenerationConfig(do_sample=True), {"temperature": 0.8, "top_k": 50}),
        (GenerationConfig(top_p=0.9), {"temperature": 0.8, "top_k": 50, "top_p": 0.9}),
        (GenerationConfig(temperature=0.3, top_k=4), {"temperature": 0.3, "top_k": 4}),
    ],
)
def test_it_samples_when_it_is_told_how(config: GenerationConfig, fields: dict[str, float]) -> None:
    body = config.body(chat=True)
    assert {name: body[name] for name in ("temperature", "top_p", "top_k", "min_p") if name in body} == fields


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (GenerationConfig(n=2), "n must be 1, not 2"),
        (GenerationConfig(do_sample=False, temperature=0.7), "do_sample = False is greedy, where temperature means nothing"),
        (GenerationConfig(top_p=3.0), "top_p must be between 0 and 1"),
        (GenerationConfig(max_new_tokens=100000), "max_new_tokens must be between"),
        (GenerationConfig(random_seed=-1), "random_seed must be between"),
        (GenerationConfig(max_new_tokens=2, min_new_tokens=9), "min_new_tokens is 9, more than"),
        (GenerationConfig(logprobs=1000), "logprobs must be at most request.max_top_logprobs = 20"),
        (GenerationConfig(stop_words=[""]), "holds an empty string"),
    ],
)
def test_what_cannot_be_is_a_value_error(pipe: Pipeline, config: GenerationConfig, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        pipe("x", config)
    settled(pipe)


def test_one_bad_prompt_of_many_ends_the_others(pipe: Pipeline) -> None:
    with pytest.raises(ValueError, match=r"prompt\[0\] is 1000000; this vocabulary has the ids 0 to 259"):
        pipe([[1, 2], [10**6]], GenerationConfig(max_new_tokens=400, ignore_eos=True))
    settled(pipe)
    with pytest.raises(ValueError, match="images and other media"):
        pipe([("look", "picture.png")])


def test_arguments_of_another_kind_are_a_value_error(pipe: Pipeline) -> None:
    for prompt in (5, None, {"role": "user", "content": "x"}):
        with pytest.raises(ValueError, match="A prompt is a text, a list of messages or a list of ids, not (int|NoneType|dict)"):
            pipe(prompt)
    for config in ({"temperature": 1}, ["x"]):
        with pytest.raises(ValueError, match="gen_config must be a GenerationConfig"):
            pipe("x", config)


def test_one_stop_word_may_be_a_text(pipe: Pipeline) -> None:
    one, listed = (GenerationConfig(max_new_tokens=40, ignore_eos=True, stop_words=stop) for stop in ("ab", ["ab"]))
    assert one.body(chat=True) == listed.body(chat=True)
    assert GenerationConfig(bad_words="ab").body(chat=True)["bad_words"] == ["ab"]


def test_a_template_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("# no JSON")
    with pytest.raises(ValueError, match="x.json: is no JSON: Expecting value"):
        ChatTemplateConfig.from_json(tmp_path / "x.json")
    with pytest.raises(FormatError, match="'qwenn' is no built-in template, and the file has no markers; did you mean 'qwen'"):
        pipeline(device="mock", chat_template_config=ChatTemplateConfig(model_name="qwenn"))


def test_a_conversation_remembers(pipe: Pipeline) -> None:
    session = pipe.chat("one", gen_config=SHORT)
    first = session.response.text
    pipe.chat("two", session, SHORT)
    assert [m["content"] for m in session.messages] == ["one", first, "two", session.response.text]
    assert session.response.text == pipe(session.messages[:3], SHORT).text
    pieces = list(pipe.chat("three", session, SHORT, stream_response=True))
    assert "".join(p.text for p in pieces) == session.messages[-1]["content"]


def test_it_works_inside_a_running_loop_and_from_threads(pipe: Pipeline) -> None:
    wanted = pipe("from anywhere", SHORT).text

    async def cell() -> str:  # as a notebook's cell runs
        return pipe("from anywhere", SHORT).text

    assert asyncio.run(cell()) == wanted
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(pipe("from anywhere", SHORT).text)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert found == [wanted] * 8


def test_answers_equal_those_over_http(pipe: Pipeline) -> None:
    with serving() as server:
        body = {"messages": [{"role": "user", "content": "same?"}], "max_tokens": 12, "temperature": 1.0, "seed": 3}
        status, answer = server.post("/v1/chat/completions", body)
    assert status == 200
    mine = pipe("same?", GenerationConfig(max_new_tokens=12, temperature=1.0, top_k=0, random_seed=3))
    assert mine.text == answer["choices"][0]["message"]["content"]


def test_perplexity_is_that_of_the_endpoint(pipe: Pipeline) -> None:
    texts = ["how likely", "is this?", "ab"]
    losses = pipe.get_ppl(texts)
    assert len(losses) == 3
    assert pipe.get_ppl([list(text.encode()) for text in texts]) == losses
    assert pipe.get_ppl(texts[0]) == losses[:1]
    with serving() as server:
        status, answer = server.post("/get_ppl", {"input": texts})
    assert status == 200
    assert answer["ppl"] == pytest.approx(losses)
    with pytest.raises(ValueError, match="has no perplexity"):
        pipe.get_ppl("a")


def test_words_and_ids_may_be_ruled_out(pipe: Pipeline) -> None:
    config = GenerationConfig(max_new_tokens=30, ignore_eos=True, allowed_token_ids=[65, 66, 67], bad_words=["B"])
    assert set(pipe("x", config).text) <= {"A", "C"}


def test_lmdeploys_engine_settings_are_knobs() -> None:
    engine = EngineConfig(session_len=300, max_batch_size=3, cache_block_seq_len=32, num_tokens_per_iter=64, quant_policy="none")
    with pipeline(backend_config=engine, device="mock", num_blocks=64) as pipe:
        knobs = pipe.config.engine
        assert (knobs.session_len, knobs.max_batch_size, knobs.max_prefill_token_num) == (300, 3, 64)
        assert pipe.config.cache.cache_block_seq_len == 32


@pytest.mark.parametrize(
    ("knobs", "sentence"),
    [
        ({"sesion_len": 8}, "sesion_len: is no knob; did you mean session_len"),
        ({"device": "gpu"}, "engine.device: must be one of"),
        ({"model_format": "llama"}, "are pickles"),
        ({"tp": 0}, "engine.tp: must be between 1 and 64"),
    ],
)
def test_a_wrong_knob_is_named(knobs: dict[str, object], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        pipeline(**{"device": "mock", **knobs})  # type: ignore[arg-type]


def test_a_chat_template_config_is_used_and_its_file_removed(tmp_path: Path) -> None:
    markers = ChatTemplateConfig.from_json('{"model_name": "x", "system": "S:", "meta_instruction": "M", "user": "U:", "assistant": "A:"}')
    assert ChatTemplateConfig.from_json(markers.to_json(tmp_path / "t.json")) == ChatTemplateConfig.from_json(tmp_path / "t.json")
    with pipeline(device="mock", num_blocks=64, chat_template_config=markers) as pipe:
        assert pipe("hi", SHORT).input_token_len == len("S:MU:hiA:")
        file = Path(pipe.config.model.chat_template)
        assert file.is_file()
    assert not file.exists()
    with pytest.raises(ValueError, match="has no key 'sytem'"):
        ChatTemplateConfig.from_json('{"sytem": ""}')
    assert '"model_name": "internlm2"' in ChatTemplateConfig("internlm2-chat-7b").to_json()


def test_closed_is_closed() -> None:
    pipe = pipeline(device="mock", num_blocks=64)
    pipe.close()
    pipe.close()
    with pytest.raises(RuntimeError, match="closed"):
        pipe("x")
    with pytest.raises(RuntimeError, match="closed"):
        list(pipe.stream_infer("x"))


def test_a_script_without_a_main_guard_may_spawn_ranks_and_forget_to_close(root: Path, tmp_path: Path) -> None:
    """multiprocessing runs the main script again in each rank; ours must not load a model there."""
    script = tmp_path / "script.py"
    script.write_text(
        "from numbatch import pipeline, GenerationConfig\n"
        "print('began', flush=True)\n"
        "pipe = pipeline(device='mock', executor='process', tp=2, num_blocks=64)\n"
        "print(pipe('x', GenerationConfig(max_new_tokens=3, ignore_eos=True)).generate_token_len)\n"
    )
    done = subprocess.run([sys.executable, str(script)], cwd=root, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["began", "3"]
    assert done.stderr == ""


def test_importing_numbatch_loads_nothing_heavy(root: Path) -> None:
    code = "import sys, numbatch; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert not {name.split(".")[0] for name in done.stdout.split()} & {"torch", "numba", "aiohttp", "tokenizers", "httpx", "numpy"}


def test_a_real_model_answers(smollm2: Path) -> None:
    with pipeline(smollm2, device="cpu", max_batch_size=4, session_len=512, dtype="float32") as pipe:
        assert "Paris" in pipe("What is the capital of France?", GenerationConfig(max_new_tokens=16)).text
