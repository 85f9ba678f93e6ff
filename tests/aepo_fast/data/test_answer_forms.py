"""Every task's own answer, in every form that models write: `python THIS_FILE` prints the table."""

from __future__ import annotations

import json
from collections import deque
from typing import Any

import pytest
from reasoning_gym.factory import DATASETS
from reasoning_gym.games.rush_hour import Board

from aepo_fast.config.data import SourceConfig
from aepo_fast.data.tasks import load_task, score_task, task_verifier

FORMS = {
    "bare": "X",
    "sentence": "The answer is X.",
    "next line": "The answer is:\nX",
    "bold label": "**Answer:** X",
    "boxed": "So we have it: $\\boxed{X}$.",
    "tags": "First 1 2 3, which is no answer.\n<answer>X</answer>",
    "text after": "<answer>X</answer>\nI needed 2 steps.",
    "label": "<think>The answer is 7.</think>Let me see.\nThere are 12 of them.\n\nAnswer: X",
    "bold or fence": "Some steps.\n\nFinal answer: **X**",
}
# Named in DATASETS, but made of other tasks.
TASKS = sorted(set(DATASETS) - {"composite"})
# Tasks that are slow to draw get easier questions.
PARAMS: dict[str, dict[str, Any]] = {
    "rush_hour": {"max_moves": 2},
    "knight_swap": {"max_nodes": 6, "max_pieces": 2},
    "quantum_lock": {"difficulty": 5},
    "palindrome_partitioning": {"max_string_len": 8},
}


def rows_of(name: str, size: int = 2, seed: int = 0) -> tuple[Any, list[dict[str, Any]]]:
    """A task's verifier and rows, each with an answer that the verifier accepts."""
    source = SourceConfig(kind="reasoning_gym", name=name, size=size, params=PARAMS.get(name, {}))
    return task_verifier(source), load_task(source, seed)


def own_answer(name: str, row: dict[str, Any]) -> str:
    """An answer that the task's verifier accepts."""
    metadata = row["metadata"]
    if row["answer"] is not None:
        return str(row["answer"])
    if name == "graph_color":
        return json.dumps(metadata["possible_answer"])
    if name == "propositional_logic":
        return str(metadata["example_answer"])
    if name == "rubiks_cube":
        return str(metadata["example_correct_answer"])
    return _moved_boxes(metadata["initial_state"]) if name == "boxnet" else _moved_cars(metadata)


def _moved_boxes(state: dict[str, list[str]]) -> str:
    plan = []
    for square, things in state.items():
        for box in (thing for thing in things if thing.startswith("box_")):
            target = "target_" + box.removeprefix("box_")
            [goal] = [other for other, held in state.items() if target in held]
            row, column = map(float, square.split("_"))
            to_row, to_column = map(float, goal.split("_"))
            while (row, column) != (to_row, to_column):
                agent = f"Agent[{row}, {column}]"
                if row != to_row:
                    row += 1 if to_row > row else -1
                else:
                    column += 1 if to_column > column else -1
                plan.append({agent: f"move({box}, square[{row}, {column}])"})
            plan.append({f"Agent[{row}, {column}]": f"move({box}, {target})"})
    return json.dumps(plan, indent=1)


def _moved_cars(metadata: dict[str, Any]) -> str:
    paths, seen = deque([""]), set()
    while True:
        path = paths.popleft()
        for car in sorted(set(metadata["board_config"]) - set("ox.")):
            for step in (-4, -3, -2, -1, 1, 2, 3, 4):
                moves = f"{path} {car}{step:+d}".strip()
                board = Board(metadata["board_config"])
                board.perform_moves(moves)
                if board.solved:
                    return moves
                if board.board_str() not in seen:
                    seen.add(board.board_str())
                    paths.append(moves)


def found(verifier: Any, row: dict[str, Any], text: str) -> bool:
    try:
        return score_task(verifier, row, text) == 1.0
    except Exception:  # some verifiers raise on what is no answer
        return False


def count(name: str) -> dict[str, tuple[int, int]]:
    """Of each form: how many own answers were found, of how many."""
    verifier, rows = rows_of(name)
    return {
        form: (
            sum(found(verifier, row, text.replace("X", own_answer(name, row))) for row in rows),
            len(rows),
        )
        for form, text in FORMS.items()
    }


@pytest.mark.parametrize("name", TASKS)
def test_a_tasks_own_answer_is_found_in_every_form(name: str) -> None:
    missed = {form: num for form, num in count(name).items() if num[0] < num[1]}
    assert not missed


def main() -> None:
    counts = {name: count(name) for name in TASKS}
    for form, text in FORMS.items():
        whole = [name for name in TASKS if counts[name][form][0] == counts[name][form][1]]
        missing = sorted(set(TASKS) - set(whole))
        print(f"{form:14}{text!r:90.88}{len(whole):4} of {len(TASKS)} tasks", *missing[:6])


if __name__ == "__main__":
    main()
