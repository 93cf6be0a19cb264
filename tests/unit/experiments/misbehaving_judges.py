"""Reward functions and environments as users write them by mistake."""

from composer_replication.environments.protocol import Observation

NO_FUNCTION = 3


def right(completions, **columns):
    return [0.5 for _ in completions]


def without_keywords(prompts, completions):
    return [0.0 for _ in completions]


class Plain:
    """An environment without a mistake."""

    def reset(self, **row):
        return " Go."

    def _step_text(self, action):
        return Observation("done", is_done=True)

    def get_reward(self):
        return 1.0


class NamedTask(Plain):
    def reset(self, task):
        self.task = task


class WithArguments(Plain):
    def __init__(self, path):
        self.path = path


class WithoutText:
    def reset(self, **row):
        return None

    def get_reward(self):
        return 0.0


class AnswersText(Plain):
    def _step_text(self, action):
        return "done"


class Raises(Plain):
    def _step_text(self, action):
        raise KeyError("tool")


class ResetsToNumber(Plain):
    def reset(self, **row):
        return 3
