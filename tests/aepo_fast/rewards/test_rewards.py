import asyncio
import json
import time
from pathlib import Path
from typing import Any

import pytest

from aepo_fast.config.data import DataConfig, SourceConfig
from aepo_fast.config.errors import ConfigError
from aepo_fast.config.sections import RewardConfig
from aepo_fast.data.sources import read_rows
from aepo_fast.data.tasks import load_task
from aepo_fast.rewards.math_worker import MathWorker, MathWorkerError
from aepo_fast.rewards.reward import (
    RewardError,
    build_reward,
    check_answers,
    gold_answer,
    soft_overlong_penalty,
)
from aepo_fast.rewards.user_call import columns_of
from aepo_fast.samples import Prompt

FILE = SourceConfig(name="x.jsonl")
GYM = SourceConfig(
    kind="reasoning_gym", name="products", size=4, params={"min_digits": 1, "max_digits": 1}
)
IDS = [(1, 2), (3,), (4,)]


def prompt(source: int = 0, **columns: Any) -> Prompt:
    columns = {"prompt": "question", **columns}
    text = columns["prompt"]
    messages = [{"role": "user", "content": text}] if isinstance(text, str) else text
    return Prompt("key", tuple(messages), columns, source, (1,))


def reward_of(function: str, *sources: SourceConfig, **settings):
    data = DataConfig(sources=sources or (FILE,))
    return build_reward(RewardConfig(function=function, **settings), data)


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    """Writes a module that rewards can be imported from; returns the writer."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    names = iter(f"user_reward_{index}_{time.monotonic_ns()}" for index in range(100))

    def write(body: str) -> str:
        name = next(names)
        (tmp_path / f"{name}.py").write_text(body)
        return f"{name}:reward"

    return write


def test_task_reward_uses_the_verifier_of_each_source():
    other = SourceConfig(kind="reasoning_gym", name="spell_backward", size=2)
    reward = reward_of("task", GYM, other, FILE)
    rows = load_task(GYM, 0)[:2]
    word = load_task(other, 0)[0]
    prompts = [prompt(0, **rows[0]), prompt(0, **rows[1]), prompt(1, **word)]
    prompts += [prompt(2, answer="\\frac{1}{2}"), prompt(2, answer="#### 1,042")]
    right = [f"= {rows[0]['answer']}", rows[1]["answer"], word["answer"], "so $0.5$", "it is 1042"]
    assert reward.score(prompts, right, [()] * 5).rewards == [1.0] * 5
    wrong = ["nothing", "1 2 3 997", word["answer"][::-1], "$\\frac{1}{3}$", "1043"]
    assert reward.score(prompts, wrong, [()] * 5).rewards == [0.0] * 5
    assert reward.required_columns == ("answer",)


@pytest.mark.parametrize(
    ("answer", "right", "wrong"),
    [
        (42, "The answer is \\boxed{42}", "42, no: \\boxed{43}"),
        (145.0, "we get 145.", "we get 14.5"),
        ("\\frac{3}{4}", "\\boxed{\\frac{6}{8}}", "\\boxed{\\frac{4}{3}}"),
        ("$\\frac{3}{4}$", "it is 0.75", "it is 0.7"),
        ("(3, \\frac{\\pi}{2})", "$(3, \\pi/2)$", "$(3, \\pi/3)$"),
        ("x^2+1", "\\boxed{1 + x^2}", "\\boxed{1 - x^2}"),
        ("\\text{Evelyn}", "\\boxed{\\text{Evelyn}}", "\\boxed{\\text{Carla}}"),
        ("She has 3 + 4 = <<3+4=7>>7\n#### 1,007", "\\boxed{1007}", "\\boxed{7}"),
        ("-4", "= -4", "= 4"),
    ],
)
def test_math_verify(answer, right, wrong):
    columns = {"answer": answer}
    result = reward_of("math_verify").score([prompt(**columns)] * 3, [right, wrong, ""], IDS)
    assert result.rewards == [1.0, 0.0, 0.0] and result.errors == 0


def test_math_verify_survives_an_expression_that_never_returns():
    worker = MathWorker(timeout_s=2.0)
    assert worker.verify("42", "42")
    process = worker._process._process
    with pytest.raises(MathWorkerError, match="no result within reward.timeout_s = 2.0"):
        worker.verify("42", "$9^{9^{9^{9}}}$")
    assert process is not None and process.returncode is not None
    assert worker.verify("42", "42")


def test_math_verify_starts_anew_when_its_process_was_killed():
    worker = MathWorker(timeout_s=5.0)
    assert worker.verify("42", "42")
    process = worker._process._process
    assert process is not None
    process.kill()
    process.wait()
    assert worker.verify("42", "42")


def test_unparsable_right_answer_is_an_error_not_a_zero():
    class Broken:
        def __str__(self):
            raise ValueError("no text")

    reward = reward_of("math_verify")
    with pytest.warns(RuntimeWarning, match="the right answer says nothing"):
        result = reward.score([prompt(answer=x) for x in ("", 1, Broken())], ["1"] * 3, IDS)
    assert result.rewards == [None, 1.0, None] and result.errors == 2


@pytest.mark.parametrize(
    ("answer", "text"),
    [(7, "7"), (7.0, "7"), (0.5, "0.5"), ("a\n#### 42 ", "42"), (" \\pi ", "\\pi")],
)
def test_gold_answer(answer, text):
    assert gold_answer(answer) == text


def test_user_function_gets_trl_arguments(user_module):
    name = user_module(
        "import json, pathlib\n"
        "def reward(prompts, completions, completion_ids, level, extra=None, **columns):\n"
        "    pathlib.Path('seen.json').write_text(json.dumps(locals()))\n"
        "    return [1, 0.5, None]\n"
    )
    reward = reward_of(name)
    assert reward.required_columns == ("level",)
    chat = [{"role": "user", "content": "hello"}]
    prompts = [prompt(level=1, kind="a"), prompt(level=2), prompt(prompt=chat, level=3)]
    result = reward.score(prompts, ["x", "y", "z"], IDS)
    assert result.rewards == [1.0, 0.5, None] and result.errors == 0
    seen = json.loads(Path("seen.json").read_text())
    assert seen["prompts"] == ["question", "question", chat]
    assert seen["completions"] == ["x", "y", [{"role": "assistant", "content": "z"}]]
    assert seen["completion_ids"] == [[1, 2], [3], [4]]
    assert seen["level"] == [1, 2, 3] and seen["extra"] is None
    assert seen["columns"] == {"kind": ["a", None, None]}


def test_user_function_that_takes_few_arguments(user_module):
    name = user_module("def reward(completions):\n    return [len(c) for c in completions]\n")
    result = reward_of(name).score([prompt()] * 3, ["a", "bb", ""], IDS)
    assert result.rewards == [1.0, 2.0, 0.0]


def test_async_user_function(user_module):
    name = user_module(
        "import asyncio\n"
        "async def one(text):\n"
        "    await asyncio.sleep(0.01)\n"
        "    return len(text)\n"
        "async def reward(completions, **columns):\n"
        "    return await asyncio.gather(*map(one, completions))\n"
    )
    assert reward_of(name).score([prompt()] * 3, ["a", "bb", "ccc"], IDS).rewards == [1, 2, 3]


BROKEN = {
    "raise ValueError('boom')": "ValueError: boom",
    "return [1.0]": "returned 1 rewards for 3 completions",
    "return 1.0": "TypeError",
    "raise SystemExit(3)": "SystemExit: 3",
    "import time; time.sleep(5)": "no result within reward.timeout_s = 0.2",
}


@pytest.mark.parametrize("body", list(BROKEN))
def test_failing_user_function_stops_or_is_counted(user_module, body):
    name = user_module(f"def reward(completions, **columns):\n    {body}\n")
    texts = ["alpha", "beta", "gamma"]
    with pytest.raises(RewardError) as caught:
        reward_of(name, timeout_s=0.2, on_error="stop").score([prompt()] * 3, texts, IDS)
    for part in (name, "sample 0 of 3", BROKEN[body], "alpha", "question"):
        assert part in str(caught.value)
    counting = reward_of(name, timeout_s=0.2)
    with pytest.warns(RuntimeWarning, match="sample 0 of 3"):
        result = counting.score([prompt()] * 3, texts, IDS)
    assert result.rewards == [None] * 3 and result.errors == 3


@pytest.mark.parametrize("value", ["float('nan')", "float('inf')", "'good'", "[1]"])
def test_value_that_is_no_number_is_no_zero(user_module, value):
    name = user_module(f"def reward(completions, **columns):\n    return [1, {value}, 0]\n")
    with pytest.raises(RewardError, match="sample 1 of 3: returned"):
        reward_of(name, on_error="stop").score([prompt()] * 3, ["a", "b", "c"], IDS)
    counting = reward_of(name)
    with pytest.warns(RuntimeWarning):
        result = counting.score([prompt()] * 3, ["a", "b", "c"], IDS)
    assert result.rewards == [1.0, None, 0.0] and result.errors == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module_here:reward", "importing 'no_such_module_here' failed"),
        ("math:no_such_function", "has no function 'no_such_function'"),
        ("math:pi", "has no function 'pi'"),
    ],
)
def test_bad_function_names(name, message):
    with pytest.raises(ConfigError, match=message):
        reward_of(name)


def test_module_that_fails_on_import(user_module):
    with pytest.raises(ConfigError, match="ZeroDivisionError"):
        reward_of(user_module("1 / 0\n"))


def test_columns_of_are_the_arguments_without_default():
    def function(prompts, completions, answer, *, level, weight=1.0, **columns): ...

    assert columns_of(function) == ("answer", "level")


def test_nothing_to_score():
    assert reward_of("task").score([], [], []).rewards == []


def test_scoring_works_inside_a_running_event_loop(user_module):
    name = user_module("async def reward(completions):\n    return [1.0 for _ in completions]\n")
    reward = reward_of(name)

    async def main():
        return reward.score([prompt()], ["a"], [(1,)])

    assert asyncio.run(main()).rewards == [1.0]


def test_a_value_whose_conversion_fails_is_an_error_of_its_sample(user_module):
    function = user_module(
        "class Value:\n"
        "    def __float__(self):\n"
        "        return 1 / 0\n"
        "def reward(completions, **columns):\n"
        "    return [Value() for _ in completions]\n"
    )
    with pytest.raises(RewardError, match="sample 0 of 1.*which is no number"):
        reward_of(function, on_error="stop").score([prompt()], ["x"], [[1]])


def test_soft_overlong_penalty() -> None:
    expected = {80: 0.0, 90: 0.0, 95: -0.5, 100: -1.0}
    for length, value in expected.items():
        assert soft_overlong_penalty(length, 100, 10) == pytest.approx(value)
    assert soft_overlong_penalty(100, 100, 0) == 0.0


def test_a_task_whose_answer_is_none_is_scored_by_its_verifier():
    source = SourceConfig(kind="reasoning_gym", name="graph_color", size=2)
    rows = list(read_rows(source, 0))
    assert [row["answer"] for row in rows] == [None, None]
    reward = reward_of("task", source)
    found = [prompt(0, **row) for row in rows]
    check_answers(reward, DataConfig(sources=(source,)), found)
    assert reward.score(found, ["no idea", "{}"], [(), ()]).rewards == [0.0, 0.0]
    with pytest.raises(ConfigError, match="reads the column 'answer', and the task 'graph_color'"):
        check_answers(reward_of("math_verify", source), DataConfig(sources=(source,)), found)


@pytest.mark.parametrize("error", [None, KeyError("why")])
def test_a_verifier_that_refuses_its_own_answers_is_said_before_training(monkeypatch, error):
    class Verifier:
        def score_answer(self, answer, entry):
            if error is not None:
                raise error
            return 0.0

    monkeypatch.setattr("aepo_fast.rewards.reward.task_verifier", lambda source: Verifier())
    reward, found = reward_of("task", GYM), [prompt(0, **row) for row in load_task(GYM, 0)]
    wanted = "data.sources.name = 'products'.*fails on right answers of its own: "
    wanted += "KeyError: 'why'" if error else "'.*' is no right answer to it"
    with pytest.raises(ConfigError, match=wanted):
        check_answers(reward, DataConfig(sources=(GYM,)), found)


def test_former_names_are_still_there():
    from aepo_fast.config import RewardConfig as config
    from aepo_fast.data import Prompt as prompt_class
    from aepo_fast.math_worker import MathWorker as worker
    from aepo_fast.rewards import build_reward as build
    from aepo_fast.rewards import gold_answer as gold
    from aepo_fast.tasks import load_task as load

    assert (config, prompt_class, worker) == (RewardConfig, Prompt, MathWorker)
    assert (build, gold, load) == (build_reward, gold_answer, load_task)


def test_a_text_that_hangs_a_verifier_costs_its_sample():
    sources = [
        SourceConfig(kind="reasoning_gym", name=name, size=1) for name in ("countdown", "coin_flip")
    ]
    rows = [load_task(source, 0)[0] for source in sources]
    reward = reward_of("task", *sources, timeout_s=1.0)
    prompts = [prompt(0, **rows[0])] * 3 + [prompt(1, **rows[1])]
    answers = [rows[0]["answer"], "words", "9**9**9**9", "1e999999999"]
    with pytest.warns(RuntimeWarning, match="sample 2 of 4: no result within"):
        result = reward.score(prompts, [f"<answer>{x}</answer>" for x in answers], [()] * 4)
    assert result.rewards == [1.0, 0.0, None, None] and result.errors == 2
