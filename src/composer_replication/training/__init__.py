"""The trainer on top of TRL, its rollouts, teachers, references and metrics."""
