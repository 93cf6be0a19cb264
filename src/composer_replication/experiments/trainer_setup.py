"""From a run's configuration to a trainer: every check first, the model after it."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import cast

import torch
from datasets import Dataset
from packaging.version import Version
from transformers import TrainerCallback, set_seed

from composer_replication.config.run_config import RunConfig
from composer_replication.config.unused_options import check_used_options
from composer_replication.errors import ConfigError, DataError, InputError, MissingDependencyError
from composer_replication.experiments.doctor import cpu_bf16_line
from composer_replication.experiments.evaluation_data import (
    HELDOUT_FOLDER,
    EvaluationData,
    folder_data,
)
from composer_replication.experiments.fixed_shapes import FixedShapeRollouts
from composer_replication.experiments.grpo_section_options import check_grpo_section
from composer_replication.experiments.judge_checks import find_judge
from composer_replication.experiments.lora_settings import check_lora, peft_config
from composer_replication.experiments.record_checks import check_records
from composer_replication.experiments.run_data import (
    PROMPTS_FILE,
    RunData,
    load_run_data,
    shipped_data,
)
from composer_replication.planner.model_files import SHAPE_PREFIX
from composer_replication.runs.run_directory import RunDirectory
from composer_replication.step.channels import CHANNELS
from composer_replication.step.optimizer_step import find_channel
from composer_replication.training.composer_config import ComposerConfig
from composer_replication.training.model_source import (
    LoadedModel,
    check_model_spec,
    default_model_spec,
    load_model,
    model_facts,
)
from composer_replication.training.rewards import RewardFunction, environment_reward, token_reward
from composer_replication.training.rollouts import EnvironmentRollouts
from composer_replication.training.trainer import ComposerReplicationTrainer


@dataclass(frozen=True, slots=True)
class RunParts:
    """A checked configuration with everything but the model's weights."""

    config: RunConfig
    args: ComposerConfig
    data: RunData
    model_spec: str
    environment: type | None
    """Class that rollouts are played in; None: fixed shapes, or `reward` judges single turns."""
    reward: RewardFunction | None
    """The user's own reward function; None: the environment's."""
    notes: list[str]
    """Sentences a reader of the figures must know."""
    heldout: EvaluationData | None = None
    """What `[evaluation]` plays; None: it is off."""


def prepare(
    config: RunConfig,
    run: RunDirectory,
    *,
    overrides: dict[str, object],
    on_progress: Callable[[str], None] | None = None,
) -> RunParts:
    """Check every setting, the model's files and every record; no weights are read.

    Args:
        config: of the run.
        run: where checkpoints, rollouts and metrics go.
        overrides: GRPOConfig values that the verb sets, such as `max_steps`.
        on_progress: receives one sentence for each slow thing that is about to happen.

    Raises:
        InputError: anything that could not work later.
    """
    _check_trl()
    # What needs the least comes first: a mistyped key is told before anything is downloaded.
    notes = check_used_options(config)
    check_grpo_section(config.grpo, device_type=device().type)
    for name in config.channels:
        find_channel(name)
    spec = config.model
    if spec is None:
        spec, reason = default_model_spec(device().type)
        notes.append(reason)
    check_model_spec(spec)
    _check_reference(config, spec)
    data = load_run_data(config.data)
    notes += data.notes
    environment, reward = find_judge(config, data)
    _check_channel_data(config, data, has_environment=environment is not None)
    if config.smoke.fixed_shapes is not None:
        # Nothing is sampled: the actions at hint sites are as long as the shape makes them.
        overrides = {**overrides, "hint_site_actions": "recorded"}
    args = composer_config(config, run, overrides, reference_cache=_reference_cache(data, run))
    _prompt_dataset(data)
    facts = model_facts(spec, on_progress)
    if config.lora is not None:
        check_lora(config.lora, facts.config)
    completion = int(args.max_completion_length or 0)
    notes += check_records(config, data, facts, max_completion_length=completion)
    heldout = None
    if config.evaluation.every_steps:
        heldout = folder_data(data.folder, HELDOUT_FOLDER, config)
    return RunParts(config, args, data, spec, environment, reward, notes, heldout)


def build_trainer(
    parts: RunParts,
    loaded: LoadedModel,
    callbacks: list[TrainerCallback],
    *,
    trainer_class: type[ComposerReplicationTrainer] = ComposerReplicationTrainer,
) -> ComposerReplicationTrainer:
    """The trainer of a run, its references scored and its teacher made."""
    config = parts.config
    # TRL makes a LoRA adapter before transformers seeds anything.
    set_seed(config.seed)
    rollouts, reward = _rollouts_and_reward(parts, loaded)
    keywords: dict[str, object] = {}
    if rollouts is not None:
        keywords["rollout_func"] = rollouts
    if config.lora is not None:
        keywords["peft_config"] = peft_config(config.lora)
    fixed = rollouts if isinstance(rollouts, FixedShapeRollouts) else None
    uses_sites = config.alpha_sdpo > 0 or _weighs(config, "hint_sites")
    uses_pairs = config.beta_replay > 0 or _weighs(config, "pairs")
    sites = fixed.hint_sites() if fixed else parts.data.hint_sites
    pairs = fixed.pairs() if fixed else parts.data.pairs
    try:
        return trainer_class(
            loaded.model,
            reward,
            parts.args,
            train_dataset=_prompt_dataset(parts.data),
            processing_class=loaded.tokenizer,
            callbacks=callbacks,
            hint_sites=sites if uses_sites and sites else None,
            pairs=pairs if uses_pairs else None,
            **keywords,
        )
    except ValueError as error:
        raise as_config_error(error) from error


def composer_config(
    config: RunConfig, run: RunDirectory, overrides: dict[str, object], *, reference_cache: Path
) -> ComposerConfig:
    """`ComposerConfig` from the file's sections, TRL's checks included.

    Raises:
        ConfigError: a value that TRL refuses.
    """
    sdpo, dpo, batch = config.sdpo, config.dpo, config.batch
    values: dict[str, object] = _device_defaults()
    if config.grpo.get("fp16"):
        values["bf16"] = False
    values |= {
        "output_dir": str(run.checkpoints_dir),
        "seed": config.seed,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "alpha_sdpo": config.alpha_sdpo,
        "beta_replay": config.beta_replay,
        "channel_weights": dict(config.channels),
        "channel_schedule": batch.channel_schedule,
        "teacher": config.teacher,
        "tree": config.tree,
        "teacher_ema_rate": sdpo.teacher_ema_rate,
        "sdpo_beta": sdpo.beta,
        "sdpo_temperature": sdpo.temperature,
        "sdpo_top_k": sdpo.top_k,
        "sdpo_top_k_from": sdpo.top_k_from,
        "sdpo_tail": sdpo.tail,
        "sdpo_clip": sdpo.clip,
        "sdpo_clip_value": sdpo.clip_value,
        "sdpo_entropy_scale": sdpo.entropy_scale,
        "sdpo_prefix_weight": sdpo.prefix_weight,
        "rollout_routing": sdpo.routing,
        "success_reward": sdpo.success_reward,
        "hint_placement": sdpo.hint_placement,
        "hint_site_actions": sdpo.actions,
        "hint_sites_per_step": sdpo.sites_per_step,
        "dpo_beta": dpo.beta,
        "dpo_label_smoothing": dpo.label_smoothing,
        "pairs_per_step": dpo.pairs_per_step,
        "max_context_tokens": batch.max_context_tokens,
        "tree_max_tokens": batch.tree_max_tokens,
        "truncation": batch.truncation,
        **dict(config.diagnostics),
        **{f"guard_{name}": value for name, value in config.guards},
        "credit_dir": str(run.credit_dir),
        "rollouts_dir": str(run.rollouts_dir),
        "reference_cache_dir": str(reference_cache),
    }
    values |= config.grpo | overrides
    if values["bf16"] and _has_tf32():
        # What bf16 leaves in fp32, the output head, then multiplies on tensor cores too.
        values.setdefault("tf32", True)
    try:
        return ComposerConfig(**values)  # pyright: ignore[reportArgumentType]
    except (ValueError, TypeError) as error:
        raise as_config_error(error) from error


def as_config_error(error: Exception) -> InputError:
    """TRL's or transformers' refusal of a value as this package's kind of error."""
    if isinstance(error, InputError):
        return error
    return ConfigError(f"{error} (refused by TRL; the value comes from [grpo] or its defaults.)")


def load_run_model(parts: RunParts, on_progress: Callable[[str], None]) -> LoadedModel:
    """The policy's weights, in fp32: bf16 runs keep fp32 master weights under autocast."""
    dtype = torch.float32
    given = parts.config.grpo.get("model_init_kwargs")
    if isinstance(given, dict) and "dtype" in given:
        dtype = cast(torch.dtype, getattr(torch, str(given["dtype"])))
    elif parts.config.lora is not None and parts.args.bf16:
        # The base is frozen, so it needs no fp32 master copy; the adapter is kept in fp32 by PEFT.
        dtype = torch.bfloat16
    return load_model(
        parts.model_spec, dtype=dtype, seed=parts.config.seed, on_progress=on_progress
    )


def device() -> torch.device:
    """Where the run computes."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_label() -> str:
    """The actual device in words."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{torch.get_num_threads()}-thread CPU"


def _check_trl() -> None:
    """TRL 1.15's fused output head exists only where Triton does."""
    installed = version("trl")
    if device().type == "cpu" and Version(installed) < Version("1.16"):
        raise MissingDependencyError(
            f"trl {installed} is installed and this machine has no CUDA device. Its GRPO trainer "
            "needs Triton, so no step could run on a CPU. Install trl>=1.16,<1.17."
        )


def _has_tf32() -> bool:
    """Whether the device multiplies in TF32: NVIDIA's from Ampere on."""
    is_nvidia = device().type == "cuda" and torch.version.cuda is not None
    return is_nvidia and torch.cuda.get_device_capability() >= (8, 0)


def _device_defaults() -> dict[str, object]:
    if device().type == "cuda":
        return {"bf16": torch.cuda.is_bf16_supported(), "gradient_checkpointing": False}
    return {
        # Without bf16 units a CPU emulates it, slower than fp32.
        "bf16": cpu_bf16_line(Path("/proc/cpuinfo")).is_ok is True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "gradient_checkpointing": False,
    }


def _prompt_dataset(data: RunData) -> Dataset:
    try:
        return Dataset.from_list(data.prompts)
    except (ValueError, TypeError) as error:
        raise DataError(
            f"{data.folder / PROMPTS_FILE}: its rows do not make a table ({error}). Give each key "
            "values of one type in every row."
        ) from error


def _check_reference(config: RunConfig, spec: str) -> None:
    """TRL reads the reference of its KL term from the files that the policy came from."""
    if config.grpo.get("beta") and config.lora is None and spec.startswith(SHAPE_PREFIX):
        raise ConfigError(
            f"grpo.beta is {config.grpo['beta']} and the model is {spec}, whose random weights are "
            "in no file that TRL could read the reference from. Take a model with weights, leave "
            "grpo.beta out, or train an adapter ([lora]), which is turned off for the reference."
        )


def _check_channel_data(config: RunConfig, data: RunData, *, has_environment: bool) -> None:
    """Each weight above 0 needs its records; error turns of an environment are hint sites too."""
    if config.smoke.fixed_shapes is not None:
        return
    weights = {"alpha_sdpo": config.alpha_sdpo, "beta_replay": config.beta_replay}
    needs = {"alpha_sdpo": "hint_sites", "beta_replay": "pairs"}
    weights |= {f"channels.{name}": weight for name, weight in config.channels.items()}
    needs |= {f"channels.{name}": find_channel(name).data for name in config.channels}
    has_none = {
        "rollouts": False,
        "hint_sites": not data.hint_sites and not has_environment,
        "pairs": not data.pairs,
    }
    for key, weight in weights.items():
        if weight > 0 and has_none[needs[key]]:
            raise DataError(
                f"{key} is {weight} and {data.lack_of(f'{needs[key]}.jsonl')}, so that channel "
                f"could never train. Add {needs[key]}, or set {key} = 0."
            )


def _rollouts_and_reward(
    parts: RunParts, loaded: LoadedModel
) -> tuple[EnvironmentRollouts | FixedShapeRollouts | None, RewardFunction]:
    config = parts.config
    if config.smoke.fixed_shapes is not None:
        num_rows, num_tokens = config.smoke.fixed_shapes
        parts.notes.append(
            f"Fixed shapes: nothing is sampled; {num_rows} rows of {num_tokens} tokens a "
            "micro-batch, and a synthetic reward."
        )
        return FixedShapeRollouts(loaded.tokenizer, num_tokens, parts.args), token_reward
    if parts.environment is None:
        assert parts.reward is not None
        return None, parts.reward
    rollouts = EnvironmentRollouts(
        parts.environment,
        parts.data.prompts,
        max_turns=config.rollout.max_turns,
        max_action_tokens=config.rollout.max_action_tokens,
        step_timeout_s=config.rollout.step_timeout_s,
        max_concurrency=config.rollout.max_concurrency,
    )
    if loaded.has_random_weights:
        parts.notes.append(
            f"{loaded.label} has random weights: its reward is synthetic (the share of even token "
            "ids), so it shows memory and time, not learning."
        )
        return rollouts, token_reward
    return rollouts, environment_reward


def _weighs(config: RunConfig, data: str) -> bool:
    weights = config.channels.items()
    return any(w > 0 and name in CHANNELS and CHANNELS[name].data == data for name, w in weights)


def _reference_cache(data: RunData, run: RunDirectory) -> Path:
    """Beside the user's data; in the run directory for shipped data, which is not ours to write."""
    is_shipped = data.folder == shipped_data()
    beside = run.path if is_shipped or not os.access(data.folder, os.W_OK) else data.folder
    return beside / "reference_logps"
