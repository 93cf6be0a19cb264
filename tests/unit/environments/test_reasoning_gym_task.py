import inspect

import pytest
from transformers.utils import get_json_schema

from composer_replication.environments import reasoning_gym_task
from composer_replication.environments.protocol import TextEnvironment, ToolError
from composer_replication.environments.reasoning_gym_task import (
    GymSpec,
    ReasoningGym,
    gym_task,
)
from composer_replication.errors import ConfigError, DataError, MissingDependencyError

COUNTING = {"dataset": "letter_counting"}


def started(**row):
    environment = ReasoningGym()
    environment.reset(**({"task_seed": 0} | row))
    return environment, gym_task(GymSpec(**({"task_seed": 0} | row)))


def test_it_follows_the_text_protocol():
    assert isinstance(ReasoningGym(), TextEnvironment)


@pytest.mark.parametrize("row", [{}, COUNTING, {"dataset": "basic_arithmetic"}])
def test_the_right_answer_earns_one_and_ends_the_episode(row):
    environment, task = started(**row)
    observation = environment._step_text(f" {task.answer}<|im_end|>")
    assert (observation.error, observation.is_done) == (None, True)
    assert environment.get_reward() == 1.0


@pytest.mark.parametrize("row", [{}, COUNTING])
def test_everything_else_earns_nothing_and_is_hinted_by_another_question(row):
    for seed in range(6):
        _, task = started(task_seed=seed, **row)
        wrong = ["", " ", task.example[1], task.question, f"{task.answer} {task.example[1]}"]
        wrong += [demo for _, demo in task.demos if demo != task.answer] + [
            "0" * 3000,
            "\x00",
            "None",
            "[1]",
            "-1",
        ]
        for text in wrong:
            environment, _ = started(task_seed=seed, **row)
            observation = environment._step_text(text)
            assert environment.get_reward() == 0.0
            assert observation.error.kind in ("wrong_answer", "no_answer")
            assert task.example[0] in observation.error.message
            environment._step_text(task.answer)
            assert environment.get_reward() == 0.0


@pytest.mark.parametrize("row", [{}, COUNTING])
def test_no_demonstration_asks_the_question_and_no_hint_holds_its_answer(row):
    for split in ("train", "heldout"):
        for seed in range(6):
            task = gym_task(GymSpec(seed, split, **row))
            questions = [question for question, _ in (*task.demos, task.example)]
            assert task.question not in questions
            assert len(set(questions)) == 3
            assert task.example[1] != task.answer


def test_a_question_is_in_one_split_whatever_its_seed():
    settings = '{"min_word_len": 3, "max_word_len": 3}'
    asked = {
        split: {
            question
            for seed in range(20)
            for task in [gym_task(GymSpec(seed, split, settings=settings))]
            for question in [task.question, *(q for q, _ in task.demos), task.example[0]]
        }
        for split in ("train", "heldout")
    }
    assert len(asked["train"]) > 20
    assert not asked["train"] & asked["heldout"]


def test_equal_seeds_give_equal_questions():
    reasoning_gym_task._questions.cache_clear()
    first = gym_task(GymSpec(5))
    reasoning_gym_task._questions.cache_clear()
    assert gym_task(GymSpec(5)) == first != gym_task(GymSpec(6))


def test_its_one_tool_is_answer():
    members = inspect.getmembers(ReasoningGym, predicate=inspect.isfunction)
    assert {n for n, _ in members if not n.startswith("_")} == {"reset", "get_reward", "answer"}
    environment, task = started()
    assert get_json_schema(environment.answer)["function"]["name"] == "answer"
    assert environment.answer(task.answer) == "ok"
    environment, task = started()
    with pytest.raises(ToolError, match="the answer is"):
        environment.answer("no")


@pytest.mark.parametrize(
    ("row", "error", "match"),
    [
        ({"dataset": "spell_backwards"}, ConfigError, "Did you mean 'spell_backward'"),
        ({"settings": '{"max_len": 3}'}, ConfigError, "does not take settings"),
        ({"settings": '{"min_word_len": 9, "max_word_len": 3}'}, ConfigError, "does not take"),
        ({"settings": "3"}, ConfigError, "does not take settings"),
        ({"settings": "{"}, ConfigError, "does not take settings"),
        ({"split": "test"}, DataError, "no split 'test'"),
        ({"num_demos": -1}, DataError, "0 or more"),
        ({"num_demos": "1"}, DataError, "must be int"),
        ({"prompt": [{"role": "user", "content": "hi"}]}, DataError, "Make the data again"),
        ({"num_demos": 80}, DataError, "too few answers"),
    ],
)
def test_a_row_that_cannot_be_asked_is_refused(row, error, match):
    with pytest.raises(error, match=match):
        ReasoningGym().reset(**({"task_seed": 3} | row))


def test_without_the_package_the_error_names_the_extra(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    reasoning_gym_task._questions.cache_clear()
    with pytest.raises(MissingDependencyError, match=r"composer-replication\[reasoning-gym\]"):
        ReasoningGym().reset(task_seed=0)
