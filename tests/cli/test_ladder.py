"""`numbatch lite ladder` as a user types it: one command on a toy, what it leaves, and what it refuses."""

from __future__ import annotations

import json
import types
from pathlib import Path
from typing import Any

import pytest

from bench.quality import Text
from cli import ladder_sources
from cli.arguments import UsageError
from cli.ladder_sources import find_sources, fitting_group
from cli.main import main
from engine.models.spec import load_spec
from tests.e2e.conftest import byte_tokenizer
from tests.fixtures.awq import awq_checkpoint
from tests.fixtures.toy import toy_checkpoint

TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness. "
SMALL = ["--tokens", "96", "--window", "64", "--stride", "32", "--decode-tokens", "32", "--repeats", "1", "--memory-gib", "0.25"]
SMALL += ["--set", "engine.device=cpu", "--set", "engine.max_batch_size=32"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """One model in 4 bits and dense; both speak bytes."""
    pair = awq_checkpoint(tmp_path_factory.mktemp("ladder"), layers=1, hidden=128)
    for path in pair:
        byte_tokenizer(path)
    return pair


@pytest.fixture
def data(tmp_path: Path) -> Path:
    file = tmp_path / "mine.txt"
    file.write_text(TEXT * 8)
    return file


def test_one_command_table_advice_and_page(
    models: tuple[Path, Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    w4, dense = models
    work = tmp_path / "work"
    words = [str(dense), "--data", str(data), "--work-dir", str(work), "--w4", str(w4), "--rungs", "16-bit,W4,W8A8", "--w8a8", "nowhere"]
    assert main(["lite", "ladder", *words, *SMALL]) == 0
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert lines[0] == "dense on mine.txt: 96 tokens, windows of 64, stride 32" and lines[1].startswith("rung")
    assert [line.split()[0] for line in lines[2:5]] == ["16-bit", "W4", "W8A8"] and "not run: " in lines[4] and "nowhere" in lines[4]
    assert any(line.startswith("Recommended: ") for line in lines) and any(line.startswith("Serve it: numbatch serve") for line in lines)
    record = json.loads((work / "ladder.json").read_text())
    first, quantized, missing = record["rungs"]
    # the dense twin holds what the 4 bits mean: nothing is lost, and a fraction of the weights' bytes is left
    assert abs(quantized["apart"]["perplexity_change"]) < 0.02 and quantized["apart"]["same_top1"] > 0.9
    assert quantized["weight_bytes"] < 0.7 * first["weight_bytes"] and "not_run" in missing
    assert (work / "ladder.html").read_text().count("<svg") >= 4


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--rungs", "W3"], "--rungs: there is no rung 'W3'; there are 16-bit, 16-bit + KV8"),
        (["--max-loss", "-1"], "--max-loss is in percent, 0 to 1000, not -1"),
        (["--decode-tokens", "8"], "--decode-tokens must be 32 .. 100000"),
        (["--stride", "9000"], "--stride 1 .. --window; they are 1024 and 9000"),
        (["--memory-gib", "-3"], "--memory-gib must be 0 .. 65536, not -3"),
        (["--goal", "fun"], "--goal fun: must be one of balanced"),
        (["--data", "gone.txt"], "--data gone.txt: no such file"),
    ],
)
def test_what_makes_no_sense_is_one_line(
    data: Path, tmp_path: Path, words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(["lite", "ladder", "model", "--data", str(data), "--work-dir", str(tmp_path / "w"), *words])
    except SystemExit as stop:
        code = int(stop.code or 0)
    assert code == 2 and sentence in capsys.readouterr().err
    assert not (tmp_path / "w").exists()


def test_a_model_that_is_nowhere(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lite", "ladder", str(tmp_path / "nowhere"), "--data", str(data), "--work-dir", str(tmp_path / "w")]) == 3
    assert "nowhere" in capsys.readouterr().err


def arguments(**given: Any) -> Any:
    values = {"base": "", "w4": "", "w8a8": "", "set": [], "calib_dataset": "", "calib_samples": 4, "calib_seqlen": 16, "w_group_size": 0}
    return types.SimpleNamespace(**{**values, **given})


def test_a_4_bit_folder_is_its_own_w4_and_its_dequantized_weights_stand_for_16_bit(
    models: tuple[Path, Path], data: Path, tmp_path: Path
) -> None:
    found = find_sources(arguments(model=str(models[0])), tmp_path, Text(data), {"16-bit", "W4"})
    assert found["W4"].path == str(models[0]) and found["16-bit"].path == str(tmp_path / "16-bit")
    assert load_spec(tmp_path / "16-bit").awq is None
    base = find_sources(arguments(model=str(models[0]), base="elsewhere"), tmp_path, Text(data), {"16-bit"})
    assert base["16-bit"].path == "elsewhere"
    with pytest.raises(UsageError, match="holds the ladder of another model"):
        find_sources(arguments(model=str(models[1])), tmp_path, Text(data), {"16-bit"})


def test_what_is_made_is_made_on_text_that_is_not_scored_and_once(
    models: tuple[Path, Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[list[str]] = []

    def made(command: list[str], **options: Any) -> Any:
        words = command[command.index("lite") + 1 :]
        calls.append(words)
        place = Path(words[words.index("--work-dir") + 1])
        if words[0] == "auto_awq":
            place.mkdir()
            (place / "config.json").write_text("{}")
        return types.SimpleNamespace(returncode=0 if words[0] == "auto_awq" else 4)

    monkeypatch.setattr(ladder_sources.subprocess, "run", made)
    args = arguments(model=str(models[1]))
    found = find_sources(args, tmp_path, Text(data, tokens=200), {"16-bit", "W4", "W8A8"})
    assert found["W4"].path == str(tmp_path / "w4") and "exit code 4" in found["W8A8"].reason
    words = calls[0]
    assert words[:2] == ["auto_awq", str(models[1])] and words[-2:] == ["--w-group-size", "128"]
    rest = Path(words[words.index("--calib-dataset") + 1]).read_text()
    text = data.read_text()
    assert text.endswith(rest) and 200 < len(text) - len(rest) <= 3 * 201  # a byte a token
    again = find_sources(args, tmp_path, Text(data, tokens=200), {"W4"})
    assert again["W4"] == found["W4"] and len(calls) == 2 and "was made before" in capsys.readouterr().err
    short = find_sources(args, tmp_path, Text(data, tokens=10_000), {"W8A8"})
    assert short["W8A8"].reason and str(data) in calls[-1] and "calibrated on as well as measured on" in capsys.readouterr().err


def test_the_4_bit_rung_is_made_by_auto_awq(models: tuple[Path, Path], data: Path, tmp_path: Path) -> None:
    found = find_sources(arguments(model=str(models[1]), calib_samples=8), tmp_path, Text(data, tokens=200), {"W4"})
    assert not found["W4"].reason
    assert ladder_sources._stored_types(Path(found["W4"].path)) >= {"AWQ"}


@pytest.mark.parametrize(("hidden", "inner", "group"), [(128, 256, 128), (64, 192, 64), (64, 96, 32)])
def test_the_group_that_fits(tmp_path: Path, hidden: int, inner: int, group: int) -> None:
    path = toy_checkpoint(tmp_path / "m", hidden=hidden, intermediate_size=inner)
    assert fitting_group(load_spec(path)) == group
