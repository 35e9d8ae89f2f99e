"""Snapshots of what was read before, found again by the tokens: what two prompts share is read once.

A Griffin cannot go back to any place of a text, so snapshots are kept of the places where prompts part. Each is known
by a digest of all tokens up to there, and has a parent, the longest kept snapshot of its own beginning. So a snapshot
is worth what its loss would cost: the tokens from its parent to it, read again by whoever comes back; and less the
longer nobody came. Where room is needed the least worth goes first: of many close to one another the run is thinned,
and what nobody uses fades.

What must leave memory can go to a folder, as state files of docs/state.md, and come back from there.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray

from griffin_gguf.runtime.snapshot import Snapshot
from griffin_gguf.runtime.snapshot_folder import DIGEST_BYTES, Key, SnapshotFolder

_REMEMBERED = 4096  # answers whose tokens are known

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

    def worth(self, now: int) -> float:
        """Tokens that would be read again without it, less the longer it was of no use."""
        before = self.parent.key.count if self.parent else 0
        return (self.key.count - before) / (1 + now - self.used)


class PromptCache:
    """At most `nbytes` of snapshots in memory; all methods may be called from any thread.

    Where there is a `folder`, those that must go lie there. A text may go on from a `root`, such as a document's name:
    what has another root is another text.
    """

    def __init__(self, nbytes: int, folder: SnapshotFolder | None = None) -> None:
        self._most, self.nbytes, self._clock = nbytes, 0, 0
        self._entries: dict[Key, _Entry] = {}
        self._said: OrderedDict[tuple[Key, str], tuple[int, ...]] = OrderedDict()
        self._lock = threading.RLock()
        self._folder = folder

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, tokens: Tokens, root: str = "") -> tuple[int, Snapshot] | None:
        """The snapshot of the longest beginning of `tokens` that is kept, and how many tokens that is.

        One of all `tokens` must have its logits, since nothing would be left to feed.
        """
        ids = np.asarray(tokens, np.int32)
        with self._lock:
            kept = [*self._entries, *(self._folder.keys() if self._folder else ())]
            known = set(kept)
            for key in reversed(list(_keys(ids, root, {key.count for key in kept}))):
                snapshot = self._get(key) if key in known else None
                if snapshot is not None and (key.count < len(ids) or snapshot.logits is not None):
                    return key.count, snapshot
            return None

    def add(self, tokens: Tokens, snapshot: Snapshot, root: str = "") -> None:
        """Keep the state after `tokens`. One that is kept already takes over logits that it lacks."""
        ids = np.asarray(tokens, np.int32)
        if snapshot.nbytes > self._most:
            return
        with self._lock:
            *before, key = _keys(ids, root, {key.count for key in self._entries} | {len(ids)})
            known = self._entries.get(key)
            if known is not None:
                known.used = self._tick()
                if known.snapshot.logits is None and snapshot.logits is not None:
                    self.nbytes += snapshot.nbytes - known.snapshot.nbytes
                    known.snapshot = snapshot
            else:
                ancestors = [self._entries[k] for k in before if k in self._entries]
                self._insert(_Entry(key, root, ids, snapshot, ancestors[-1] if ancestors else None, self._tick()))
            self._make_room()

    def remember(self, before: Tokens, text: str, answer: Sequence[int], root: str = "") -> None:
        """After the tokens `before`, an answer of that `text` was the tokens `answer`."""
        with self._lock:
            self._said[_key(before, root), text] = tuple(answer)
            if len(self._said) > _REMEMBERED:
                self._said.popitem(last=False)

    def said(self, before: Tokens, text: str, root: str = "") -> tuple[int, ...] | None:
        """What `remember` was told: so an answer that comes back in a prompt is the tokens that were sampled."""
        with self._lock:
            return self._said.get((_key(before, root), text))

    def close(self) -> None:
        """Bring what is in memory to the folder, if there is one; then forget everything."""
        with self._lock:
            if self._folder:
                self._folder.close()
                for entry in sorted(self._entries.values(), key=lambda e: e.used):
                    self._folder.keep(entry.key, entry.snapshot)
            self._entries.clear()
            self._said.clear()
            self.nbytes = 0

    def _tick(self) -> int:
        self._clock += 1
        return self._clock

    def _get(self, key: Key) -> Snapshot | None:
        if entry := self._entries.get(key):
            entry.used = self._tick()
            return entry.snapshot
        assert self._folder is not None, "a key is an entry's or a file's"
        return self._folder.get(key)

    def _insert(self, entry: _Entry) -> None:
        siblings = entry.parent.children if entry.parent else {e for e in self._entries.values() if not e.parent}
        entry.children = {e for e in siblings if _begins(e, entry)}
        if entry.parent:
            entry.parent.children -= entry.children
            entry.parent.children.add(entry)
        for child in entry.children:
            child.parent = entry
        self._entries[entry.key] = entry
        self.nbytes += entry.snapshot.nbytes

    def _make_room(self) -> None:
        while self.nbytes > self._most:
            least = min(self._entries.values(), key=lambda e: e.worth(self._clock))
            self._remove(least)
            if self._folder:
                self._folder.put(least.key, least.snapshot)

    def _remove(self, entry: _Entry) -> None:
        for child in entry.children:
            child.parent = entry.parent
        if entry.parent:
            entry.parent.children.remove(entry)
            entry.parent.children |= entry.children
        del self._entries[entry.key]
        self.nbytes -= entry.snapshot.nbytes


def _begins(longer: _Entry, entry: _Entry) -> bool:
    """Whether the text of `longer` begins with that of `entry`."""
    count = entry.key.count
    same_root = longer.root == entry.root
    return same_root and longer.key.count > count and bool((longer.tokens[:count] == entry.tokens).all())


def _key(tokens: Tokens, root: str) -> Key:
    return next(_keys(np.asarray(tokens, np.int32), root, {len(tokens)}))


def _keys(tokens: _Ids, root: str, counts: set[int]) -> Iterator[Key]:
    """The keys of the beginnings of `tokens` that have one of these lengths, shortest first."""
    digest, done = blake2b(root.encode() + b"\0", digest_size=DIGEST_BYTES), 0
    for count in sorted(count for count in counts if count <= len(tokens)):
        digest.update(tokens[done:count].tobytes())
        done = count
        yield Key(count, digest.hexdigest())
