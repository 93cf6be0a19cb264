"""Records and rewards for real trainers on a tiny model; the `build` fixture makes the trainers."""

from composer_replication import HintSite, Message, PreferencePair

PROMPTS = [{"prompt": [{"role": "user", "content": f"Read file {i}."}]} for i in range(8)]
STATE = (Message("user", "Read /src/app.py."),)
SITES = [
    HintSite(STATE, "Use file. " * (i + 1), f'{{"path": {i}}}', source=f"s{i}") for i in range(4)
]
PAIRS = [PreferencePair(STATE, f'{{"file": {i}}}', '{"path": 1}', source=f"p{i}") for i in range(4)]


def even_tokens(completion_ids, **columns):
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


def all_equal(completion_ids, **columns):
    return [1.0] * len(completion_ids)


def run(trainer, **options):
    trainer.train(**options)
    return [row for row in trainer.state.log_history if "loss" in row]
