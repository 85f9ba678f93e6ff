"""The generated tables: which results they take, and that the pages have today's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import tables

BLOCKS = "headline first-light entropy kernels-gpu kernels-cpu tokens-cpu step-gpu step-cpu "
BLOCKS += "e2e-gpu e2e-cpu"


def test_table_by_tokens_prefers_runs_beside_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    (tmp_path / "cpu").mkdir()

    def write(day: int, tokens: int, **ratios: float) -> None:
        candidates = {
            name: {"status": "ok", "ratio_to_floor": ratio, "peak_extra_bytes": 2**21}
            for name, ratio in ratios.items()
        }
        modes = {"training": {"candidates": candidates}}
        record = {
            "environment": {"cpu": "a CPU", "device": "cpu", "row_kernels": "c++"},
            "settings": {"dtype": "bfloat16"},
            "cases": [
                {"hidden": 8, "vocab": 64, "tokens": tokens, "modes": modes},
                {"hidden": 8, "vocab": 32, "tokens": 256, "modes": {}},
            ],
        }
        (tmp_path / "cpu" / f"kernels-2026010{day}-000000.json").write_text(json.dumps(record))

    write(1, 256, **{"ours (chunked)": 1.5, "TRL chunked": 9.0})
    write(2, 256, **{"ours (chunked)": 1.4})
    write(3, 1024, **{"ours (chunked)": 1.2})
    write(4, 1024, **{"ours (chunked)": 1.1})
    table = tables.tokens_on_cpu()
    assert "**a CPU, rows c++**" in table and "| N | H 8, V 64 |" in table
    first, last = (f"cpu/kernels-2026010{day}-000000.json" for day in (1, 4))
    assert f"| 256 | **[1.50, 2 MiB]({first})**; TRL chunked 9.00, 2 MiB |" in table
    assert f"| 1,024 | **[1.10, 2 MiB]({last})** |" in table


def test_tables_of_the_pages_are_those_of_the_results() -> None:
    text = ""
    for page, to_root in tables.PAGES.items():
        text += page.read_text()
        assert tables.render(page.read_text(), to_root) == page.read_text()
    for name in BLOCKS.split():
        assert text.count(f"<!-- {name} -->") == text.count(f"<!-- /{name} -->") == 1
