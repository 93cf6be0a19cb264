"""The user's environment in the rollout loop: what it raises or answers is told by its name."""

from collections.abc import Callable

from composer_replication.environments.protocol import Observation, TextEnvironment
from composer_replication.errors import ConfigError, RewardError, shown
from composer_replication.training.users_code import users_code


class CheckedEnvironment:
    """Passes everything on to one instance of the environment, which it makes.

    Example: `CheckedEnvironment(ApiDrift).reset(task_seed=0)`.

    Raises:
        ConfigError: an environment that cannot be driven by text.
        RewardError: from every method, where the environment's own raises or answers with
            something else than the protocol's types.
    """

    def __init__(self, environment: Callable[[], object]) -> None:
        name = getattr(environment, "__name__", type(environment).__name__)
        with users_code(f"The environment {name}()", "It is made without arguments."):
            instance = environment()
        if not isinstance(instance, TextEnvironment):
            raise ConfigError(
                f"The environment {name} lacks reset, _step_text or get_reward, so the rollout "
                "loop cannot drive it. Implement "
                "composer_replication.environments.protocol.TextEnvironment."
            )
        self._name = name
        self._instance: TextEnvironment = instance

    def reset(self, **row: object) -> str | None:
        """Start the episode; text or None."""
        given = ", ".join(row) or "nothing beside the prompt"
        remedy = f"It was given {given}; give every prompt what reset needs."
        with users_code(f"{self._name}.reset", remedy):
            opening: object = self._instance.reset(**row)
        if opening is not None and not isinstance(opening, str):
            raise RewardError(
                f"{self._name}.reset returned {shown(opening)}; what it returns is put at the end "
                "of the prompt. Return text or None."
            )
        return opening

    def _step_text(self, action: str) -> Observation:
        remedy = "It must answer whatever a model wrote: return an Observation with a ToolError."
        with users_code(f"{self._name}._step_text({shown(action)})", remedy):
            observation: object = self._instance._step_text(action)
        if not isinstance(observation, Observation):
            raise RewardError(
                f"{self._name}._step_text returned {shown(observation)}. Return an Observation of "
                "composer_replication.environments.protocol."
            )
        return observation

    def get_reward(self) -> float:
        """The reward; `environment_reward` refuses what is no finite number."""
        with users_code(f"{self._name}.get_reward", "Return 0.0 for an episode that failed."):
            return self._instance.get_reward()
