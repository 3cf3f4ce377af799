"""LMDeploy's first Python interface: instances, cumulative ids, sessions kept as ids."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from numbatch import turbomind as tm


@pytest.fixture(scope="module")
def model() -> Iterator[Any]:
    made = tm.TurboMind.from_pretrained("", device="mock", num_blocks=256, session_len=512)
    yield made
    made.close()


def answer(generator: Any, session_id: int, text: str, **options: Any) -> list[int]:
    ids = [ord(c) for c in text]
    *_, last = generator.stream_infer(session_id=session_id, input_ids=[ids], request_output_len=8, ignore_eos=True, top_k=1, **options)
    ((res, tokens),) = last
    assert len(res) == tokens
    return list(res.tolist())


def test_ids_accumulate(model: Any) -> None:
    generator = model.create_instance()
    outputs = list(generator.stream_infer(session_id=0, input_ids=[[65, 66]], request_output_len=8, ignore_eos=True, random_seed=1))
    lists = [out[0][0].tolist() for out in outputs]
    assert [len(ids) for ids in lists] == sorted(len(ids) for ids in lists)
    assert all(later[: len(ids)] == ids for ids, later in zip(lists, lists[1:]))
    assert outputs[-1][0][1] == 8
    last = list(
        generator.stream_infer(
            session_id=0, input_ids=[[65, 66]], request_output_len=8, ignore_eos=True, random_seed=1, stream_output=False
        )
    )
    assert [out[0][0].tolist() for out in last] == lists[-1:]


def test_a_session_goes_on_behind_its_history(model: Any) -> None:
    generator = model.create_instance()
    first = answer(generator, 5, "one", sequence_start=True)
    second = answer(generator, 5, "two", sequence_start=False)
    whole = [*map(ord, "one"), *first, *map(ord, "two")]
    assert second == answer(model.create_instance(), 6, "".join(map(chr, whole)))
    # rolled back to behind the first answer, the second round is the same again
    assert answer(generator, 5, "two", sequence_start=False, step=len(whole) - 3) == second
    answer(generator, 5, "x", sequence_start=False, sequence_end=True)
    assert model.history(5) == []
    assert answer(generator, 5, "one") == first
    with pytest.raises(ValueError, match="step is 9999"):
        answer(generator, 5, "x", sequence_start=False, step=9999)


def test_stop_and_a_length_of_zero_generate_nothing(model: Any) -> None:
    generator = model.create_instance()
    answer(generator, 7, "one")
    for options in ({"stop": True}, {"request_output_len": 0, "sequence_end": True}):
        (out,) = generator.stream_infer(session_id=7, input_ids=[[1]], sequence_start=False, **options)
        assert out[0][0].tolist() == []
        assert out[0][1] == 0
    assert model.history(7) == []


def test_text_and_ids(model: Any) -> None:
    prompt = model.model.get_prompt("hi")
    assert prompt == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert model.model.get_prompt("hi", sequence_start=False).endswith(prompt)
    ids = model.tokenizer.encode(prompt)
    assert ids.count(258) == 2  # the markers are control tokens
    assert model.tokenizer.decode(model.tokenizer.encode("hi", add_bos=False)) == "hi"
    assert model.tokenizer.encode("hi") == [104, 105]  # a vocabulary that asks for no BOS


def test_what_it_cannot_do_is_said(model: Any) -> None:
    with pytest.raises(ValueError, match="holds 2 sequences"):
        list(model.create_instance().stream_infer(0, [[1], [2]]))
    with pytest.raises(ValueError, match="cuda_stream_id must be 0"):
        model.create_instance(cuda_stream_id=1)


def test_a_model_name_selects_the_template(smollm2: Path) -> None:
    model = tm.TurboMind.from_pretrained(
        str(smollm2), model_name="qwen-7b", device="cpu", max_batch_size=2, session_len=256, dtype="float32"
    )
    try:
        prompt = model.model.get_prompt("What is the capital of France?")
        assert prompt.startswith("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n")
        for outputs in model.create_instance().stream_infer(
            session_id=0, input_ids=[model.tokenizer.encode(prompt)], top_k=1, request_output_len=12
        ):
            res, _ = outputs[0]
        assert "Paris" in model.tokenizer.decode(res.tolist())
    finally:
        model.close()
