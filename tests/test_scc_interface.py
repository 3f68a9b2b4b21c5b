"""``trtpass.scc``: what it takes and gives, what it warns of and refuses, and the examples of docs/scc.md."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from one_op import Array

import trtpass
from plugins.connected_components.cases import arcs
from trtpass import components
from trtpass.errors import InputError

# Few tokens may be kept of the few that a test has; the warning has a test of its own.
pytestmark = pytest.mark.filterwarnings("ignore:.*tokens are kept")
PAGE = Path(__file__).resolve().parent.parent / "docs" / "scc.md"


def tokens_of(seed: int, count: int, width: int = 16) -> Array:
    """Tokens `[n, E]` float32 with components of all sizes, no cosine near 0.9."""
    return arcs(np.random.default_rng(seed), count, width).astype(np.float32)


@pytest.mark.parametrize("groups", [None, 5])
def test_streams_of_a_batch_are_independent(groups: int | None) -> None:
    x = np.stack([tokens_of(seed, 23) for seed in (1, 2, 3)])
    positions = np.arange(69).reshape(3, 23) * 0.5
    made = trtpass.scc(x, groups=groups, positions=positions)
    assert isinstance(made, tuple) and len(made) == 3
    for row, place, each in zip(x, positions, made, strict=True):
        alone = trtpass.scc(row, groups=groups, positions=place)
        np.testing.assert_array_equal(each.tokens, alone.tokens)
        np.testing.assert_array_equal(each.ranges, alone.ranges)
        assert each.sizes.sum() == 23


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_torch_in_torch_out(dtype: torch.dtype) -> None:
    x = torch.from_numpy(tokens_of(4, 30)).to(dtype).requires_grad_()
    groups, positions = torch.arange(30) // 6, torch.linspace(0, 1, 30, dtype=torch.float64)
    made = trtpass.scc(x, groups=groups, positions=positions)
    plain = x.detach().double().numpy() if dtype == torch.float64 else x.detach().float().numpy()
    expected = trtpass.scc(plain, groups=groups.numpy(), positions=positions.numpy())
    assert made.tokens.dtype == dtype and made.label.dtype == torch.int64 and made.kept == expected.kept
    for name in ("label", "sizes", "positions", "ranges", "runs"):
        np.testing.assert_array_equal(getattr(made, name).numpy(), getattr(expected, name))
    np.testing.assert_allclose(made.tokens.double().numpy(), expected.tokens, rtol=2 * torch.finfo(dtype).eps)


def test_numpy_needs_no_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import numpy as np, trtpass\n"
        "x = np.repeat(np.eye(4, dtype='float16'), 3, 0)\n"
        "made = trtpass.scc(x, groups=5)\n"
        "assert made.sizes.tolist() == [3, 3, 3, 3] and made.tokens.tolist() == np.eye(4).tolist(), made\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_time_stamps_keep_their_precision() -> None:
    x = np.repeat(np.eye(2, dtype=np.float32), 3, 0)
    stamps = 1.7e9 + np.array([0.001, 0.002, 0.003, 0.1, 0.2, 0.3])
    made = trtpass.scc(x, positions=stamps)
    np.testing.assert_array_equal(made.ranges, stamps[[[0, 2], [3, 5]]])
    np.testing.assert_allclose(made.positions - 1.7e9, [0.002, 0.2], atol=1e-6)


def test_a_state_that_returns_has_a_run_of_its_own() -> None:
    a, b = np.eye(2, dtype=np.float32)
    made = trtpass.scc(np.stack([a, a, b, a, b, b]), groups=2, positions=[10, 11, 12, 13, 14, 15])
    assert made.runs.tolist() == [[0, 1, 0], [2, 2, 1], [3, 3, 0], [4, 5, 1]]
    assert made.ranges.tolist() == [[10, 13], [12, 15]]


def test_few_kept_tokens_are_a_warning() -> None:
    x = np.ones((100, 4), np.float32)
    with pytest.warns(UserWarning, match=r"scc: 1 of 100 tokens are kept \(1.0%, less than 5%\)") as found:
        trtpass.scc(x)
    assert len(found) == 1 and found[0].filename == __file__
    x[:4] = np.eye(4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert trtpass.scc(x, 0.9).kept == 0.05


X = np.ones((6, 3), np.float32)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"tau": float("nan")}, "tau is nan"),
        ({"tau": "0.9"}, "tau is '0.9'"),
        ({"tau": True}, "tau is True"),
        ({"tokens": X[0]}, r"shape \[3\].*\[n, E\]"),
        ({"tokens": X[None, None]}, r"shape \[1, 1, 6, 3\]"),
        ({"tokens": X[:0]}, r"shape \[0, 3\]"),
        ({"tokens": X[:, :0]}, r"shape \[6, 0\]"),
        ({"tokens": X.astype(int)}, "tokens are int64"),
        ({"tokens": X.tolist()}, "tokens are list"),
        ({"tokens": torch.ones(2, 2, dtype=torch.int32)}, "tokens are int32"),
        ({"groups": 0}, "groups=0"),
        ({"groups": np.zeros(5, int)}, r"groups have shape \[5\].*for 6 tokens"),
        ({"groups": np.zeros(6)}, "dtype float64"),
        ({"groups": True}, "dtype bool"),
        ({"groups": [[0], [1, 2]]}, "groups"),
        ({"groups": "frame"}, "groups"),
        ({"positions": np.zeros(7)}, r"positions have shape \[7\]"),
        ({"positions": [0, 1, 2, 3, 4, np.nan]}, "NaN"),
        ({"positions": ["a"] * 6}, "positions"),
        ({"tokens": X[None].repeat(2, 0), "positions": np.zeros((3, 6))}, "2 streams of 6 tokens"),
    ],
)
def test_bad_input_is_one_clear_error(given: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match="(?s)scc: .*" + words):
        trtpass.scc(**{"tokens": X, **given})


def test_no_memory_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def run(self, *_: Any) -> None:
            raise RuntimeError("Failed to allocate memory for requested buffer of size 1")

    monkeypatch.setattr(components, "_session", lambda *_: Full())
    with pytest.raises(InputError, match=r"ConnectedComponents of \[1, 6, 3\] and \[1\] failed: Failed to allocate"):
        trtpass.scc(X)


def test_what_the_package_exports() -> None:
    assert trtpass.scc is components.scc and set(trtpass.__all__) == {"scc", "Components"}
    with pytest.raises(AttributeError, match="no attribute 'sccc'"):
        trtpass.sccc  # noqa: B018


def test_the_page_has_an_example_each() -> None:
    assert len(examples()) == 4
    assert all(any(word in code for code in examples()) for word in ("paragraphs", "frames", "samples"))


def examples() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.S | re.M)


@pytest.mark.parametrize("number", range(4))
def test_the_examples_of_the_page(number: int) -> None:
    """Each stands alone, and says with assertions what it claims."""
    code = examples()[number]
    assert "assert " in code
    exec(compile(code, f"{PAGE.name}, example {number}", "exec"), {})
