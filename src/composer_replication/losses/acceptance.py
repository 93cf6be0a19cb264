"""How likely the teacher would have come as far as each token of an action that the policy sampled.

After a token that the hinted teacher would not have written, its distribution answers a question
that never arises for it: told that the key is "file", and shown `{"tool": "read", "path": "a.py"`,
it goes on with `, "file"`, and a policy that learns from this writes both keys. Weighing a token by
the teacher's acceptance of what stands before it leaves the tokens up to the first disagreement,
and the later ones gain weight as the policy comes to agree. The weight is this project's own; the
acceptance is the rule of speculative sampling.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

_LEAST_LOG = -1e4
"""Its exponential is 0, and sums of it stay finite."""


def prefix_acceptance(
    policy_logp: Float[Tensor, " M"], teacher_logp: Float[Tensor, " M"], site: Int[Tensor, " M"]
) -> Float[Tensor, " M"]:
    """For each token the product of min(1, teacher / policy) over the tokens before it.

    1 at the first token of an action and wherever the teacher would have said the same; a constant,
    without gradient.

    Args:
        policy_logp: log-probs of the sampled tokens without the hint, in nats.
        teacher_logp: with the hint.
        site: which action each token belongs to; the tokens of one stand together, in order.

    Source: the acceptance rule of speculative sampling, arXiv:2211.17192 and arXiv:2302.01318.
    """
    gain = (teacher_logp - policy_logp).detach().double().clamp(_LEAST_LOG, 0.0)
    before = gain.cumsum(0) - gain
    is_first = torch.ones_like(site, dtype=torch.bool)
    is_first[1:] = site[1:] != site[:-1]
    at_start = before[is_first][is_first.long().cumsum(0) - 1]
    return (before - at_start).exp().to(policy_logp.dtype)
