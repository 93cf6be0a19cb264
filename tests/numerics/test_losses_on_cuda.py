import pytest
import torch

from composer_replication.losses.head import selected_logp
from composer_replication.losses.sdpo import fused_generalized_jsd

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_equals_fp64_on_the_cpu(dtype):
    generator = torch.Generator().manual_seed(0)
    hidden, noise = torch.randn(2, 300, 64, generator=generator)
    weight = torch.randn(5000, 64, generator=generator) / 4
    teacher = hidden + 0.3 * noise
    targets = torch.randint(0, 5000, (300,), generator=generator)

    def run(device, dtype, source_dtype):
        # Both sides start from the same rounded numbers.
        tensors = (x.to(source_dtype).to(device, dtype) for x in (hidden, weight, teacher))
        h, w, t = tensors
        h.requires_grad_()
        w.requires_grad_()
        divergence = fused_generalized_jsd(h, w, t, w)
        logp = selected_logp(h, w, targets.to(device))
        grads = torch.autograd.grad(divergence.sum() - logp.sum(), (h, w))
        return [x.detach().double().cpu() for x in (divergence, logp, *grads)]

    values, exact = run("cuda", dtype, dtype), run("cpu", torch.float64, dtype)
    # Gradients are rounded to the inputs' dtype; with bf16 the tensor cores also read them so.
    gradient_rounding = 2e-2 if dtype == torch.bfloat16 else 1e-4
    for value, expected, rtol in zip(
        values, exact, (1e-3, 1e-4, gradient_rounding, gradient_rounding), strict=True
    ):
        torch.testing.assert_close(value, expected, rtol=rtol, atol=rtol * expected.abs().max())
