"""A task whose every first action is an error turn, with hints that differ or do not."""

from composer_replication.environments.protocol import Observation, ToolError


class VariedHints:
    """Rewards the share of characters with an even code; hints count the characters."""

    def reset(self, **row):
        self.reward = 0.0
        self.is_first = True

    def _step_text(self, action):
        is_first, self.is_first = self.is_first, False
        codes = [ord(letter) for letter in action] or [1]
        self.reward = sum(code % 2 == 0 for code in codes) / len(codes)
        error = ToolError("odd", self.advice(action), "Write evenly.") if is_first else None
        return Observation("again", is_done=not is_first, error=error)

    def advice(self, action):
        return f"You wrote {sum(map(ord, action))} in all."

    def get_reward(self):
        return self.reward


class OneHint(VariedHints):
    """The same hint whatever was done."""

    def advice(self, action):
        return "Odd letters."
