"""`make soak` in short."""

from __future__ import annotations

from pathlib import Path

from tests import soak


def test_a_run_killed_again_and_again_ends_like_an_undisturbed_one(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    assert len(soak.kill_at_random(tiny_model_dir, tmp_path, kills=3)) == 3


def test_a_run_holds_no_more_as_it_goes_on(tiny_model_dir: Path, tmp_path: Path) -> None:
    *_, steps = soak.watch_growth(tiny_model_dir, tmp_path, seconds=3)
    assert steps > soak.WARM_STEPS
