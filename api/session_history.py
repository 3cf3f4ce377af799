"""Who said what in each session of /v1/chat/interactive: one small class between the protocol and whatever keeps sessions.

Here a session is its messages and the ids of its last turn, of which the next prompt is the continuation, so that the
prefix cache finds what was computed before. Bounded: the session that was idle longest makes room for a new one. Knows
no HTTP.
"""

from __future__ import annotations

import time
from collections import Counter, OrderedDict
from dataclasses import dataclass, field

MAX_SESSIONS = 1024
MAX_CHARS = 64 << 20  # of all sessions together


@dataclass(slots=True)
class Session:
    messages: list[dict[str, str]] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)  # prompt and answer of the last turn; [] where they are not its text
    num_tokens: int = 0  # how many there were
    busy: bool = False
    used_s: float = 0.0  # monotonic

    @property
    def size(self) -> int:
        return len(self.ids) + sum(len(message["content"]) for message in self.messages)


class SessionHistory:
    def __init__(self, most: int = MAX_SESSIONS, max_chars: int = MAX_CHARS) -> None:
        self._most = most
        self._max_chars = max_chars
        self._sessions: OrderedDict[tuple[str, int], Session] = OrderedDict()  # the one used last is last

    def __len__(self) -> int:
        return len(self._sessions)

    def ids(self, key: str) -> list[int]:
        """The numbers of the caller's sessions."""
        return [session_id for owner, session_id in self._sessions if owner == key]

    def get(self, key: str, session_id: int) -> Session | None:
        """The caller's session of that number."""
        return self._sessions.get((key, session_id))

    def begin(self, key: str, session_id: int) -> Session:
        """The session, made if need be, and busy until `finish` or `end`; the caller checked that it was not."""
        session = self._sessions.setdefault((key, session_id), Session())
        self._sessions.move_to_end((key, session_id))
        session.busy, session.used_s = True, time.monotonic()
        self._make_room()
        return session

    def leave(self, key: str, session_id: int) -> None:
        """A turn that never began: the session is as it was, and gone if it was new."""
        session = self._sessions.get((key, session_id))
        if session is not None:
            session.busy = False
            if not session.messages:
                self.end(key, session_id)

    def finish(self, session: Session, messages: list[dict[str, str]], ids: list[int], exact: bool = True) -> None:
        """A turn is over: what the conversation is from now on. `exact`: the ids are the text of the messages."""
        session.messages, session.num_tokens, session.busy = messages, len(ids), False
        session.ids = ids if exact else []
        self._make_room()

    def end(self, key: str, session_id: int) -> bool:
        """Forget the session; False where there is none."""
        return self._sessions.pop((key, session_id), None) is not None

    def _make_room(self) -> None:
        """Of the key that has most of them, so that nobody's sessions push out another's."""
        chars = sum(session.size for session in self._sessions.values())
        owned = Counter(key for key, _ in self._sessions)
        while len(self._sessions) > self._most or chars > self._max_chars:
            idle = [name for name, session in self._sessions.items() if not session.busy]
            if not idle:
                return
            most = max(owned[key] for key, _ in idle)
            name = next(name for name in idle if owned[name[0]] == most)
            owned[name[0]] -= 1
            chars -= self._sessions.pop(name).size
