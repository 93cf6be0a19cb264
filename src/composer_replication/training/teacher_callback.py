"""The teacher follows the policy in a trainer; apart, so that a teacher alone needs no trainer."""

from transformers import TrainerCallback

from composer_replication.training.teacher import Teacher


class TeacherCallback(TrainerCallback):
    """Lets the teacher follow the policy once an optimizer step."""

    def __init__(self, teacher: Teacher) -> None:
        self._teacher = teacher

    def on_step_end(self, args: object, state: object, control: object, **kwargs: object) -> None:
        """Update the teacher after the optimizer moved the policy."""
        del args, state, control, kwargs
        self._teacher.update()
