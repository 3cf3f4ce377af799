"""admission.qos_config_path: LMDeploy 0.4's file is read, everything wrong in it is one sentence."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from config.errors import ConfigError
from config.load import load_config
from config.qos import MAX_FILE_BYTES, read_qos

SEEDS: dict[str, Any] = {
    "enable_user_qos": True,
    "user_groups": ["Platinum", "Gold", "Silver", "Bronze"],
    "user_group_map": {
        "Platinum": [{"id": "user_id0", "quota_pct": 100}, {"id": "default", "quota_pct": 0}],
        "Gold": [{"id": "user_id1", "quota_pct": 50}, {"id": "user_id2", "quota_pct": 50}],
        "Silver": [{"id": "user_id3", "quota_pct": 5}, {"id": "default", "quota_pct": 15}],
        "Bronze": [{"id": "user_id4", "quota_pct": 0}, {"id": "default", "quota_pct": 0}],
    },
}


def written(tmp_path: Path, value: Any) -> str:
    path = tmp_path / "qos.json"
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return str(path)


def test_the_file_of_the_seeds(tmp_path: Path) -> None:
    found = read_qos(written(tmp_path, SEEDS))
    assert found is not None and [group.name for group in found.groups] == SEEDS["user_groups"]
    assert found.default_group == 2
    assert found.groups[1].quotas == {"user_id1": 0.5, "user_id2": 0.5}
    assert found.groups[2].quotas == {"user_id3": 0.25, "default": 0.75}
    assert found.groups[3].quotas == {"user_id4": 0.5, "default": 0.5}, "all 0: equal shares"
    assert read_qos(written(tmp_path, {**SEEDS, "enable_user_qos": False})) is None


def test_unknown_users_go_to_the_third_of_the_map(tmp_path: Path) -> None:
    """Of the map, which may be written in another order than the groups; the last one where there are fewer."""
    turned = {**SEEDS, "user_groups": ["Bronze", "Silver", "Gold", "Platinum"]}
    found = read_qos(written(tmp_path, turned))
    assert found is not None and found.groups[found.default_group].name == "Silver"
    two = {"enable_user_qos": True, "user_groups": ["A", "B"], "user_group_map": {"B": [], "A": [{"id": "a", "quota_pct": 1}]}}
    found = read_qos(written(tmp_path, two))
    assert found is not None and found.groups[found.default_group].name == "A"
    assert found.groups[1].quotas == {}


def edited(*path: Any, to: Any) -> Any:
    value = copy.deepcopy(SEEDS)
    place = value
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = to
    return value


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("{", "not valid JSON"),
        ('{"enable_user_qos": true, "enable_user_qos": true}', "has a key twice"),
        ("[" * 100_000, "not valid JSON"),
        ([], "must be an object with the keys enable_user_qos, user_group_map, user_groups"),
        ({**SEEDS, "more": 1}, "and no others"),
        (edited("enable_user_qos", to=1), "enable_user_qos must be true or false"),
        (edited("user_groups", to=[]), "array of 1 to 64 names"),
        (edited("user_groups", to=["Platinum", "Gold", "Silver", 4]), "array of 1 to 64 names"),
        (edited("user_groups", to=["Platinum", "Gold", "Silver"]), "one entry for each name"),
        (edited("user_groups", to=["Platinum", "Gold", "Silver", "Bronze", "Gold"]), "no name may come twice"),
        (edited("user_group_map", "Gold", to={}), "user_group_map.Gold must be an array of users"),
        (edited("user_group_map", "Gold", 0, to={"id": "x"}), "a user of group Gold must be an object with the keys id, quota_pct"),
        (edited("user_group_map", "Gold", 0, "id", to=""), "a user whose id is no text, or is there twice"),
        (edited("user_group_map", "Gold", 0, "id", to="user_id2"), "a user whose id is no text, or is there twice"),
        (edited("user_group_map", "Gold", 0, "id", to="user_id0"), "a user in two groups"),
        (edited("user_group_map", "Gold", 0, "quota_pct", to=-1), "quota_pct of user user_id1 must be a number from 0 to 100"),
        (edited("user_group_map", "Gold", 0, "quota_pct", to=float("nan")), "must be a number from 0 to 100"),
        (edited("user_group_map", "Gold", 0, "quota_pct", to=True), "must be a number from 0 to 100"),
        (" " * (MAX_FILE_BYTES + 1), "larger than"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(tmp_path: Path, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_qos(written(tmp_path, value))


def test_a_server_with_a_wrong_file_does_not_start(tmp_path: Path) -> None:
    file = tmp_path / "numbatch.toml"
    file.write_text(f'[engine]\ndevice = "mock"\n[admission]\nqos_config_path = "{tmp_path}/none.json"\n')
    with pytest.raises(ConfigError, match=r"admission.qos_config_path: .* cannot be read: No such file"):
        load_config(file)
