"""Every flag of LMDeploy's: the TOML key that it sets, or the sentence that refuses it."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

from cli.chat import parser as chat_parser
from cli.flags import FLAGS, REFUSED, known, table
from cli.main import COMMANDS, main, there
from cli.serve_api_server import parser
from config.load import KNOBS

# flag -> (words, key, value); what is not here has a test of its own below
MAPPED: dict[str, tuple[list[str], str, Any]] = {
    "--model-name": (["qwen"], "model.model_name", "qwen"),
    "--model-format": (["auto"], "model.model_format", "auto"),
    "--dtype": (["float32"], "model.dtype", "float32"),
    "--revision": (["v1"], "model.revision", "v1"),
    "--download-dir": (["models"], "model.download_dir", "models"),
    "--device": (["mock"], "engine.device", "mock"),
    "--tp": (["2"], "engine.tp", 2),
    "--session-len": (["2048"], "engine.session_len", 2048),
    "--max-batch-size": (["128"], "engine.max_batch_size", 128),
    "--max-prefill-token-num": (["4096"], "engine.max_prefill_token_num", 4096),
    "--rope-scaling-factor": (["2.5"], "engine.rope_scaling_factor", 2.5),
    "--use-logn-attn": ([], "engine.use_logn_attn", True),
    "--cache-max-entry-count": (["0.5"], "cache.cache_max_entry_count", 0.5),
    "--cache-block-seq-len": (["128"], "cache.cache_block_seq_len", 128),
    "--enable-prefix-caching": ([], "cache.enable_prefix_caching", True),
    "--quant-policy": (["int8"], "cache.quant_policy", 8),
    "--server-name": (["127.0.0.1"], "server.server_name", "127.0.0.1"),
    "--server-port": (["8000"], "server.server_port", 8000),
    "--log-level": (["DEBUG"], "server.log_level", "DEBUG"),
    "--api-keys": (["k1", "k2"], "server.api_keys", ["***", "***"]),
    "--allow-origins": (["http://a.example", "http://b.example"], "server.allow_origins", ["http://a.example", "http://b.example"]),
    "--allow-credentials": ([], "server.allow_credentials", True),
    "--allow-methods": (["GET", "POST"], "server.allow_methods", ["GET", "POST"]),
    "--allow-headers": (["X-A"], "server.allow_headers", ["X-A"]),
    "--max-requests": (["64"], "admission.max_requests", 64),
}
OWN_TESTS = {"--chat-template", "--meta-instruction", "--cap", "--backend", "--ssl", "--qos-config-path"}


def effective(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[dict[str, Any], str]:
    """(the whole configuration, what was said) of `serve api_server`; the kernel cache is named, so that templates are written there."""
    assert main(["serve", "api_server", *words, "--print-effective"]) == 0, capsys.readouterr().err
    said = capsys.readouterr()
    return tomllib.loads(said.out), said.err


def test_every_flag_is_tested() -> None:
    assert {flag.name for flag in FLAGS} == {*MAPPED, *OWN_TESTS}


@pytest.mark.parametrize("name", MAPPED)
def test_a_flag_is_a_key_and_says_so(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    words, key, wanted = MAPPED[name]
    device = [] if name == "--device" else ["--device", "mock"]
    config, said = effective(capsys, *device, name, *words)
    section, _, knob = key.partition(".")
    assert config[section][knob] == wanted
    line = next(line for line in said.splitlines() if line.startswith(name))
    assert f"  {key} = " in line
    assert "k1" not in said


@pytest.mark.parametrize(
    ("old", "new", "key", "wanted"),
    [
        ("--server_name", "--server-name", "server.server_name", "127.0.0.1"),
        ("--server_port", "--server-port", "server.server_port", 23334),
        ("--instance_num", "--max-batch-size", "engine.max_batch_size", 64),
        ("--num-tokens-per-iter", "--max-prefill-token-num", "engine.max_prefill_token_num", 512),
        ("--cache_max_entry_count", "--cache-max-entry-count", "cache.cache_max_entry_count", 0.25),
        ("--max-concurrent-requests", "--max-requests", "admission.max_requests", 32),
    ],
)
def test_old_spellings_work_and_say_the_new_one(old: str, new: str, key: str, wanted: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([old, str(wanted)], [f"{old}={wanted}"]):
        config, said = effective(capsys, "--device", "mock", *words)
        section, _, knob = key.partition(".")
        assert config[section][knob] == wanted
        assert f"{old} is now {new}" in said


@pytest.mark.parametrize(("given", "meant"), [("FATAL", "CRITICAL"), ("WARN", "WARNING"), ("NOTSET", "DEBUG"), ("ERROR", "ERROR")])
def test_every_log_level_of_pythons(given: str, meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert effective(capsys, "--device", "mock", "--log-level", given)[0]["server"]["log_level"] == meant


def test_both_backends_are_the_one_engine(capsys: pytest.CaptureFixture[str]) -> None:
    plain, _ = effective(capsys, "--device", "mock")
    assert effective(capsys, "--device", "mock", "--backend", "turbomind")[0] == plain
    config, said = effective(capsys, "--device", "mock", "--backend", "pytorch")
    assert config == plain
    assert "--backend pytorch: numbatch has one engine" in said


def test_a_public_address_without_keys_serves_everybody_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    config, said = effective(capsys, "--device", "mock", "--server-name", "0.0.0.0")
    assert config["server"]["insecure"] is True
    assert "everybody who reaches this machine" in said
    config, said = effective(capsys, "--device", "mock", "--server-name", "0.0.0.0", "--api-keys", "k1")
    assert config["server"]["insecure"] is False
    assert "everybody" not in said


def test_an_address_in_a_file_still_needs_a_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.toml").write_text('[server]\nserver_name = "0.0.0.0"\n')
    assert main(["serve", "api_server", "--device", "mock", "--config", str(tmp_path / "x.toml"), "--check"]) == 2
    assert "there is no api key" in capsys.readouterr().err


def test_ssl_takes_its_files_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "api_server", "--device", "mock", "--ssl", "--check"]) == 2
    assert "SSL_KEYFILE and SSL_CERTFILE" in capsys.readouterr().err
    for name in ("SSL_KEYFILE", "SSL_CERTFILE"):
        (tmp_path / name).write_text("")
        monkeypatch.setenv(name, str(tmp_path / name))
    config, _ = effective(capsys, "--device", "mock", "--ssl")
    assert config["server"]["ssl_keyfile"] == str(tmp_path / "SSL_KEYFILE")
    assert config["server"]["ssl_certfile"] == str(tmp_path / "SSL_CERTFILE")


def test_qos_is_a_knob_or_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flag = next(flag for flag in FLAGS if flag.name == "--qos-config-path")
    file = tmp_path / "qos.json"
    groups = {name: [{"id": "default", "quota_pct": 100}] for name in ("Platinum", "Gold", "Silver", "Bronze")}
    file.write_text(json.dumps({"enable_user_qos": True, "user_groups": list(groups), "user_group_map": groups}))
    if known(flag):
        config, _ = effective(capsys, "--device", "mock", "--qos-config-path", str(file))
        section, _, name = flag.key.partition(".")
        assert config[section][name] == str(file)
    else:
        with pytest.raises(SystemExit):
            main(["serve", "api_server", "--qos-config-path", str(file), "--check"])
        assert "this version has no" in capsys.readouterr().err


def template(config: dict[str, Any]) -> str:
    return Path(config["model"]["chat_template"]).read_text(encoding="utf-8")


def test_a_chat_template_by_name_becomes_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kernels = ["--device", "mock", "--set", f"engine.kernel_cache_dir={tmp_path}"]
    config, _ = effective(capsys, *kernels, "--chat-template", "internlm-chat-7b")
    assert Path(config["model"]["chat_template"]).is_relative_to(tmp_path)
    assert '"model_name": "internlm"' in template(config)
    config, _ = effective(capsys, *kernels, "--chat-template", "qwen", "--meta-instruction", "Be brief.")
    assert '"meta_instruction": "Be brief."' in template(config)
    config, _ = effective(capsys, *kernels, "--cap", "completion")
    assert '"capability": "completion"' in template(config)
    own = tmp_path / "own.json"
    own.write_text('{"model_name": "mine", "user": "U:"}')
    config, _ = effective(capsys, *kernels, "--chat-template", str(own))
    assert config["model"]["chat_template"] == str(own)
    config, _ = effective(capsys, *kernels, "--chat-template", str(own), "--meta-instruction", "Be brief.")
    assert '"user": "U:"' in template(config)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--tpp", "1"], "there is no flag --tpp; did you mean --tp?"),
        (["--tp", "two"], "--tp (engine.tp): must be an integer"),
        (["--cache-max-entry-count", "1.5"], "--cache-max-entry-count (cache.cache_max_entry_count): must be between 0 and 1"),
        (["--quant-policy", "3"], "--quant-policy (cache.quant_policy): must be one of"),
        (["--chat-template", "internml2"], "did you mean internlm2?"),
        (["--cap", "infilling"], "--cap infilling: is CodeLlama's way"),
        (["--meta-instruction", "x"], "--meta-instruction: needs --chat-template NAME"),
        (["--model-format", "llama"], "are pickles"),
        (["model", "word"], "'word' is one word too many"),
        (["--rope-scaling-factor", "0.5"], "must be 0 (off) or at least 1"),
    ],
)
def test_what_cannot_be_is_refused_with_a_sentence(words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main(["serve", "api_server", *words, "--device", "mock", "--check"])
    except SystemExit as end:  # argparse's own way out
        code = int(str(end.code))
    assert code == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert said.count("\n") == 1


def test_what_others_have_and_numbatch_has_not_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    cli = parser()
    for name, why in REFUSED.items():
        with pytest.raises(SystemExit) as end:
            cli.parse_args(["model", name, "1"])
        assert end.value.code == 2
        assert capsys.readouterr().err == f"numbatch serve api_server: {name}: {why}\n"


def test_a_commands_own_flag_is_not_refused_for_anothers_sake(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--seed" in REFUSED
    assert chat_parser().parse_args(["model", "--seed", "3"]).seed == 3


def test_help_shows_sections_keys_and_one_word(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["serve", "api_server", "--help"])
    said = capsys.readouterr().out
    for section in ("model:", "engine:", "cache:", "server:", "access:", "limits:", "configuration:"):
        assert f"\n{section}\n" in said
    plain = " ".join(said.split())
    for flag in FLAGS:
        if known(flag):
            assert flag.name in said
            assert not flag.key or f"[{flag.key}]" in plain
    with pytest.raises(SystemExit):
        main(["serve", "api_server", "--help=cache"])
    said = capsys.readouterr().out
    assert "--cache-block-seq-len" in said
    assert "--server-port" not in said


def test_keys_exist() -> None:
    """A flag's key is a knob; only what another part of this version brings may still be missing."""
    missing = {flag.name for flag in FLAGS if flag.key and flag.key.split(".")[1] not in KNOBS.get(flag.key.split(".")[0], {})}
    assert missing <= {"--qos-config-path"}


def test_the_page_has_the_flags(root: Path) -> None:
    page = (root / "docs" / "cli.md").read_text(encoding="utf-8")
    assert f"equal to cli/flags.py -->\n{table()}\n<!-- end -->" in page
    assert all(f"`numbatch {name}" in page or name == "serve" for name in there(COMMANDS))
