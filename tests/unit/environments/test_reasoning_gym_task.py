import ast
import inspect

import pytest
from transformers.utils import get_json_schema

from composer_replication.environments import reasoning_gym_task
from composer_replication.environments.gym_scorers import evaluating_names
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


def test_where_several_answers_are_right_no_hint_shows_one():
    """Jugs are filled in many orders, and another question's may do for this one."""
    for seed in range(8):
        environment, task = started(task_seed=seed, dataset="jugs")
        assert environment._step_text(task.example[1]).error is not None


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
        ({"dataset": "binary_matrix"}, ConfigError, "judges answers with eval, which can execute"),
        ({"dataset": "countdown"}, ConfigError, "with parse_expr and sympy, which can execute"),
        ({"dataset": "game_of_life_halting"}, ConfigError, "full score at .* 'no such answer'"),
        ({"dataset": "composite", "settings": '{"datasets": [{}]}'}, ConfigError, "does not take"),
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


def test_a_scorer_that_ends_the_process_ends_nothing():
    class Ending:
        def score_answer(self, answer, entry):
            raise SystemExit(answer)

    assert not reasoning_gym_task.is_right(Ending(), {}, "3")


def test_every_generator_whose_scorer_can_execute_an_answer_is_found():
    from reasoning_gym.factory import DATASETS

    found = {name for name, (kind, _) in DATASETS.items() if evaluating_names(kind)}
    assert found == {
        "binary_matrix", "bitwise_arithmetic", "countdown", "intermediate_integration", "n_queens",
        "number_sorting", "polynomial_multiplication", "puzzle24", "simple_integration",
        "spiral_matrix", "string_insertion",
    }  # fmt: skip


def evaluates(text):
    return eval(text)


class Evaluator:
    def judge(self, text):
        return evaluates(text)


class FromAClass:
    def score_answer(self, answer, entry):
        return Evaluator().judge(answer)


class FromAProperty:
    @property
    def judge(self):
        return [evaluates(text) for text in ("1",)]

    def score_answer(self, answer, entry):
        return self.judge


class FromAnInnerFunction:
    @staticmethod
    def judge(text):
        def inner():
            from sympy import parse_expr as parse

            return parse(text)

        return inner()

    def score_answer(self, answer, entry):
        return self.judge(answer)


class Inherited(FromAClass):
    pass


class Harmless:
    """Its questions are evaluated, its answers are not."""

    def __getitem__(self, index):
        return {"answer": evaluates("1")}

    def score_answer(self, answer, entry):
        return ast.literal_eval(answer) == entry["answer"]


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (FromAClass, ["eval"]),
        (FromAProperty, ["eval"]),
        (FromAnInnerFunction, ["parse_expr", "sympy"]),
        (Inherited, ["eval"]),
        (Harmless, []),
    ],
)
def test_what_a_scorer_reaches_is_found_wherever_it_stands(kind, names):
    assert evaluating_names(kind) == names
