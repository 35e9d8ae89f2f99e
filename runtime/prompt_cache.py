"""Snapshots of what was read before, found again by the tokens: what two prompts share is read once.

A Griffin cannot go back to any place of a text, so snapshots are kept of the places where prompts part. Each is known
by a digest of all tokens up to there, and has a parent, the longest kept snapshot of its own beginning. So a snapshot
is worth what its loss would cost: the tokens from its parent to it, read again by whoever comes back; and less the
longer nobody came. Where room is needed the least worth goes first: of many close to one another the run is thinned,
and what nobody uses fades.

What must leave memory can go to a folder, as state files of docs/state.md, and come back from there.
"""

import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from heapq import heapify, heappop, heappush
from typing import Any

import numpy as np
from numpy.typing import NDArray

from griffin_gguf.runtime.snapshot import Snapshot
from griffin_gguf.runtime.snapshot_folder import DIGEST_BYTES, Key, SnapshotFolder

#: Of `nbytes`, what the tokens of answers may take beside it.
_SAID = 1 / 16

#: How much is freed at once when there is no room.
_FREED = 1 / 16

Tokens = Sequence[int] | NDArray[np.integer[Any]]
_Ids = NDArray[np.int32]


@dataclass(eq=False)
class _Entry:
    """A snapshot, and what stands before and behind it."""

    key: Key
    root: str
    tokens: _Ids  # a view: those of one text share their memory
    snapshot: Snapshot
    parent: "_Entry | None"
    used: int
    children: "set[_Entry]" = field(default_factory=lambda: set[_Entry]())

    @property
    def nbytes(self) -> int:
        """What it takes, its tokens as if they were its own."""
        return self.snapshot.nbytes + self.tokens.nbytes

    def worth(self, now: int) -> float:
        """Tokens that would be read again without it, less the longer it was of no use."""
        before = self.parent.key.count if self.parent else 0
        return (self.key.count - before) / (1 + now - self.used)


class PromptCache:
    """At most `nbytes` of snapshots in memory, 0: none; all methods may be called from any thread.

    Where there is a `folder`, those that must go lie there. A text may go on from a `root`, such as a document's name:
    what has another root is another text.
    """

    def __init__(self, nbytes: int, folder: SnapshotFolder | None = None) -> None:
        self._most, self.nbytes, self._clock = nbytes, 0, 0
        self._entries: dict[Key, _Entry] = {}
        self._lengths = Counter[int]()  # of the texts that are kept
        self._said: OrderedDict[tuple[Key, str], _Ids] = OrderedDict()
        self._said_nbytes = 0
        self._lock = threading.RLock()
        self._folder = folder

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, tokens: Tokens, root: str = "") -> tuple[int, Snapshot] | None:
        """The snapshot of the longest beginning of `tokens` that is kept, and how many tokens that is.

        One of all `tokens` must have its logits, since nothing would be left to feed. May read a file.
        """
        ids = np.asarray(tokens, np.int32)
        on_disk = set(self._folder.keys()) if self._folder else set[Key]()
        with self._lock:
            lengths = {*self._lengths, *(key.count for key in on_disk)}
        for key in reversed(list(_keys(ids, root, lengths))):
            snapshot = self._get(key)
            if snapshot is None and self._folder and key in on_disk:
                snapshot = self._folder.get(key)  # nobody waits for that
            if snapshot is not None and (key.count < len(ids) or snapshot.logits is not None):
                return key.count, snapshot
        return None

    def add(self, tokens: Tokens, snapshot: Snapshot, root: str = "") -> None:
        """Keep the state after `tokens`. One that is kept already takes over logits that it lacks."""
        ids = np.asarray(tokens, np.int32)
        if snapshot.nbytes > self._most:
            return
        with self._lock:
            *before, key = _keys(ids, root, {*self._lengths, len(ids)})
            known = self._entries.get(key)
            if known is not None:
                known.used = self._tick()
                if known.snapshot.logits is None and snapshot.logits is not None:
                    self.nbytes += snapshot.nbytes - known.snapshot.nbytes
                    known.snapshot = snapshot
            else:
                ancestors = [self._entries[k] for k in before if k in self._entries]
                self._insert(_Entry(key, root, ids, snapshot, ancestors[-1] if ancestors else None, self._tick()))
            if self.nbytes > self._most:
                self._make_room()

    def remember(self, before: Tokens, text: str, answer: Sequence[int], root: str = "") -> None:
        """After the tokens `before`, an answer of that `text` was the tokens `answer`."""
        known, ids = (_key(before, root), text), np.array(answer, np.int32)
        with self._lock:
            self._said_nbytes += _nbytes(text, ids)
            if (replaced := self._said.pop(known, None)) is not None:
                self._said_nbytes -= _nbytes(text, replaced)
            self._said[known] = ids
            while self._said_nbytes > _SAID * self._most:
                (_, old), gone = self._said.popitem(last=False)
                self._said_nbytes -= _nbytes(old, gone)

    def said(self, before: Tokens, text: str, root: str = "") -> list[int] | None:
        """What `remember` was told: so an answer that comes back in a prompt is the tokens that were sampled."""
        known = _key(before, root), text
        with self._lock:
            found = self._said.get(known)
            if found is None:
                return None
            self._said.move_to_end(known)
            return found.tolist()

    def close(self) -> None:
        """Bring what is in memory to the folder, if there is one, the last used first; then forget everything."""
        with self._lock:
            if self._folder:
                latest = sorted(self._entries.values(), key=lambda e: e.used, reverse=True)
                self._folder.fill([(entry.key, entry.snapshot) for entry in latest])
            self._entries.clear()
            self._lengths.clear()
            self._said.clear()
            self.nbytes = self._said_nbytes = 0

    def _tick(self) -> int:
        self._clock += 1
        return self._clock

    def _get(self, key: Key) -> Snapshot | None:
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                return None
            entry.used = self._tick()
            return entry.snapshot

    def _insert(self, entry: _Entry) -> None:
        siblings = entry.parent.children if entry.parent else [e for e in self._entries.values() if not e.parent]
        entry.children = {e for e in siblings if _begins(e, entry)}
        if entry.parent:
            entry.parent.children -= entry.children
            entry.parent.children.add(entry)
        for child in entry.children:
            child.parent = entry
        self._entries[entry.key] = entry
        self._lengths[entry.key.count] += 1
        self.nbytes += entry.nbytes

    def _make_room(self) -> None:
        """Let go what is worth least, again and again: worth grows only, as those before an entry go."""
        heap = [(entry.worth(self._clock), i, entry) for i, entry in enumerate(self._entries.values())]
        heapify(heap)
        while self.nbytes > (1 - _FREED) * self._most:
            worth, i, entry = heappop(heap)
            if (now := entry.worth(self._clock)) > worth:
                heappush(heap, (now, i, entry))
                continue
            self._remove(entry)
            if self._folder:
                self._folder.put(entry.key, entry.snapshot)

    def _remove(self, entry: _Entry) -> None:
        for child in entry.children:
            child.parent = entry.parent
        if entry.parent:
            entry.parent.children.remove(entry)
            entry.parent.children |= entry.children
        del self._entries[entry.key]
        self._lengths[entry.key.count] -= 1
        if not self._lengths[entry.key.count]:
            del self._lengths[entry.key.count]
        self.nbytes -= entry.nbytes


def _begins(longer: _Entry, entry: _Entry) -> bool:
    """Whether the text of `longer` begins with that of `entry`."""
    count = entry.key.count
    if longer.key.count <= count or longer.root != entry.root or longer.tokens[count - 1] != entry.tokens[-1]:
        return False  # as most do: the quick questions first
    return bool((longer.tokens[:count] == entry.tokens).all())


def _nbytes(text: str, ids: _Ids) -> int:
    """What the tokens of an answer take, and what they are known by."""
    return ids.nbytes + 4 * len(text) + 300


def _key(tokens: Tokens, root: str) -> Key:
    return next(_keys(np.asarray(tokens, np.int32), root, {len(tokens)}))


def _keys(tokens: _Ids, root: str, counts: set[int]) -> Iterator[Key]:
    """The keys of the beginnings of `tokens` that have one of these lengths, shortest first."""
    digest, done = blake2b(root.encode() + b"\0", digest_size=DIGEST_BYTES), 0
    for count in sorted(count for count in counts if count <= len(tokens)):
        digest.update(tokens[done:count].tobytes())
        done = count
        yield Key(count, digest.hexdigest())
