"""A task that a random model varies on: the share of characters with an even code."""

from composer_replication.environments.protocol import Observation, ToolError


class EvenLetters:
    """Rewards the share of characters with an even code; every first action is an error turn."""

    def reset(self, **row):
        self.reward = 0.0
        self.num_actions = 0

    def _step_text(self, action):
        self.num_actions += 1
        codes = [ord(letter) for letter in action] or [1]
        self.reward = sum(code % 2 == 0 for code in codes) / len(codes)
        error = ToolError("odd", "Odd letters.", "Write evenly.") if self.num_actions == 1 else None
        return Observation("again", is_done=self.num_actions == 2, error=error)

    def get_reward(self):
        return self.reward
