"""A store of torch that nothing is in yet, for the processes of one start of a run.

torchrun's store outlives the processes that it starts again. In it they would find the addresses,
and the errors, of those before them.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import uuid
from datetime import timedelta
from typing import Any


def fresh_store(rank: int, size: int, timeout: timedelta) -> Any:
    """The store that torchrun's variables name, in a part of its own for these processes.

    Raises RuntimeError where some rank does not come in time.
    """
    from torch.distributed.rendezvous import rendezvous

    store, _, _ = next(rendezvous("env://", timeout=timeout))
    own = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # that of rank 0's process
    name = "ranks" if own else _name_of_start(store, rank, size, timeout)
    return part_of(store, name)


def part_of(store: Any, name: str) -> Any:
    """A store within another one, where nobody meets its names."""
    from torch.distributed import PrefixStore  # pyright: ignore[reportPrivateImportUsage]

    return PrefixStore(name, store)


def _name_of_start(store: Any, rank: int, size: int, timeout: timedelta) -> str:
    """A name that all ranks of this start have agreed on, and that no other start has.

    Each shows a word of its own. Rank 0 lists the words, maybe old ones, until each rank has said
    that its own is in the list. Counts of restarts are of no use: each machine has its own.
    """
    word, names = uuid.uuid4().hex[:12], [f"word/{other}" for other in range(size)]
    store.set(names[rank], word)
    wait, until = 0.02, time.monotonic() + timeout.total_seconds()
    missing: list[int] = []
    while time.monotonic() < until:
        if rank == 0:
            missing = [other for other, name in enumerate(names) if not store.check([name])]
            if not missing:
                words = [found.decode() for found in store.multi_get(names)]
                store.set("words", json.dumps(words))
        if not missing and store.check(["words"]):
            words = json.loads(store.get("words"))
            if len(words) == size and words[rank] == word:
                start = f"start/{hashlib.sha256(' '.join(words).encode()).hexdigest()}"
                store.set(f"{start}/{rank}", "")
                if rank == 0:
                    found = [store.check([f"{start}/{other}"]) for other in range(size)]
                    missing = [other for other, here in enumerate(found) if not here]
                    if not missing:
                        store.set(f"{start}/all", "")
                if store.check([f"{start}/all"]):
                    return start
        time.sleep(wait)
        wait = min(2 * wait, 0.5)
    who = f": {missing[:8]}" if missing else ""
    raise RuntimeError(f"not all of {size} ranks came within {timeout.total_seconds():g} s{who}")
