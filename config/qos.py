"""The JSON file behind admission.qos_config_path, as LMDeploy 0.4 had it: user groups, the best first, and quotas in them.

    {"enable_user_qos": true,
     "user_groups": ["Platinum", "Gold", "Silver", "Bronze"],
     "user_group_map": {"Platinum": [{"id": "user_id0", "quota_pct": 100}, {"id": "default", "quota_pct": 0}], ...}}

What the groups and quotas do is `engine/qos.py`'s business.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config.errors import ConfigError

MAX_FILE_BYTES = 4 << 20
MAX_GROUPS = 64
DEFAULT_USER = "default"
DEFAULT_GROUP = 2  # the third of the map is where users go that it does not name


@dataclass(frozen=True, slots=True)
class Group:
    """`quotas` by user id, normalised: they sum to 1, or are all 0 in an empty group."""

    name: str
    quotas: dict[str, float]


@dataclass(frozen=True, slots=True)
class QosConfig:
    groups: tuple[Group, ...]  # the best first
    default_group: int  # index into `groups`


def read_qos(path: str) -> QosConfig | None:
    """The file's groups; None where its enable_user_qos is false. `ConfigError` says what is wrong in it."""
    found = _load(path)
    _keys("the file", found, {"enable_user_qos", "user_groups", "user_group_map"})
    enabled, names, members = found["enable_user_qos"], found["user_groups"], found["user_group_map"]
    if type(enabled) is not bool:
        raise ConfigError("enable_user_qos must be true or false.")
    if type(names) is not list or not 1 <= len(names) <= MAX_GROUPS or not all(type(name) is str and name for name in names):
        raise ConfigError(f"user_groups must be an array of 1 to {MAX_GROUPS} names, the best first.")
    if type(members) is not dict or len(set(names)) != len(names) or set(members) != set(names):
        raise ConfigError("user_group_map must have one entry for each name in user_groups, and no name may come twice.")
    groups = tuple([Group(name, _quotas(name, members[name])) for name in names])
    users = [user for group in groups for user in group.quotas if user != DEFAULT_USER]
    if len(set(users)) != len(users):
        raise ConfigError("user_group_map has a user in two groups; name each user once.")
    default = list(members)[min(DEFAULT_GROUP, len(members) - 1)]
    return QosConfig(groups, names.index(default)) if enabled else None


def _load(path: str) -> Any:
    try:
        with Path(path).open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path[:200]!a} cannot be read: {error.strerror}.") from None
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"the file is larger than {MAX_FILE_BYTES} bytes.")
    try:
        return json.loads(data, object_pairs_hook=_unique)
    except (ValueError, RecursionError):
        raise ConfigError("the file is not valid JSON, or has a key twice.") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key comes twice")
    return found


def _keys(where: str, value: Any, keys: set[str]) -> None:
    if type(value) is not dict or set(value) != keys:
        raise ConfigError(f"{where} must be an object with the keys {', '.join(sorted(keys))} and no others.")


def _quotas(group: str, members: Any) -> dict[str, float]:
    if type(members) is not list:
        raise ConfigError(f"user_group_map.{group[:60]} must be an array of users.")
    quotas: dict[str, float] = {}
    for member in members:
        _keys(f"a user of group {group[:60]}", member, {"id", "quota_pct"})
        user, quota = member["id"], member["quota_pct"]
        if type(user) is not str or not user or user in quotas:
            raise ConfigError(f"group {group[:60]} has a user whose id is no text, or is there twice.")
        if type(quota) not in (int, float) or not (math.isfinite(quota) and 0 <= quota <= 100):
            raise ConfigError(f"quota_pct of user {user[:60]} must be a number from 0 to 100.")
        quotas[user] = float(quota)
    total = sum(quotas.values())
    return {user: quota / total if total else 1 / len(quotas) for user, quota in quotas.items()}
