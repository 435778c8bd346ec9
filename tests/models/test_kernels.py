"""The Triton kernels against their plain twins: on a GPU where there is one, else under Triton's interpreter."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

SHAPES = [(1, 32, 4, 4, 8), (2, 320, 9, 7, 32), (1, 96, 16, 16, 16), (3, 24, 1, 5, 4), (1, 64, 40, 40, 32), (2, 960, 8, 8, 32)]


def check(device: str, dtype: torch.dtype, tolerance: float) -> None:
    from latentdiff.models.kernels import group_norm_silu

    for batch, channels, height, width, groups in SHAPES:
        torch.manual_seed(0)
        x = 3 * torch.randn(batch, channels, height, width, device=device) + 5 * torch.randn(channels, 1, 1, device=device)
        x = x.to(dtype).contiguous(memory_format=torch.channels_last)
        weight, bias = torch.randn(channels, device=device).to(dtype), torch.randn(channels, device=device).to(dtype)
        exact = F.silu(F.group_norm(x.double(), groups, weight.double(), bias.double(), 1e-5))
        actual = group_norm_silu(x, groups, weight, bias, 1e-5)
        assert actual.dtype == dtype
        assert actual.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(actual.double(), exact, rtol=tolerance, atol=tolerance)
        far = (x + 1000).to(dtype)  # a mean a hundred times the spread takes no digits of the variance
        if dtype == torch.float32:
            exact = F.silu(F.group_norm(far.double(), groups, weight.double(), bias.double(), 1e-5))
            torch.testing.assert_close(group_norm_silu(far, groups, weight, bias, 1e-5).double(), exact, rtol=1e-3, atol=1e-3)


def test_group_norm_silu_under_the_interpreter():
    """In a process of its own: Triton decides at its import whether it interprets."""
    pytest.importorskip("triton")
    code = f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r}); import torch, test_kernels as t; "
    code += "t.check('cpu', torch.float32, 1e-5); t.check('cpu', torch.bfloat16, 1e-2)"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_group_norm_silu_on_a_gpu(dtype, tolerance):
    check("cuda", dtype, tolerance)
